"""Training and writing: floors and times of their parts."""

import time

import jax
import jax.numpy as jnp

from ppow_jax import teacher
from ppow_jax.bench.machine import Machine, Work, fresh_drafter, show
from ppow_jax.data import builtin
from ppow_jax.decode import cost
from ppow_jax.decode.batch import decode_batch
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.shapes import chain
from ppow_jax.experiment import Experiment
from ppow_jax.stages import ppow, respond, training


def parts(run: Experiment, machine: Machine) -> None:
    """Floors and times of a target step, verifications, a drafter step and a PPOW step."""
    work, (drafter, weights, state) = Work(run), fresh_drafter(run)
    rows = []

    def row(name: str, operations: float, bytes_: float, seconds: float) -> None:
        floor = machine.floor(operations, bytes_)
        cells = (operations / 1e9, bytes_ / 1e6, floor * 1e3, seconds * 1e3)
        rows.append([name, *(f"{c:,.1f}" for c in cells), f"{floor / seconds:.0%}"])

    for tokens in (1, 2, 4, 8, 11, 16, 32):
        seconds = cost.typical(cost.target_timer(run.target, run.target_params, tokens))
        row(f"target, {tokens} token{'s' * (tokens > 1)}", *work.target(tokens), seconds)
    seconds = cost.typical(cost.draft_timer(run.target, Eagle(drafter, chain(10)), weights)) / 10
    row("drafter step", 2.0 * work.step, 4.0 * work.step, seconds)
    for name, (operations, seconds) in _ppow_phases(run, work, state).items():
        row(f"PPOW {name}", operations, 0.0, seconds)
    columns = ["part", "operations (1e9)", "bytes (1e6)", "floor (ms)", "measured (ms)", "of the floor"]
    show("batch 1; PPOW: one step at the config's sizes", columns, rows)


def _ppow_phases(run: Experiment, work: Work, state: training.State) -> dict[str, tuple[float, float]]:
    """Operations and seconds of the phases of the third PPOW step, on texts of random ids."""
    s, T = run.settings.ppow, run.settings.data.length
    tokens = jax.random.randint(jax.random.key(0), (s.batch_size, T), 0, 8192)
    batch = {"tokens": tokens, "assistant": jnp.ones(tokens.shape, bool), "index": jnp.arange(s.batch_size)}
    lesson = jax.jit(teacher.lesson_of, static_argnums=0)(run.target, run.target_params, batch)
    batch |= {"taps": lesson.taps, "hidden": lesson.hidden}
    optimizer = training.make_optimizer(s.optimizer, s.steps)
    state = state | ppow.blank_scores(run, s.batch_size)
    step = ppow.stepper(run, optimizer, 0.12)
    for number in range(1, 4):
        began = time.perf_counter()
        state, metrics = step(number, state, batch)
        seconds = time.perf_counter() - began
    operations = work.ppow(s, T, float(metrics["share_refused"]))
    return {name: (operations[name], seconds * float(metrics[f"share_{name}"])) for name in operations}


def batch_writing(run: Experiment, machine: Machine, size: int, tokens: int, repeats: int) -> None:
    """Useful operations a second of `respond`: tokens of prompts and answers, no padding counted.

    The rate of matrix products beside it is the mean of one measured just before and one just after.
    """
    work, size = Work(run), size or run.settings.respond.batch_size
    prompts = [p for kind in builtin.KINDS for p in builtin.generate(kind, "train")[: 4 * size]]
    batches = respond.batches_of(prompts, respond.lengths_of(run, prompts, tokens), size, tokens)
    middle = batches[len(batches) // 2]  # of twelve
    prompt_BxP, length_B = respond.pad([run.tokenizer.first_turn(p.turns[0]) for p in middle], size)
    keys_B = jax.random.split(jax.random.key(0), size)
    stops = run.tokenizer.stop_ids
    config = DecodeConfig(tokens, stops)
    inputs = (run.target, run.target_params, prompt_BxP, length_B, keys_B, config, run.mesh)
    out, _ = decode_batch(*inputs)  # compilation, and the first touch of all memory
    rows = []
    for _ in range(repeats):
        before, began = machine.matrix_rate(), time.perf_counter()
        decode_batch(*inputs)
        seconds = time.perf_counter() - began
        best = (before + machine.matrix_rate()) / 2
        rate = work.writing(length_B, out.count) / seconds
        cells = (out.count.sum() / seconds, rate / 1e9, best / 1e9)
        rows.append([str(size), *(f"{c:.0f}" for c in cells), f"{rate / best:.0%}"])
    columns = ["batch", "tokens/s", "useful operations/s (1e9)", "matrix products (1e9/s)", "share"]
    show("respond", columns, rows)
