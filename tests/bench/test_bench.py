"""The commands that set decoders against each other, on the Markov target: what they print is so."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from ppow_jax import experiment
from ppow_jax.bench import decoding, machine, parting, stages, training_steps
from ppow_jax.bench.machine import Machine
from ppow_jax.decode import cost, shapes
from ppow_jax.decode.cost import Costs
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.session import Session
from ppow_jax.errors import UserError
from ppow_jax.objectives.supervised import Supervised

SOURCES = "maths=builtin:maths/eval[:3],chat=builtin:chat/eval[:3]"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """An experiment with trained drafters, in a workdir of its own; costs are given."""
    shutil.copytree(finished.workdir, tmp_path / "workdir")
    flat = Costs(1.0, {n: 1.0 for n in cost._SIZES}, 0.1, {1: 0.1, 2: 0.1, 4: 0.1, 10: 0.1}, {1: 0.0})
    monkeypatch.setattr(cost, "measure", lambda *_: flat)
    return runs.build(tmp_path / "workdir")


@pytest.mark.slow
def test_all_decoders_write_the_same_texts(run, capsys, monkeypatch):
    """A pass over n tokens takes 10 + n seconds here, one in turn with drafting 3 more."""
    monkeypatch.setattr(cost, "target_timer", lambda *about: lambda: 10.0 + about[2])
    monkeypatch.setattr(cost, "parts_timer", lambda *about: lambda: 13.0 + about[2].tokens)
    race = decoding.Race(SOURCES, 2, 24, ("chain:2", "auto", "lookahead", "chain:2+lookup:2"), "")
    decoding.race(run, "cst", race)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    names = ("autoregressive", *race.decoders)
    for name in names:
        assert any(row.startswith(f"│ {name}") for row in rows), name
    same = [re.search(r" (\d+)/(\d+) ", row) for row in rows]
    assert [m[1] == m[2] != "0" for m in same if m] == [True] * len(names)
    assert "drafter of cst" in out
    chain = next(row for row in rows if row.startswith("│ chain:2 "))
    assert f"{13 / 11:.2f} + {3 / 11:.2f}" in chain


@pytest.mark.slow
def test_costs_and_shapes_are_listed(run, capsys):
    decoding.costs(run, "")
    out = capsys.readouterr().out
    assert "target pass, 16 tokens" in out and "predicted speedup" in out
    found = [
        line.split("│")[1].strip() for line in out.splitlines() if line.startswith(("│ chain:", "│ tree:"))
    ]
    assert len(found) == 12 and all(shapes.parse(name) for name in found)


def test_a_drafter_that_the_workdir_lacks_is_named(run):
    with pytest.raises(UserError, match="--run: found 'ppow', expected one of supervise, cst"):
        decoding.costs(run, "ppow")


@pytest.mark.parametrize("name", ["lookup:0", "chain:2+lookup:2+lookahead", "beam:3"])
def test_decoders_that_there_are_not_are_named(run, name):
    with pytest.raises(UserError, match="--decoders: found"):
        decoding.sessions(run, "", (name,), 8)


@pytest.mark.slow
def test_in_float32_no_text_parts(run, capsys):
    decoders = decoding.sessions(run, "cst", ("tree:4x2x2",), 24)
    parting.compare(run, decoders, 2, SOURCES, 2, 24)
    out = capsys.readouterr().out
    assert "5 turns of at most 24 tokens in float32" in out  # one of the four has two
    assert out.count(" 0/5 ") == 2 * len(decoders) + 1


def test_a_text_that_parts_is_found_with_the_logits_that_decided(run, chain, capsys):
    """A decoder of another chain: it parts where the two chains' likeliest letters differ first."""
    other = small.markov_chain(seed=1)
    probs, strange = chain.probs, Session(other.target, other.params, DecodeConfig(24, (1,)))
    context, best = [3, 9], probs.argmax(-1)
    text = small.walk(9, 24)
    drifted = np.asarray(strange([context]).tokens)[0].tolist()
    at = next(i for i in range(24) if text[i] != drifted[i])
    found = parting.parting(chain.target, chain.params, context, text, drifted)
    before = [9, *text][at]
    assert found.position == at
    assert found.gap == pytest.approx(np.log(probs[before].max() / probs[before, drifted[at]]), rel=1e-4)
    assert best[before] == text[at]
    half = dataclasses.replace(chain.target.config, dtype="bfloat16")
    coarse = parting.parting(type(chain.target)(half), chain.params, context, text, drifted)
    assert coarse.rounding == pytest.approx(found.rounding * 2**16)


def test_an_exact_target_computes_in_float32(finished, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "workdir")
    half = runs.build(tmp_path / "workdir", target__dtype="bfloat16")
    whole = experiment.exact(half)
    assert whole.target_params["head"]["weight"].dtype == "bfloat16"
    tokens = np.array([[3, 5, 9, 7]], np.int32)
    coarse, fine = (small.forward(x.target, half.target_params, tokens)[1] for x in (half, whole))
    rounded = lambda x: (np.asarray(x) == np.asarray(x.astype("bfloat16").astype("float32"))).all()  # noqa: E731
    assert rounded(coarse) and not rounded(fine)


PARTS = dict(train__ppow__proximity_weight=0.5, train__ppow__anchor_rule__warmup_steps=0)


@pytest.mark.slow
def test_every_kind_of_training_step_is_taken_apart(tmp_path, monkeypatch, capsys):
    """Of supervise and cst, whose steps do the same work, the first; and what PPOW's signal is made of."""
    for timer in ("target_timer", "draft_timer"):
        monkeypatch.setattr(cost, timer, lambda *about: lambda: 0.01)
    monkeypatch.setattr(cost, "median_seconds", lambda call, repeats: call() and 0.01)
    monkeypatch.setattr(Machine, "__init__", lambda self: None)
    monkeypatch.setattr(Machine, "floor", lambda self, operations, bytes_: operations / 1e9)
    made = runs.build(tmp_path / "w", runs=(), **PARTS)
    stages.parts(made, Machine())
    out = capsys.readouterr().out
    names = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert names[:1] == ["target, 1 token"] and names[7:] == [
        "drafter step",
        "supervise: signal",
        "supervise: update",
        "ppow: signal",
        "ppow: rollout",
        "ppow: verification",
        "ppow: update",
    ]


@dataclasses.dataclass(frozen=True)
class Counting(Supervised):
    """Its memory counts signals."""

    def init(self, sizes, params):
        return {"signals": jnp.zeros(())}

    def signal(self, models, batch, outputs, memory, *about):
        made, _, metrics = super().signal(models, batch, outputs, {}, *about)
        return made, {"signals": memory["signals"] + 1}, metrics


def test_the_memory_of_an_objective_goes_on_from_signal_to_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "median_seconds", lambda call, repeats: [call() for _ in range(3)] and 0.01)
    made = runs.build(tmp_path / "w", runs=("supervise",))
    run = dataclasses.replace(made.settings.train["supervise"], method=Counting(anchors=2, window=2))
    found = training_steps.phases(made, run, machine.fresh_drafter(made))
    assert set(found) == {"signal", "update"}


def test_operations_of_a_ppow_signal(tmp_path, monkeypatch):
    """By hand, of the rollout: B = 4 texts of T = 32, A = 2, G = 2, K = 3; a group shares its first step."""
    monkeypatch.setattr(cost, "median_seconds", lambda call, repeats: 0.01)
    made = runs.build(tmp_path / "w", runs=("ppow",), **PARTS)
    trained = machine.fresh_drafter(made)
    found = training_steps.phases(made, made.settings.train["ppow"], trained)
    c, step = trained.drafter.config, machine.step_weights(trained.params)
    keys_values = 2 * c.kv_heads * c.head_size * 2 * c.width
    texts = 4 * 32 * (c.taps_width * c.width + keys_values)
    windows = 8 * (step - keys_values) + (16 + 16) * step  # an anchor's are the text's
    attention = 2 * c.heads * c.head_size * (8 * 32 + 16 * (32 + 1) + 16 * (32 + 2))
    assert found["rollout"][0] == 2 * (texts + windows + attention)
    assert found["signal"][0] == found["rollout"][0] + found["verification"][0]
    assert found["verification"][0] > 0


def bench(directory, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the command in a directory."""
    command = [sys.executable, "-m", "ppow_jax.bench", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)


def test_it_needs_no_checkout(tmp_path):
    done = bench(tmp_path, "load", "--config=tiny", "--target=markov:0")
    assert done.returncode == 0, done.stderr
    assert "markov:0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cost",), "cost: found no --workdir, expected one of a run with a trained drafter"),
        (
            ("parts", "--workdir=."),
            "--workdir: found no run in '.', expected a workdir (with the config.json of a run)",
        ),
        (
            ("race",),
            "found 'race', expected one of load, serve, parts, train, respond, cost, decode, parting, "
            "llamacpp; see --help",
        ),
        (("serve",), "serve: found no --url, expected http://HOST:PORT of a server"),
        (
            ("serve", "--url=localhost:8080"),
            "--url: found 'localhost:8080', expected http://HOST:PORT of a server",
        ),
    ],
)
def test_what_a_command_lacks_is_named(tmp_path, arguments, message):
    done = bench(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (2, f"ppow_jax: {message}\n")


def test_a_workdir_has_a_config_of_its_own(finished, tmp_path):
    done = bench(tmp_path, "load", f"--workdir={finished.workdir}", "--target=markov:1")
    assert done.returncode == 2 and "found --workdir beside --config or --target" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("llamacpp", "--depths="), "--depths: found [], expected 1 or more lengths of chains"),
        (("cost", "--engine=llamacpp", "--depths=2"), "found ['2'], expected 2 or more lengths of chains"),
        (("llamacpp", "--threads=0"), "--threads: found '0', expected whole numbers from 1"),
        (("llamacpp", "--target_types="), "--target_types: found [], expected some of stored, float32"),
        (
            ("llamacpp", "--drafter_types=stored"),
            "--drafter_types: found ['stored'], expected some of float32",
        ),
        (("llamacpp",), "llamacpp: found the target 'markov:0', expected a GGUF file"),
    ],
)
def test_what_llama_cpp_cannot_run_is_said_before_anything_is_loaded(finished, tmp_path, arguments, said):
    done = bench(tmp_path, *arguments, f"--workdir={finished.workdir}")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
