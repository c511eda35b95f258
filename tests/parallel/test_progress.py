"""What takes long says so, and what does not is silent."""

import os
import time

import jax
import jax.numpy as jnp
import pytest

from ppow_jax.parallel import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which only a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_line", 100.0)
    monkeypatch.setattr(progress, "_wait", progress._QUIET)
    monkeypatch.setattr(progress, "_tasks", [])
    return now


@pytest.fixture
def lines(log_lines):
    """The log's, of which the package knows when they came."""
    progress.log.addFilter(progress._hears)
    yield log_lines
    progress.log.removeFilter(progress._hears)


def test_a_silent_log_gets_lines_about_what_is_being_done_ever_more_rarely(clock, lines):
    with progress.during("respond"), progress.during("respond: batch 1/2"):
        for _ in range(200):
            clock[0] += 1
            progress._tell()
    said = [5, 15, 35, 75, 135, 195]
    assert lines == [f"respond: batch 1/2: {progress.duration(s)} so far" for s in said]
    clock[0] += 1000
    progress._tell()  # nothing is being done
    assert len(lines) == len(said)


def test_lines_of_its_own_keep_the_log_from_saying_more(clock, lines):
    with progress.during("respond"):
        for second in range(1, 31):
            clock[0] += 1
            if second % 4 == 0:
                progress.log.info("a batch")
            progress._tell()
    assert lines == ["a batch"] * 7


def test_a_line_with_the_time_left_is_enough_for_half_a_minute(clock, lines):
    with progress.during("train"):
        progress.log.info("step 20/500 | 4m left")
        for _ in range(29):
            clock[0] += 1
            progress._tell()
        assert lines == ["step 20/500 | 4m left"]
        clock[0] += 1
        progress._tell()
    assert lines[1:] == ["train: 30s so far"]


def test_what_follows_the_end_of_a_loop_is_told_after_five_seconds(clock, lines):
    progress.log.info("step 500/500 | 0s left")
    with progress.during("evaluate"):
        for _ in range(5):
            clock[0] += 1
            progress._tell()
    assert lines[1:] == ["evaluate: 5s so far"]


def test_short_pieces_do_not_hide_what_lasts(clock, lines):
    """As dozens of programs that each compile for three seconds."""
    with progress.during("evaluate"):
        for _ in range(2):
            with progress.during("compiling a piece"):
                clock[0] += 3
                progress._tell()
    assert lines == ["evaluate: 6s so far"]


def test_compilation_is_named_and_its_end_is_told(monkeypatch, lines):
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    monkeypatch.setattr(progress, "_wait", 0.0)

    @jax.jit
    def particular(x: jax.Array) -> jax.Array:
        return jnp.sin(x) + 1

    def look(*_: object, **__: object) -> None:
        progress._tell()

    with progress.followed():
        jax.monitoring.register_scalar_listener(look)  # something has begun to compile
        try:
            particular(jnp.ones(3)).block_until_ready()
        finally:
            jax.monitoring.unregister_scalar_listener(look)
    about = [line for line in lines if line.startswith("compiling") and "particular" in line]
    assert [line.split(": ")[1] for line in about] == ["0s so far", "done in 0s"]
    assert progress._tasks == []


def test_the_log_is_watched_while_something_blocks(monkeypatch, lines):
    for name, value in (("_QUIET", 0.1), ("_wait", 0.1), ("_LOOK", 0.02)):
        monkeypatch.setattr(progress, name, value)
    with progress.followed(), progress.during("sleeping"):
        time.sleep(0.3)
    assert lines[0] == "sleeping: 0s so far"
    with progress.during("sleeping"):
        count = len(lines)
        time.sleep(0.3)
    assert len(lines) == count  # nobody watches any more


def test_a_loop_says_how_far_how_fast_and_how_long_at_most_every_five_seconds(clock, lines):
    loop = progress.Loop("features", 40, "texts")
    for _ in range(10):
        clock[0] += 2
        loop.add(4)
    assert lines == [
        "features: 12/40 texts, 2 texts/s | 14s left",
        "features: 24/40 texts, 2 texts/s | 8s left",
        "features: 36/40 texts, 2 texts/s | 2s left",
        "features: 40/40 texts, 2 texts/s | 0s left",
    ]


def test_a_short_loop_says_nothing(clock, lines):
    loop = progress.Loop("features", 4, "texts")
    for _ in range(4):
        clock[0] += 1
        loop.add(1)
    assert lines == []


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [(10, 4, "2.5 texts/s"), (1000, 1.5, "667 texts/s"), (3, 9.3, "3.1 s each"), (5, 0, "5e+03 texts/s")],
)
def test_rates(count, seconds, text):
    assert progress.rate(count, seconds, "texts") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (7.4, "7s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3599, "59m59s"),
        (3599.7, "1h00m"), (3725, "1h02m"), (90_000, "25h00m"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(("terminal", "width"), [(True, 71), (False, 120)])
def test_a_line_is_as_wide_as_the_terminal_less_the_time_of_day(monkeypatch, terminal, width):
    monkeypatch.setattr(progress.sys, "stderr", type("Stream", (), {"isatty": lambda self: terminal})())
    size = os.terminal_size((80, 24))
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda fallback=size: size)  # pytest asks too
    assert progress.width() == width
