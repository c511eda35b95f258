"""Run by test_partition on simulated devices: one step of each kind on several meshes, kept in a .npz.

The states that the steps start from come from a few steps on one device: with a fresh Adam, a gradient that
is rounding noise moves its parameter as far as any other.
"""

import pathlib
import sys
import tempfile
import types

import golden_families
import jax
import numpy as np
import small
from jax.sharding import Mesh

from ppow_jax import config
from ppow_jax.decode import batch as large_batches
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.experiment import Experiment
from ppow_jax.models.target import Target
from ppow_jax.objectives.base import Sizes
from ppow_jax.parallel import partition
from ppow_jax.targets import huggingface
from ppow_jax.training import drafters, loop
from ppow_jax.training.step import Recipe, Step, make_step

AXES = {"data": (8, 1, 1), "all": (2, 2, 2)}
MESHES = {"supervise": ("data", "all"), "greedy": ("all",), "sampled": ("all",)}
B, T, PROMPT = 8, 32, 4
FAMILIES = ("llama2", "qwen2", "gemma3")
CALM = 6  # steps before the one that is compared
SIZES = Sizes(B, T)


def main(path: str) -> None:
    """Writes parameters, metrics and layouts after one step of each kind on each mesh."""
    params = small.tiny_pair().params
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), partition.AXES)
    batch = texts()
    found = {}
    trained: dict = {}
    for kind in MESHES:
        alone = experiment(one, params)
        recipe, state = begin(alone, kind)
        step = stepper(alone, recipe, kind)
        state = host(walk(alone, step, state | trained, batch, range(1, 1 + CALM))[0])
        trained |= {} if trained else {k: state[k] for k in ("params", "opt_state", "vocab")}
        found |= record(f"one/{kind}", alone, step, state, batch)
        for name in MESHES[kind]:
            many = experiment(partition.make_mesh(AXES[name]), params)
            step = stepper(many, begin(many, kind)[0], kind)
            found |= record(f"{name}/{kind}", many, step, state, batch)
    found |= cached(params)
    for family in FAMILIES:
        found |= loaded(family)
    np.savez(path, **found)


def cached(params: dict) -> dict[str, np.ndarray]:
    """Of a layer's values after prompts that are read in parts, and when half of the rows have left: the
    shape of all, and of a device's share."""
    run = experiment(partition.make_mesh(AXES["all"]), params)
    large_batches._READ = {"default": PROMPT}  # a part is one row a device
    prompts, lengths = np.ones((B, PROMPT), np.int32), np.full(B, PROMPT, np.int32)
    rows = partition.shard_batch((prompts, lengths, jax.random.split(jax.random.key(0), B)), run.mesh)
    config = DecodeConfig(T - PROMPT, (-1,))
    with jax.set_mesh(run.mesh):
        out = large_batches._prefill(run.target, run.target_params, *rows, config, "", run.mesh, None, None)
        before = shape_and_share(out[0])
        slots = before[0][2] + 4
        after = shape_and_share(large_batches._regroup(out[0], np.arange(0, B, 2), slots, run.mesh, None))
    return {"cache": np.array([before, after])}


def shape_and_share(state) -> tuple[tuple[int, ...], tuple[int, ...]]:
    values = state.cache[1].values
    return values.shape, values.addressable_shards[0].data.shape


def loaded(family: str) -> dict[str, np.ndarray]:
    """A family's directory read onto all axes: its logits on the golden text, and the layout."""
    mesh = partition.make_mesh(AXES["all"])
    with tempfile.TemporaryDirectory() as scratch:
        directory = golden_families.write(pathlib.Path(scratch), family, shards=3)
        config, params = huggingface.load(directory, "float32", mesh)
    _, logits_1xTxV = jax.jit(small.forward, static_argnums=0)(Target(config), params, golden_families.TEXT)
    prefix = f"loaded/{family}"
    return {f"{prefix}/logits": np.asarray(logits_1xTxV)[0]} | layout(prefix, params, mesh)


def layout(prefix: str, tree: dict, mesh: Mesh) -> dict[str, np.ndarray]:
    """Which leaves do not lie as the table says, and how many lie in parts."""
    strays, split = [], 0
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(partition.shardings(tree, mesh)), strict=True):
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            strays.append(f"{partition.path_name(path)} {leaf.sharding}")
        split += leaf.addressable_shards[0].data.size < leaf.size
    return {f"{prefix}/strays": np.array(strays), f"{prefix}/split": np.array(split)}


def texts() -> dict[str, np.ndarray]:
    """Greedy texts of the tiny target; one is short and two are padded."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(small.TINY.vocab_size, size=(B, PROMPT))
    decoding = DecodeConfig(T - PROMPT, (-1,))
    out = small.generate(small.tiny_pair(), prompts.tolist(), decoding, padded=PROMPT)
    tokens = np.concatenate([prompts, out.tokens], 1).astype(np.int32)
    lengths = np.full(B, T)
    lengths[:3] = PROMPT + 3, 20, 27
    inside = np.arange(T) < lengths[:, None]
    assistant = inside & (np.arange(T) >= PROMPT)
    return {
        "index": np.arange(B, dtype=np.int32)[::-1].copy(),
        "tokens": np.where(inside, tokens, 0),
        "assistant": assistant,
    }


def experiment(mesh: Mesh, params: dict) -> Experiment:
    """The tiny target on the mesh, with a run of each kind."""
    c = config.defaults()
    c.drafter.vocab_size, c.drafter.mlp_hidden = len(small.DRAFT_VOCAB), 40
    about = {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.01}}
    c.train.supervise = config.training_run("supervised", anchors=12, window=2, steps=40, **about)
    about |= {"anchors": 6, "window": 3, "steps": 20, "anchor_rule": {"warmup_steps": 0}}
    c.train.greedy = config.training_run("ppow", temperature=0.0, **about)
    c.train.sampled = config.training_run("ppow", temperature=1.0, **about)
    tokenizer = types.SimpleNamespace(stop_ids=(1,))
    target = small.tiny_pair().target
    return Experiment(
        config.from_config(c),
        pathlib.Path("unused"),
        mesh,
        target,
        partition.shard(params, mesh),
        tokenizer,
        "tiny",
    )


def begin(run: Experiment, kind: str) -> tuple[Recipe, dict]:
    """What a run's steps are made of, and its state before the first."""
    settings, fresh = run.settings.train[kind], drafters.fresh(run, small.DRAFT_VOCAB, None)
    recipe = loop.recipe(run, settings, fresh.drafter, settings.steps, 0.12)
    return recipe, loop.place(run, recipe, fresh.params, fresh.vocab, SIZES)


def stepper(run: Experiment, recipe: Recipe, kind: str) -> Step:
    """The real step of a run."""
    return make_step(recipe, run.target_params, run.key(kind))


def walk(run: Experiment, step: Step, state: dict, batch: dict, numbers) -> tuple[dict, dict]:
    """Some steps from a state on the host; the state after them and the last metrics."""
    state = lay_out(run, state)
    batch = partition.shard_batch(batch, run.mesh)
    with jax.set_mesh(run.mesh):  # as a run does
        for number in numbers:
            state, metrics = step(number, state, batch)
    return state, metrics


def lay_out(run: Experiment, state: dict) -> dict:
    """Parameters and optimiser by the table, the rest on every device."""
    table = ("params", "opt_state")
    rest = {k: v for k, v in state.items() if k not in table}
    placed = {k: partition.shard(state[k], run.mesh) for k in table}
    return placed | jax.device_put(rest, partition.replicated(run.mesh))


def host(state: dict) -> dict:
    """A state as NumPy arrays."""
    return jax.tree.map(np.asarray, state)


def record(prefix: str, run: Experiment, step: Step, state: dict, batch: dict) -> dict[str, np.ndarray]:
    """One more step from a state: what comes of it, and which leaves do not lie as the table says."""
    after, metrics = walk(run, step, state, batch, [1 + CALM])
    found = {f"{prefix}/metrics/{k}": np.asarray(v) for k, v in metrics.items()}
    learned = {part: after[part] for part in ("params", "opt_state")}
    old = dict(jax.tree_util.tree_leaves_with_path({part: state[part] for part in learned}))
    for path, leaf in jax.tree_util.tree_leaves_with_path(learned):
        name = f"{prefix}/{partition.path_name(path)}"
        found[name] = np.asarray(leaf)
        found[f"{name}#before"] = old[path]
    return found | layout(prefix, learned, run.mesh)


if __name__ == "__main__":
    main(sys.argv[1])
