"""A run that is stopped and started again ends as one that never stopped, to the last bit."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import quick
import runs

from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.training import drafters, loop, metrics

ROOT = pathlib.Path(__file__).parents[2]
CHANGES = dict(
    stages=("respond", "train"),
    runs=(),
    train__supervise__steps=10,
    train__ppow__steps=8,
    train__ppow__proximity_weight=0.5,
    train__ppow__anchor_rule__warmup_steps=1,
    train__ppow__anchor_rule__rescore_every=2,
    log__checkpoint_every_steps=3,
)
STOPS = (("supervise", 8), ("cst", 2), ("ppow", 5), ("ppow", 8))


class Stopped(Exception):
    """Stands for whatever ends a run in the middle."""


class Watch:
    """What was saved by stage, and which steps were run; stops at the given steps, once each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stops=()) -> None:
        self.saved: dict[str, tuple] = {}
        self.steps: list[tuple[str, int]] = []
        self._stops = set(stops)
        monkeypatch.setattr(Checkpoints, "save", self._save(Checkpoints.save))
        monkeypatch.setattr(loop, "_walk", self._walk(loop._walk))

    def _save(self, save):
        def saving(store, step, state, data, about):
            arrays = {
                "/".join(map(str, path)): np.array(leaf)
                for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            }
            self.saved[store._directory.name] = (step, arrays, json.dumps(data.get_state(), default=str))
            save(store, step, state, data, about)

        return saving

    def _walk(self, walk):
        def walking(experiment, run, state, inner, *rest):
            def step(number, state, batch):
                self.steps.append((run, number))
                if (run, number) in self._stops:
                    self._stops.remove((run, number))
                    raise Stopped
                return inner(number, state, batch)

            walk(experiment, run, state, step, *rest)

        return walking


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two workdirs and what was seen of them: a run left alone, a run stopped four times."""
    directory = tmp_path_factory.mktemp("resume")
    found = []
    for name, stops in (("whole", ()), ("stopped", STOPS)):
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch, stops)
            for _ in stops:
                with pytest.raises(Stopped):
                    runs.run(directory / name, **CHANGES)
            runs.run(directory / name, **CHANGES)
        found.append((directory / name, watch))
    return found


def test_a_stopped_run_goes_on_after_its_newest_checkpoint(both):
    (_, whole), (_, stopped) = both
    steps = {"supervise": 10, "cst": 8, "ppow": 8}
    assert whole.steps == [(stage, n + 1) for stage, last in steps.items() for n in range(last)]
    resumed = {s: [n for stage, n in stopped.steps if stage == s] for s in steps}
    assert resumed["supervise"] == [*range(1, 9), *range(7, 11)]
    assert resumed["cst"] == [1, 2, *range(1, 9)]
    assert resumed["ppow"] == [*range(1, 6), *range(4, 9), 7, 8]


@pytest.mark.parametrize("stage", ["supervise", "cst", "ppow"])
def test_all_that_a_stage_saves_is_the_same_to_the_last_bit(both, stage):
    """Parameters, optimiser, vocabulary, ADAW's scores, and where the data iterator stands."""
    (step, arrays, data), (other_step, others, other_data) = (watch.saved[stage] for _, watch in both)
    assert step == other_step == (10 if stage == "supervise" else 8)
    assert arrays.keys() == others.keys()
    for name, value in arrays.items():
        assert value.dtype == others[name].dtype
        assert value.tobytes() == others[name].tobytes(), name
    assert data == other_data
    names = " ".join(arrays)
    assert all(part in names for part in ("params", "opt_state", "vocab"))
    if stage == "ppow":
        scored = arrays["['memory']/['scored_at']"]
        assert (scored > 0).any()
        assert np.ptp(arrays["['memory']/['scores']"][scored > 0]) > 0


def test_the_data_iterator_is_not_where_it_began(both):
    """Else the test above would say nothing of it: saved states differ between steps."""
    supervised, continued = (both[0][1].saved[stage][2] for stage in ("supervise", "cst"))
    assert supervised != continued


@pytest.mark.parametrize("stage", ["supervise", "cst", "ppow"])
def test_what_lies_on_disk_is_what_was_saved(both, stage):
    for workdir, watch in both:
        found = drafters.load(runs.build(workdir, **CHANGES), stage)
        state = {"params": found.params, "vocab": found.vocab}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = "/".join(map(str, path))
            assert np.asarray(leaf).tobytes() == watch.saved[stage][1][name].tobytes(), name
        assert found.steps == watch.saved[stage][0]


def rows_of(workdir: pathlib.Path, stage: str) -> list[dict]:
    return [row for row in metrics.read(workdir) if row["stage"] == stage]


@pytest.mark.parametrize("stage", ["supervise", "cst", "ppow"])
def test_metrics_have_each_step_once_with_the_same_values(both, stage):
    """But for times."""
    whole, stopped = (rows_of(workdir, stage) for workdir, _ in both)
    assert [r["step"] for r in stopped] == list(range(1, len(whole) + 1))
    timed = ("seconds",)
    for one, other in zip(whole, stopped, strict=True):
        for key in one.keys() | other.keys():
            if not key.startswith(timed):
                assert one[key] == other[key], (one["step"], key)
    seconds = [r["seconds"] for r in stopped]
    assert seconds == sorted(seconds)


def test_metrics_of_ppow_hold_everything_and_add_up(both):
    rows = rows_of(both[0][0], "ppow")
    for row in rows:
        finite = ("loss", "policy_loss", "kl", "clip_fraction", "entropy", "grad_norm", "log_prob_gap")
        assert all(np.isfinite(row[key]) for key in finite)
        shares = row["accepted_shares"]
        assert len(shares) == 4  # k = 0 .. 3
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert row["accepted"] == pytest.approx(sum(k * s for k, s in enumerate(shares)), abs=1e-5)
        assert row["share_refused"] == shares[0]
        assert row["reward"] == pytest.approx(row["reward_speedup"] + row["reward_proximity"], abs=1e-5)
        assert 0 <= row["share_without_spread"] <= 1
        assert 0 <= row["clip_fraction"] <= 1
        assert row["kl"] > 0
        assert row["entropy"] > 0
        assert row["log_prob_gap"] < 1e-4
    assert any(row["reward_proximity"] > 0 for row in rows)
    assert any(row["accepted"] > 0 for row in rows)


# The whole command, killed.

FLAGS = dict(
    {
        "respond.batch_size": 8,
        # Short ones: a prompt that does not fit into data.length is left out, and a shard with it.
        "respond.prompts": "chat=builtin:chat/train[:96]",
        "train.supervise.steps": 30,
        "train.ppow.steps": 20,
        "train.ppow.anchor_rule.warmup_steps": 4,
        "train.ppow.anchor_rule.rescore_every": 3,
        "evaluate.prompts": "maths=builtin:maths/eval[:4],code=builtin:code/eval[:4]",
        "evaluate.max_new_tokens": 24,
        "evaluate.batch_size": 8,
        "evaluate.decode_prompts": 1,
        "log.checkpoint_every_steps": 4,
    }
)
TIMES = {"respond": 2, "supervise": 2, "cst": 2, "ppow": 3, "evaluate": 1}  # ten kills
LAST = {"respond": 10, "supervise": 25, "cst": 15, "ppow": 15, "evaluate": 0}


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    """The command on the tiny config, with all that it compiles kept for the next start."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": quick.FLAGS,
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ppow_jax.main",
            "--config=configs/tiny.py",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in FLAGS.items()),
        ],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def progress(workdir: pathlib.Path, stage: str) -> int:
    """Shards or steps that a stage has behind it; -1 before it begins."""
    stages = workdir / "stages.json"
    unit = stage if stage in ("respond", "evaluate") else f"train/{stage}"
    if not stages.exists() or unit not in json.loads(stages.read_text()):
        return -1
    if stage == "respond":
        return len(list((workdir / "responses").glob("*.arrayrecord")))
    return max((row["step"] for row in rows_of(workdir, stage)), default=0)


def plan(rng: random.Random) -> list[tuple[str, int, float]]:
    """Ten moments in the order of the run: stage, progress to wait for, seconds after that."""
    moments = []
    for stage, times in TIMES.items():
        for reached in sorted(rng.sample(range(LAST[stage] + 1), times)):
            moments.append((stage, reached, rng.uniform(0, 0.2)))
    return moments


def outcome(workdir: pathlib.Path) -> dict:
    """All that must not depend on the kills."""
    drafters = json.loads((workdir / "report.json").read_text())["drafters"]
    counted = ("tau", "rounds", "tokens", "accepted_per_position", "identical_outputs")
    return {
        "responses": runs.digest(workdir / "responses"),
        "features": runs.digest(workdir / "features"),
        "export": json.loads((workdir / "export" / "manifest.json").read_text()),
        "parameters": {stage: drafter["params_sha256"] for stage, drafter in drafters.items()},
        "benchmarks": {
            stage: {
                name: {key: result[key] for key in counted} for name, result in drafter["benchmarks"].items()
            }
            for stage, drafter in drafters.items()
        },
        "metrics": {
            stage: [(r["step"], r["loss"], r["grad_norm"]) for r in rows_of(workdir, stage)]
            for stage in ("supervise", "cst", "ppow")
        },
    }


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    """SIGKILL at ten random moments across the stages; KILL_SEED repeats a failure."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10_000))
    moments = plan(random.Random(seed))
    print(f"KILL_SEED={seed}: {moments}")
    cache, whole, killed = (tmp_path / name for name in ("cache", "whole", "killed"))
    calm = start(whole, cache)
    _, complaints = calm.communicate(timeout=600)
    assert calm.returncode == 0, complaints
    want = outcome(whole)
    assert set(want["parameters"]) == {"supervise", "cst", "ppow"}
    assert len(set(want["parameters"].values())) == 3
    for stage, last in LAST.items():
        assert progress(whole, stage) >= last, f"{stage} ends before the last moment of the plan"
    for stage, reached, delay in moments:
        process = start(killed, cache)
        while progress(killed, stage) < reached and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (stage, reached, complaints)
        print(f"killed in {stage} at {progress(killed, stage)}")
    last = start(killed, cache)
    _, complaints = last.communicate(timeout=600)
    assert last.returncode == 0, complaints
    assert outcome(killed) == want
