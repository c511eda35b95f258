"""Benchmarks: what things cost, beside what the machine could do at best.

  python -m ppow_jax.bench parts      a target step, a verification, a drafter step, the phases of training
  python -m ppow_jax.bench train      a training step in parts, and beside those of other trainers
  python -m ppow_jax.bench load       reading a target: time, and host memory beyond the arrays themselves
  python -m ppow_jax.bench respond    batched writing against the matrix-product rate
  python -m ppow_jax.bench cost       what decoding is made of, and the shapes of drafts that it favours;
                                      --engine=llamacpp: there, with the chains that pay
  python -m ppow_jax.bench decode     decoders against each other and against what their parts would allow
  python -m ppow_jax.bench parting    where drafted and batched texts part from autoregressive ones
  python -m ppow_jax.bench llamacpp   a drafter in llama.cpp beside the same drafter here
  python -m ppow_jax.bench serve      a running server (--url): tokens/s, with and without drafter, and the
                                      acceptance that it reports; needs neither a target nor a workdir

`cost`, `decode`, `parting` and `llamacpp` want a trained drafter: --workdir=DIR of a run. The others take the
config of a workdir, a config (--config=NAME or a file [--config.KEY=VALUE ...]), or else all keys' defaults
with a run of `supervised` and one of `ppow`. Floors: operations over the float32 matrix-product rate, or
bytes that must be read over the memory's rate, whichever is longer; both rates are measured in the same run.
What the figures mean: docs/performance.md.
"""

import dataclasses
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Iterator

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # before the imports below, which take a second or two

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from ppow_jax import config, experiment
from ppow_jax.bench import decoding, loading, parting, serve, stages, trainers
from ppow_jax.bench.llamacpp import compare, server
from ppow_jax.bench.llamacpp import cost as there
from ppow_jax.bench.llamacpp.server import STORED
from ppow_jax.bench.machine import Machine
from ppow_jax.errors import ConfigError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import console, files
from ppow_jax.report.measure import Candidate
from ppow_jax.settings import Settings
from ppow_jax.stages import evaluate
from ppow_jax.targets import gguf_files

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Where there is no --workdir: the name of a ready-made config, or a file."
)
_TARGET = flags.DEFINE_string("target", "", "As config.target.path, in its place, where no --workdir is.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Of a run, whose drafter `cost` and `decode` use.")
_RUN = flags.DEFINE_string(
    "run",
    "",
    "Which drafter of the workdir, by its training run; empty: the last. With llama.cpp several, as A,B.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    "maths=builtin:maths/eval,code=builtin:code/eval,chat=builtin:chat/eval",
    "As config.evaluate.prompts.",
)
_COUNT = flags.DEFINE_integer("count", 4, "Prompts of each source that are decoded.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens that are written at most.", lower_bound=2)
_DECODERS = flags.DEFINE_string(
    "decoders",
    "chain:3 tree:16x4x4 tree:60x8x10 auto lookup:3 lookahead chain:3+lookup:3",
    "Of `decode` and `parting`: shapes as in config.decode.shape, lookup:K, lookahead, or two with a +.",
)
_TORCH = flags.DEFINE_string(
    "torch_python",
    "",
    "A Python with torch: for `decode` with transformers, accelerate and gguf too (empty: this one, if it "
    "has them), for `train` with speculators and specforge.",
)
_SPECJAX = flags.DEFINE_string("specjax", "", "A checkout of SpecJAX, for `train`.")
_TURNS = flags.DEFINE_integer("turns", 9, "Steps that each trainer of `train` takes.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the target; empty: the config's.")
_EXACT = flags.DEFINE_bool("exact", False, "As config.decode.exact, for `decode` and `parting`.")
_ENGINE = flags.DEFINE_enum("engine", "ours", ["ours", "llamacpp"], "Whose rounds `cost` measures.")
_DEPTHS = flags.DEFINE_list("depths", ["1", "2", "3", "4", "6"], "Tokens that llama.cpp drafts a round.")
_TARGETS = flags.DEFINE_list(
    "target_types",
    ["float32"],
    f"How llama.cpp's target is stored, each in turn: {', '.join((STORED, *gguf_files.TYPES))}; {STORED} is "
    "the file as it is.",
)
_DRAFTERS = flags.DEFINE_list(
    "drafter_types", ["float32"], "How llama.cpp's drafter is stored, as --target_types."
)
_THREADS = flags.DEFINE_list("threads", [], "Of llama.cpp, each in turn; empty: as many as cores.")
_URL = flags.DEFINE_string("url", "", "http://HOST:PORT of the server that `serve` measures.")
_PLAIN_URL = flags.DEFINE_string("plain_url", "", "For `serve`: the same server without drafter, if any.")
_TIMEOUT = flags.DEFINE_float(
    "timeout", 300.0, "Seconds that a server of `serve` may be silent.", lower_bound=0.1
)
_ROWS = flags.DEFINE_integer("rows", 8, "Prompts that `parting` decodes side by side.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 0, "Prompts of `respond`; 0: the config's default.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Batches that `respond` times, a row each.", lower_bound=1)


def _parts(made: Experiment, machine: Machine) -> None:
    stages.parts(made, machine)


def _train(made: Experiment, machine: Machine) -> None:
    trainers.compare(made, machine, _TORCH.value, _SPECJAX.value, _TURNS.value)


def _respond(made: Experiment, machine: Machine) -> None:
    stages.batch_writing(made, machine, _BATCH.value, _TOKENS.value, _REPEATS.value)


def _cost(made: Experiment, machine: Machine) -> None:
    if _ENGINE.value == "llamacpp":
        _cost_there(made)
    else:
        decoding.costs(made, _RUN.value)


def _decode(made: Experiment, machine: Machine) -> None:
    race = decoding.Race(
        _PROMPTS.value, _COUNT.value, _TOKENS.value, tuple(_DECODERS.value.split()), _TORCH.value
    )
    decoding.race(made, _RUN.value, race)


def _parting(made: Experiment, machine: Machine) -> None:
    decoders = decoding.sessions(made, _RUN.value, tuple(_DECODERS.value.split()), _TOKENS.value)
    parting.compare(made, decoders, _ROWS.value, _PROMPTS.value, _COUNT.value, _TOKENS.value)


def _llamacpp(made: Experiment, machine: Machine) -> None:
    depths = _numbers("depths", _DEPTHS.value)
    asked = server.questions(made, _PROMPTS.value, _COUNT.value)
    for candidate, engine in _engines(made):
        compare.compare(made, candidate, engine, asked, _TOKENS.value, depths)


def _cost_there(made: Experiment) -> None:
    depths = _numbers("depths", _DEPTHS.value)
    asked = server.questions(made, _PROMPTS.value, _COUNT.value)
    held_out = evaluate.held_out(made)
    for candidate, engine in _engines(made):
        there.costs(candidate, engine, held_out, asked, _TOKENS.value, depths)


def _engines(made: Experiment) -> Iterator[tuple[Candidate, server.Engine]]:
    """llama.cpp with each drafter, as it is stored, each target, and each number of threads."""
    threads = _numbers("threads", _THREADS.value) or [decoding.cores()]
    with tempfile.TemporaryDirectory() as directory:
        for run, target, drafter, number in itertools.product(
            _RUN.value.split(","), _TARGETS.value, _DRAFTERS.value, threads
        ):
            candidate = evaluate.find_candidate(made, run)
            yield (
                candidate,
                server.prepare(made, candidate, pathlib.Path(directory), (target, drafter), number),
            )


def _check_there(command: str, settings: Settings) -> None:
    """What runs in llama.cpp can run, and its flags name something.

    Raises:
      UserError: naming the flag, or what is missing.
    """
    least = 2 if command == "cost" else 1
    if len(set(_numbers("depths", _DEPTHS.value))) < least:
        raise ConfigError(f"--depths: found {_DEPTHS.value}, expected {least} or more lengths of chains")
    _numbers("threads", _THREADS.value)
    for name, given, allowed in (
        ("target_types", _TARGETS.value, (STORED, *gguf_files.TYPES)),
        ("drafter_types", _DRAFTERS.value, tuple(gguf_files.TYPES)),
    ):
        if not given or not set(given) <= set(allowed):
            raise ConfigError(f"--{name}: found {given}, expected some of {', '.join(allowed)}")
    if not gguf_files.named(settings.target.path):
        raise ConfigError(
            f"{command}: found the target {settings.target.path!r}, expected a GGUF file, which is what "
            "llama.cpp reads; train a drafter for the same model as a GGUF file"
        )
    server.require_installed()


def _numbers(name: str, given: list[str]) -> list[int]:
    wrong = [number for number in given if not number.isdecimal() or not int(number)]
    if wrong:
        raise ConfigError(f"--{name}: found {wrong[0]!r}, expected whole numbers from 1, such as 1,2,3")
    return [int(number) for number in given]


COMMANDS = {
    "parts": _parts,
    "train": _train,
    "respond": _respond,
    "cost": _cost,
    "decode": _decode,
    "parting": _parting,
    "llamacpp": _llamacpp,
}


def _settings(command: str) -> Settings:
    """Those of the workdir, of the config file, or the defaults."""
    if _WORKDIR.value:
        if _CONFIG.value is not None or _TARGET.value:
            raise ConfigError(
                "found --workdir beside --config or --target, expected one: it has its own config"
            )
        settings = experiment.read_settings(files.path_of(_WORKDIR.value))
    elif command in ("cost", "decode", "parting", "llamacpp"):
        raise ConfigError(f"{command}: found no --workdir, expected one of a run with a trained drafter")
    else:
        settings = config.from_config(_default() if _CONFIG.value is None else _CONFIG.value)
    path, dtype = _TARGET.value or settings.target.path, _DTYPE.value or settings.target.dtype
    target = dataclasses.replace(settings.target, path=path, dtype=dtype)
    return dataclasses.replace(settings, target=target)


def _serve() -> None:
    if not _URL.value:
        raise ConfigError("serve: found no --url, expected http://HOST:PORT of a server")
    serve.serve(_URL.value, _PLAIN_URL.value, _PROMPTS.value, _COUNT.value, _TOKENS.value, _TIMEOUT.value)


def _default() -> ConfigDict:
    """All keys' defaults, and the two kinds of training that `parts` takes apart."""
    chosen = config.defaults()
    chosen.train.supervise = config.training_run("supervised", steps=1)
    chosen.train.ppow = config.training_run("ppow", start="supervise", steps=1)
    return chosen


def main(argv: list[str]) -> None:
    """Runs one command."""
    console.setup()
    names = ("load", "serve", *COMMANDS)
    if len(argv) != 2 or argv[1] not in names:
        raise ConfigError(f"found {' '.join(argv[1:])!r}, expected one of {', '.join(names)}; see --help")
    if argv[1] == "serve":
        _serve()
        return
    settings = _settings(argv[1])
    if argv[1] == "llamacpp" or (argv[1] == "cost" and _ENGINE.value == "llamacpp"):
        _check_there(argv[1], settings)
    if argv[1] == "load":  # before anything else is in memory
        loading.load(settings)
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = experiment.build(settings, files.path_of(_WORKDIR.value or scratch))
        made = experiment.exact(made) if _EXACT.value else made
        machine = Machine()
        name = jax.devices()[0].device_kind
        print(f"{name}: {machine.operations / 1e9:.0f}e9 operations/s, {machine.bytes / 1e9:.1f}e9 bytes/s")
        with jax.set_mesh(made.mesh):
            COMMANDS[argv[1]](made, machine)


if __name__ == "__main__":
    console.command(main, sys.modules[__name__], console.parse_with_config)
