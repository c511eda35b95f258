"""Training and writing: floors and times of their parts."""

import time

import jax
import jax.numpy as jnp

from ppow_jax.bench import training_steps
from ppow_jax.bench.machine import Machine, Work, fresh_drafter, show, step_weights
from ppow_jax.data import builtin
from ppow_jax.decode import cost
from ppow_jax.decode.batch import decode_batch
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.shapes import chain
from ppow_jax.drafters.eagle3 import weights_of
from ppow_jax.experiment import Experiment
from ppow_jax.stages import respond


def parts(experiment: Experiment, machine: Machine) -> None:
    """Floors and times of a target step, verifications, a drafter step and the phases of training steps."""
    work, trained = Work(experiment.target.config), fresh_drafter(experiment)
    target, params = experiment.target, experiment.target_params
    rows = []

    def row(name: str, operations: float, bytes_: float, seconds: float) -> None:
        floor = machine.floor(operations, bytes_)
        cells = (operations / 1e9, bytes_ / 1e6, floor * 1e3, seconds * 1e3)
        rows.append([name, *(f"{c:,.1f}" for c in cells), f"{floor / seconds:.0%}"])

    for tokens in (1, 2, 4, 8, 11, 16, 32):
        seconds = cost.typical(cost.target_timer(target, params, tokens))
        row(f"target, {tokens} token{'s' * (tokens > 1)}", *work.target(tokens), seconds)
    weights = weights_of(trained.params, params, jnp.asarray(trained.vocab))
    seconds = cost.typical(cost.draft_timer(target, Eagle(trained.drafter, chain(10)), weights)) / 10
    read = step_weights(trained.params)
    row("drafter step", 2.0 * read, 4.0 * read, seconds)
    for name, settings in training_steps.kinds(experiment.settings).items():
        for phase, (operations, seconds) in training_steps.phases(experiment, settings, trained).items():
            row(f"{name}: {phase}", operations, 0.0, seconds)
    columns = ["part", "operations (1e9)", "bytes (1e6)", "floor (ms)", "measured (ms)", "of the floor"]
    show("batch 1; training: one step at the config's sizes", columns, rows)


def batch_writing(experiment: Experiment, machine: Machine, size: int, tokens: int, repeats: int) -> None:
    """Useful operations a second of `respond`: tokens of prompts and answers, no padding counted.

    The rate of matrix products beside it is the mean of one measured just before and one just after.
    """
    work, size = Work(experiment.target.config), size or experiment.settings.respond.batch_size
    prompts = [p for kind in builtin.KINDS for p in builtin.generate(kind, "train")[: 4 * size]]
    selection = respond.select(experiment, prompts, tokens)
    if not selection.prompts:
        raise selection.refusal("--tokens")
    batches = respond.batches_of(selection.prompts, selection.lengths, size, tokens)
    middle = batches[len(batches) // 2]  # of twelve
    prompt_BxP, length_B = respond.pad(
        [experiment.tokenizer.first_turn(p.turns[0], p.system) for p in middle], size
    )
    keys_B = jax.random.split(jax.random.key(0), size)
    stops = experiment.tokenizer.stop_ids
    config = DecodeConfig(tokens, stops)
    inputs = (
        experiment.target,
        experiment.target_params,
        prompt_BxP,
        length_B,
        keys_B,
        config,
        experiment.mesh,
    )
    out, _ = decode_batch(*inputs)  # compilation, and the first touch of all memory
    rows = []
    for _ in range(repeats):
        before, began = machine.matrix_rate(), time.perf_counter()
        decode_batch(*inputs)
        seconds = time.perf_counter() - began
        best = (before + machine.matrix_rate()) / 2
        rate = work.writing(length_B, out.emitted) / seconds
        cells = (out.emitted.sum() / seconds, rate / 1e9, best / 1e9)
        rows.append([str(size), *(f"{c:.0f}" for c in cells), f"{rate / best:.0%}"])
    columns = ["batch", "tokens/s", "useful operations/s (1e9)", "matrix products (1e9/s)", "share"]
    show("respond", columns, rows)
