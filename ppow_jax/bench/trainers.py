"""Our training steps beside those of other trainers: same shapes, same inputs, in turn.

Shape letters: B texts, T positions, K steps of a window, D width, N draft vocabulary.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppow_jax.bench import training_steps
from ppow_jax.bench.machine import Machine, fresh_drafter, show
from ppow_jax.config import to_dict
from ppow_jax.drafters.eagle3 import DrafterConfig
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.parallel.console import log
from ppow_jax.settings import TrainSettings

_PAUSE = 0.3  # seconds after which threads of another library have stopped spinning
# What a peer computes that others do not, and the other way round.
_REMARKS = {
    "specjax": "optimiser outside jit",
    "speculators": "one row of all texts; argmax of target and drafter",
    "specforge": "acceptance as well; argmax of target and drafter",
}


@dataclasses.dataclass
class Contender:
    """A process that takes training steps when it is told to.

    Attributes:
      name: as in the table.
      positions: losses of a step.
      operations: of a step's matrix products.
      rate: operations a second of a large product in its framework, alone on the machine.
      version: of what it is made with.
      seconds, bytes: of the steps so far, and the most memory that they held.
    """

    name: str
    process: subprocess.Popen[str]
    positions: int = 0
    operations: float = 0.0
    rate: float = 0.0
    version: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes: int = 0

    def answer(self) -> dict[str, Any]:
        """Its next line.

        Raises:
          UserError: it has ended instead, or said something else.
        """
        assert self.process.stdout  # a pipe
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name}: the worker ended with status {self.process.wait()}; see above")
        with contextlib.suppress(ValueError):
            if isinstance(answer := json.loads(line), dict):
                return answer
        raise UserError(f"{self.name}: found {line[:80]!r}, expected a Python that prints nothing of its own")

    def get_ready(self) -> None:
        """Waits until it is, and takes in what it says of itself."""
        log.info("train: starting %s", self.name)
        for key, value in self.answer().items():
            setattr(self, key, value)

    def step(self) -> None:
        """Takes one."""
        with contextlib.suppress(BrokenPipeError):  # then it has ended, as its answer will say
            print(file=self.process.stdin, flush=True)
        answer = self.answer()
        self.seconds.append(answer["seconds"])
        self.bytes = answer["bytes"]


def compare(experiment: Experiment, machine: Machine, torch_python: str, specjax: str, repeats: int) -> None:
    """Prints the parts of our steps, then all steps beside each other.

    Raises:
      UserError: no training run, no such Python or checkout, or a worker that ends.
    """
    chosen = training_steps.kinds(experiment.settings)
    if not chosen:
        raise UserError("train: found no run in config.train, expected at least one")
    if torch_python and not shutil.which(torch_python):
        raise UserError(f"--torch_python: found {torch_python!r}, expected a Python that can be run")
    if specjax and not (pathlib.Path(specjax) / "specjax").is_dir():
        raise UserError(f"--specjax: found {specjax!r}, expected a checkout, with a folder specjax in it")
    if (torch_python or specjax) and not any(type(run.method) is Supervised for run in chosen.values()):
        raise UserError("train: found no run of `supervised`, expected one to set other trainers beside")
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as scratch:
        commands = _commands(experiment, chosen, pathlib.Path(scratch), torch_python, specjax)
        try:
            for name, (command, operations) in commands.items():
                contenders.append(_started(name, command, operations))
                contenders[-1].get_ready()
            for name, run in chosen.items():
                if isinstance(run.method, Supervised):
                    _show_parts(experiment, machine, name, run)
            for turn in range(repeats):
                for one in contenders[:: 1 if turn % 2 else -1]:
                    time.sleep(_PAUSE)
                    one.step()
                log.info("train: %d/%d turns", turn + 1, repeats)
        finally:
            for one in contenders:
                one.process.kill()
    _report(contenders)


def _show_parts(experiment: Experiment, machine: Machine, name: str, run: TrainSettings) -> None:
    rows = []
    for part, (asked, seconds) in training_steps.parts(experiment, run, fresh_drafter(experiment)).items():
        floor = machine.floor(asked, 0)
        cells = (asked / 1e9, floor * 1e3, seconds * 1e3)
        rows.append([part, *(f"{c:,.1f}" for c in cells), f"{floor / seconds:.0%}"])
    columns = ["part", "operations (1e9)", "floor (ms)", "measured (ms)", "of the floor"]
    show(f"{name}: a step in parts", columns, rows)


def _commands(
    experiment: Experiment,
    chosen: Mapping[str, TrainSettings],
    directory: pathlib.Path,
    torch_python: str,
    specjax: str,
) -> dict[str, tuple[list[str], float]]:
    """The command of each that takes part, by its name, and the operations of its step, or 0 where it tells
    them itself. The others come first, so that mistakes about them show at once. Our runs have their own
    anchors; the first supervised one comes also with every position as an anchor, as the others do it."""
    settings, found = experiment.settings, {}
    runs, ours = dict(settings.train), list(chosen)
    supervised = [name for name, run in chosen.items() if type(run.method) is Supervised][:1]
    for name in supervised:
        every = dataclasses.replace(chosen[name].method, anchors=settings.data.length - 2)
        ours.append(next(n for n in (f"{name}_all" + "_" * k for k in itertools.count()) if n not in runs))
        runs[ours[-1]] = dataclasses.replace(chosen[name], method=every)
    if supervised and (torch_python or specjax):
        shape, run = fresh_drafter(experiment).drafter.config, chosen[supervised[0]]
        B, T, K = run.batch_size, settings.data.length, run.method.window
        inputs = directory / "inputs.npz"
        _write_inputs(inputs, shape, B, T, K)
        script = str(pathlib.Path(__file__).with_name("trainer_worker.py"))
        pythons = {name: torch_python for name in ("speculators", "specforge") if torch_python}
        if specjax:
            pythons["specjax"] = sys.executable
        for name, python in pythons.items():
            command = [python, script, name, str(inputs), specjax]
            found[name] = (command, peer_operations(shape, B, T, K))
    else:
        log.info("train: no other trainer beside (--torch_python, --specjax)")
    file = directory / "config.json"
    file.write_text(json.dumps(to_dict(dataclasses.replace(settings, train=runs, runs=()))))
    for name in ours:
        command = [sys.executable, "-m", "ppow_jax.bench.own_worker", str(file), name]
        found[f"ours, {name}"] = (command, 0.0)
    return found


def _started(name: str, command: Sequence[str], operations: float = 0.0) -> Contender:
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return Contender(name, worker, operations=operations)


def _write_inputs(path: pathlib.Path, shape: DrafterConfig, B: int, T: int, K: int) -> None:
    rng, D, N = np.random.default_rng(0), shape.width, shape.vocab_size

    def normal(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32)

    names = ("width", "mlp_hidden", "heads", "kv_heads", "head_size", "vocab_size", "rope_theta")
    np.savez(
        path,
        tokens=rng.integers(N, size=(B, T)).astype(np.int32),
        taps=normal(B, T, shape.taps_width),
        hidden=normal(B, T, D),
        head=normal(N, D) / 20,
        embedding=normal(N, D) / 20,
        window=K,
        shape=json.dumps({name: getattr(shape, name) for name in names}),
    )


def peer_operations(c: DrafterConfig, B: int, T: int, K: int) -> float:
    """Of the matrix products of a step that reads every position K times, forward and backward.

    Attention counts whole squares of scores, as masked products compute them. What is not trained (the
    target's head) has no backward pass, and features no gradient.
    """
    heads, kv = c.heads * c.head_size, c.kv_heads * c.head_size
    layer = 2 * c.width * (heads + 2 * kv) + heads * c.width + 3 * c.width * c.mlp_hidden
    each = layer + c.width * c.vocab_size
    scores = 2 * heads * T
    once = 2 * c.taps_width * c.width + c.width * c.vocab_size
    return 2.0 * B * T * (3 * K * (each + scores) + once)


def _report(contenders: Sequence[Contender]) -> None:
    rows = []
    for one in contenders:
        low, middle, high = np.quantile(one.seconds, (0.1, 0.5, 0.9))
        reached = one.operations / middle
        rows.append(
            [
                one.name,
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                f"{one.positions:,}",
                f"{one.positions / middle:,.0f}",
                f"{one.operations / 1e9:,.0f}",
                f"{reached / 1e9:.0f} of {one.rate / 1e9:.0f}, {reached / one.rate:.0%}",
                f"{one.bytes / 1e6:,.0f}",
                _REMARKS.get(one.name, "whole target in memory"),
            ]
        )
    columns = ["trainer", "seconds a step (10% to 90%)", "losses", "losses/s", "operations (1e9)"]
    columns += ["rate (1e9/s)", "peak MB", "beside its step"]
    show(f"training steps in turn, {len(contenders[0].seconds)} each", columns, rows)
    for one in contenders:
        print(f"{one.name}: {one.version}")
