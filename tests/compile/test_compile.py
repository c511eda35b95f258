"""The steps of a config, and, where libtpu is, those steps compiled for a slice."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

import ppow_jax
from ppow_jax import config
from ppow_jax.compile import chips, report, steps, targets
from ppow_jax.compile.operations import operations
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.objectives.ppow import PPOW
from ppow_jax.parallel import partition
from ppow_jax.settings import OBJECTIVES, Settings, TargetSettings

ROOT = pathlib.Path(ppow_jax.__file__).parents[1]


@pytest.mark.slow
def test_shapes_of_the_papers_targets():
    """Their parameters, in billions, as their makers state them."""
    want = {
        "meta-llama/Llama-3.1-8B-Instruct": 8.03,
        "meta-llama/Llama-3.3-70B-Instruct": 70.55,
        "Qwen/Qwen3-8B": 8.19,
        "Qwen/Qwen3-32B": 32.76,
        "lmsys/vicuna-7b-v1.5": 6.74,
        "lmsys/vicuna-13b-v1.5": 13.02,
    }
    assert set(want) == set(targets.KNOWN)
    for path, billions in want.items():
        shape = targets.shape_of(TargetSettings(path, "bfloat16", ()))
        leaves = jax.tree.leaves(steps.target_shapes(shape))
        assert sum(x.size for x in leaves) / 1e9 == pytest.approx(billions, abs=0.006), path
        assert {x.dtype.name for x in leaves} == {"bfloat16"}


def test_a_target_without_a_known_shape_is_an_error():
    with pytest.raises(UserError, match="Qwen/Qwen3-8B"):
        targets.shape_of(TargetSettings("nobody/nothing", "bfloat16", ()))


def test_a_slice_of_no_known_kind_is_an_error():
    with pytest.raises(UserError, match=r"v7x:2x2.*v5p:2x2x4"):
        chips.slice_mesh("v7x:2x2", (-1, 1, 1))


def test_a_step_that_compiles_must_still_fit_beside_what_is_held():
    chip = chips.CHIPS["v5e"]
    rows = [{"step": name, "bytes": gib * 2**30} for name, gib in (("a", 15.9), ("b", 16.1), ("c", 16))]
    assert report.crowded(rows, chip) == ["b"]


HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_it_says_what_is_missing():
    with pytest.raises(UserError, match=r"compiler for TPUs is not installed.*ppow_jax\[tpu\]"):
        chips.slice_mesh("v5e:2x2", (-1, 1, 1))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu: `pip install 'jax[tpu]'` brings it")
def test_axes_of_a_mesh_may_split_those_of_a_slice():
    """fsdp takes one side of 4 chips, tensor and data share the other."""
    _, mesh = chips.slice_mesh("v6e:4x4", (-1, 4, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 2}


def describe(directory) -> str:
    """A Hugging Face directory without weights: a Llama of two hundred thousand parameters."""
    small = targets._LLAMA3 | targets._sizes(4, 128, 4, 256) | {"vocab_size": 512, "num_key_value_heads": 2}
    (directory / "config.json").write_text(json.dumps(small))
    return str(directory)


FLAGS = {
    "drafter.vocab_size": 256,
    "mesh.data": -1,
    "mesh.fsdp": 2,
    "respond.batch_size": 8,
    "respond.max_new_tokens": 32,
    "data.length": 64,
    "train.supervise.batch_size": 8,
    "train.supervise.window": 2,
    "train.ppow.batch_size": 8,
    "train.ppow.window": 3,
    "evaluate.max_new_tokens": 32,
    "target.dtype": "bfloat16",
    "target.taps": (0, 2, 4),
}


def small_config(directory):
    """`configs/base.py` with these changes."""
    chosen = importlib.import_module("ppow_jax.configs.base").get_config()
    for key, value in FLAGS.items():
        *path, name = key.split(".")
        section = chosen
        for part in path:
            section = section[part]
        section[name] = value
    chosen.target.path = describe(directory)
    return chosen


def test_what_a_slice_would_hold_and_the_steps_there_are(tmp_path):
    """Of each array its share, by hand, on a mesh that is described and not there."""
    chosen = config.from_config(small_config(tmp_path))
    mesh = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
    plan = steps.plan(chosen, targets.shape_of(chosen.target), mesh)
    tables, layers = 2 * 512 * 128, 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    norms = 9 * 128
    assert report._held(plan.params) == 2 * ((tables + layers) // 2 + norms)  # bfloat16, over fsdp
    texts = plan.batch(8)
    assert report._held(texts["taps"]) == 8 // 4 * 64 * 3 * 128 * 2
    assert report._held(plan.vocab) == 256 * 4  # whole
    memory = plan.memory(chosen.train["ppow"].method)  # ADAW's table, whole
    assert report._held(memory) == 2**16 * (64 + 1) * 4
    assert plan.memory(chosen.train["supervise"].method) == {}
    names = [name for name, _ in steps.groups(chosen)]
    assert names == ["respond", "supervise", "cst", "ppow", "decode"]


def traced_steps(chosen: Settings, *only: str) -> dict[str, steps.Step]:
    """Every step, or those of some groups, as it would be compiled, on a mesh of one device here."""
    mesh = partition.make_mesh((1, 1, 1), jax.devices()[:1])
    plan = steps.plan(chosen, targets.shape_of(chosen.target), mesh)
    found = {}
    with jax.set_mesh(mesh):
        for group in [group for name, group in steps.groups(chosen) if name in only or not only]:
            made, results = group(plan), None
            while (step := send(made, results)) is not None:
                found[step.name] = step
                results = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partition.replicated(mesh)),
                    step.traced.out_info,
                )
    return found


def send(generator, value):
    """What a generator yields next, or None at its end."""
    try:
        return generator.send(value)
    except StopIteration:
        return None


class Double(PPOW):
    """An objective of one's own."""

    def rounds(self, texts):
        return 7


def test_the_steps_of_whatever_runs_a_config_has(tmp_path):
    """Runs by other names, of other objectives, one of them from outside the package, and not all chosen."""
    given = small_config(tmp_path)
    given.train = {}
    small = dict(steps=3, batch_size=8, anchors=2, window=2)
    given.train.closed = config.training_run("expected", **small)
    given.train.not_this_one = config.training_run("supervised", **small)
    given.train.own = config.training_run("test_compile:Double", start="closed", group=3, **small)
    given.export.drafter = given.evaluate.control = ""
    given.runs = ("closed", "own")
    chosen = config.from_config(given)
    assert [name for name, _ in steps.groups(chosen)] == ["respond", "closed", "own", "decode"]
    found = traced_steps(chosen)
    assert list(found) == [
        "respond: prompts",
        "respond: tokens",
        "closed: signal",
        "closed: update",
        "own: signal",
        "own: update",
        "decode: prompt and a round",
    ]
    for half in ("signal", "update"):
        assert found[f"closed: {half}"].counted == ("windows", 8 * 2)
        assert found[f"own: {half}"].counted == ("windows", 8 * 2 * 3)
    assert set(found["closed: update"].held) == {"target", "learner", "batch", "signal"}
    assert set(found["own: update"].held) == {"target", "learner", "batch", "memory", "signal"}
    turns = {name: step.rounds for name, step in found.items() if step.rounds > 1}
    assert turns == {"respond: tokens": 64, "own: signal": 7}
    for name in ("closed: update", "own: signal", "own: update"):
        assert operations(found[name].traced.jaxpr) > 0
    table = found["own: signal"].held["memory"]
    assert {k: x.shape for k, x in table.items()} == {"scores": (2**16, 64), "scored_at": (2**16,)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_its_steps(tmp_path, objective):
    given = small_config(tmp_path)
    given.train = {"one": config.training_run(objective, steps=3, batch_size=8)}
    given.export.drafter = given.evaluate.control = ""
    found = traced_steps(config.from_config(given), "one")
    assert list(found) == ["one: signal", "one: update"]
    assert operations(found["one: update"].traced.jaxpr) > 0
    assert {step.counted[0] for step in found.values()} == {"windows"}


def test_turns_of_the_loop_that_scores_windows():
    """On a CPU 512 tokens at once: of 8 texts, groups of 8 windows of 10 tokens, one group; of 1, 7."""
    assert PPOW(anchors=4).rounds(8) == 4 * 8 // 8
    assert PPOW(anchors=7).rounds(1) == 1
    assert PPOW(anchors=4, proximity_weight=0.0).rounds(8) == 1
    assert PPOW(anchors=4, proximity_weight=0.0, temperature=1.0).rounds(8) == 4


def test_rows_of_every_batch_over_chips(tmp_path):
    chosen = steps.with_rows(config.from_config(small_config(tmp_path)), 24)
    assert chosen.respond.batch_size == 24
    assert {run.batch_size for run in chosen.train.values()} == {24}
    parts = small_config(tmp_path)
    parts.train.cst.accumulate = 4
    with pytest.raises(ConfigError, match=r"config.train.cst.accumulate: found 4, expected a divisor"):
        steps.with_rows(config.from_config(parts), 6)


def compile_for_a_slice(directory, *more: str) -> subprocess.CompletedProcess:
    """Runs the command for four chips of v5e."""
    command = [sys.executable, "-m", "ppow_jax.compile", "--config=configs/base.py", "--topology=v5e:2x2"]
    flags = FLAGS | {"target.path": describe(directory)}
    command += [*(f"--config.{key}={value}" for key, value in flags.items()), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu: `pip install 'jax[tpu]'` brings it")
def test_all_steps_compile_for_a_slice(tmp_path):
    out = tmp_path / "out.jsonl"
    done = compile_for_a_slice(tmp_path, f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["step"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == [
        "respond: prompts",
        "respond: tokens",
        "supervise: signal",
        "supervise: update",
        "cst: signal",
        "cst: update",
        "ppow: signal",
        "ppow: update",
        "decode: prompt and a round",
    ]
    for name in ("supervise: signal", "cst: signal"):  # anchors and the text along windows: no product
        row = rows.pop(name)
        assert row["operations"] == 0 and 0 < row["computing"] < 1e-3
        assert 0 < sum(row["held"].values()) < row["bytes"] < 2**30
    for row in rows.values():
        assert 0 < sum(row["held"].values()) < row["bytes"] < 2**30
        assert row["computing"] > 0 and row["operations"] > 0 and 0 < row["utilisation"] < 1
        assert row["chips"] == 4 and row["collectives"], row["step"]
    assert "utilisation" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="no libtpu: `pip install 'jax[tpu]'` brings it")
def test_a_step_that_does_not_fit_is_named_and_the_next_stage_compiled(tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--steps=respond,decode", "--config.respond.batch_size=2097152", f"--out={out}"]
    done = compile_for_a_slice(tmp_path, *flags)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "respond: prompts: more than a chip's memory" in done.stderr
    (kept,) = (json.loads(line)["step"] for line in out.read_text().splitlines())
    assert kept == "decode: prompt and a round"
