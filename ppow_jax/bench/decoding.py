"""What decoding costs, and decoders against each other."""

import collections
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppow_jax.bench.machine import show
from ppow_jax.console import log
from ppow_jax.data import prompts
from ppow_jax.decode import cost, shapes
from ppow_jax.decode.drafting import Drafting, Eagle, Together
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.ngrams import Lookahead, Lookup
from ppow_jax.decode.session import Session, bucket
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.interop import gguf, huggingface
from ppow_jax.stages import evaluate, training

_LOOKAHEAD = (2, 3, 1)  # columns, n-gram and candidates: seven tokens in a pass
_TORCH_LOOKUP = 10  # of transformers, its documentation's
_PAUSE = 0.3  # seconds after which threads of another library have stopped spinning


def _candidate(run: Experiment, stage: str) -> evaluate.Candidate:
    found = {c.stage: c for c in evaluate.find_candidates(run)}
    if stage and stage not in found:
        raise UserError(f"--stage: found {stage!r}, expected one of {', '.join(found)}")
    return found[stage] if stage else list(found.values())[-1]


def costs(run: Experiment, stage: str) -> None:
    """Costs of the parts, and the shapes that they favour on held-out texts."""
    drafter, candidate = training.drafter_of(run), _candidate(run, stage)
    found = cost.measure(run.target, run.target_params, drafter, candidate.weights)
    row = lambda name, seconds: [name, f"{seconds * 1e3:.2f}", f"{seconds / found.step:.3f}"]  # noqa: E731
    rows = [row("autoregressive round", found.step)]
    rows += [row(f"target pass, {n} tokens", s) for n, s in found.target.items()]
    rows += [row("drafter, first step", found.first)]
    rows += [row(f"drafter, further step, {n} windows", s) for n, s in found.level.items()]
    rows += [row(f"rest of a round of {n} tokens", s) for n, s in found.overhead.items()]
    show("costs", ["part", "ms", "autoregressive steps"], rows)
    best = cost.choices(found, drafter, candidate.weights, evaluate.held_out(run))
    columns = ["shape", "tau", "round (steps)", "predicted speedup"]
    rows = [
        [shapes.name(c.shape), f"{c.tau:.3f}", f"{c.seconds / found.step:.2f}", f"{c.speedup:.2f}x"]
        for c in best[:12]
    ]
    show(f"shapes for {candidate.stage}, on held-out responses", columns, rows)


@dataclasses.dataclass(frozen=True)
class Race:
    """What is raced: `count` prompts of each source, of one bucket of lengths; decoders; torch's Python."""

    prompts: str
    count: int
    tokens: int
    decoders: tuple[str, ...]
    torch_python: str


class Run(NamedTuple):
    """A decoded prompt: seconds by the clock, ids, tokens of each verification pass."""

    seconds: float
    ids: list[int]
    emitted: list[int]


Decoder = Callable[[Sequence[int]], Run]


def race(run: Experiment, stage: str, about: Race) -> None:
    """All decoders on the same prompts, in turn; prints the table."""
    candidate, ids = _candidate(run, stage), _prompts(run, about)
    length = bucket(len(ids[0]))
    config = DecodeConfig(about.tokens, run.tokenizer.stop_ids)
    plain = Session(run.target, run.target_params, config)
    ours = _drafters(run, candidate, about.decoders)
    decoders: dict[str, Decoder] = {"autoregressive": _ours(plain)}
    for name, (drafting, weights) in ours.items():
        decoders[name] = _ours(dataclasses.replace(plain, drafting=drafting, weights=weights))
    worker = _torch(run, about)
    if worker:
        decoders["transformers, autoregressive"] = functools.partial(worker, lookup=0)
        decoders["transformers, prompt lookup"] = functools.partial(worker, lookup=_TORCH_LOOKUP)
    for name, decoder in decoders.items():
        log.info("decode: compiling and trying %s", name)
        decoder(ids[0])
    begin = _ours(dataclasses.replace(plain, config=dataclasses.replace(config, max_new_tokens=1)))
    begin(ids[0])
    slots = length + about.tokens
    sizes = {1, *(d.tokens for d, _ in ours.values())}
    verifies = {n: cost.target_timer(run.target, run.target_params, n, slots) for n in sizes}
    both = {name: cost.parts_timer(run.target, run.target_params, *who, slots) for name, who in ours.items()}
    runs: dict[str, list[Run]] = {name: [] for name in decoders}
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    prefills = []
    for number, prompt in enumerate(ids):
        for name in list(decoders)[:: 1 if number % 2 else -1]:
            time.sleep(_PAUSE)
            runs[name].append(decoders[name](prompt))
            if name in ours:  # beside each prompt: a machine's mood hits all alike
                step, verify = verifies[1](), verifies[ours[name][0].tokens]()
                parts[name].append((verify / step, both[name]() / step))
        prefills.append(begin(prompt).seconds)
        log.info("decode: %d/%d prompts", number + 1, len(ids))
    if worker:
        worker.close()
    title = (
        f"{len(ids)} prompts padded to {length}, at most {about.tokens} tokens, drafter of {candidate.stage}"
    )
    _report(title, runs, parts, np.array(prefills))


def _prompts(run: Experiment, about: Race) -> list[list[int]]:
    """Prompts of the bucket of lengths that most have."""
    sources = prompts.load(about.prompts, "prompts")
    ids = {name: [run.tokenizer.first_turn(p.turns[0]) for p in of] for name, of in sources.items()}
    common = collections.Counter(bucket(len(i)) for of in ids.values() for i in of).most_common(1)[0][0]
    return [i for of in ids.values() for i in [i for i in of if bucket(len(i)) == common][: about.count]]


def sessions(run: Experiment, stage: str, names: Sequence[str], tokens: int) -> dict[str, Session]:
    """A session for each decoder named."""
    config = DecodeConfig(tokens, run.tokenizer.stop_ids)
    plain = Session(run.target, run.target_params, config)
    found = _drafters(run, _candidate(run, stage), names)
    return {name: dataclasses.replace(plain, drafting=d, weights=w) for name, (d, w) in found.items()}


def _drafters(
    run: Experiment, candidate: evaluate.Candidate, names: Sequence[str]
) -> dict[str, tuple[Drafting, Any]]:
    """Who drafts, with weights, by name: a shape, `lookup:K`, `lookahead`, or two of them with a +."""
    drafter, found = training.drafter_of(run), {}
    for name in names:
        if name == "auto":
            shape, _ = evaluate.choose_shape(run, drafter, candidate)
            found[f"auto ({shapes.name(shape)})"] = (Eagle(drafter, shape), candidate.weights)
            continue
        drafters = []
        for part in name.split("+"):
            kind, _, size = part.partition(":")
            if kind == "lookup" and size.isdecimal() and int(size):
                drafters.append((Lookup(int(size)), None))
            elif part == "lookahead":
                drafters.append((Lookahead(run.target.config.vocab_size, *_LOOKAHEAD), None))
            else:
                drafters.append((Eagle(drafter, shapes.parse(part, "--decoders")), candidate.weights))
        if len(drafters) > 2:
            raise UserError(f"--decoders: found {name!r}, expected one drafter or two")
        one, *other = drafters
        found[name] = (Together(one[0], other[0][0]), (one[1], other[0][1])) if other else one
    return found


def _ours(session: Session) -> Decoder:
    def decode(ids: Sequence[int]) -> Run:
        began = time.perf_counter()
        out = jax.block_until_ready(session([ids]))
        seconds = time.perf_counter() - began
        emitted = np.asarray(out.emitted_by_round[0])
        return Run(seconds, np.asarray(out.tokens[0, : out.count[0]]).tolist(), emitted[emitted > 0].tolist())

    return decode


class _Worker:
    """transformers in a process of its own."""

    def __init__(self, python: str, file: str, tokens: int, stops: Sequence[int]) -> None:
        script = pathlib.Path(__file__).with_name("torch_worker.py")
        command = [python, str(script), "--model", file, "--threads", str(_cores())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._about = {"tokens": tokens, "stops": list(stops)}
        log.info("decode: %s", self._answer())

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"--torch_python: the worker ended with status {self._process.wait()}; see above")
        return json.loads(line)

    def __call__(self, ids: Sequence[int], lookup: int) -> Run:
        asked = self._about | {"ids": list(ids), "lookup": lookup}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Run(**self._answer(), emitted=[])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch(run: Experiment, about: Race) -> _Worker | None:
    """The rival, if there is one."""
    python = about.torch_python or (sys.executable if importlib.util.find_spec("transformers") else "")
    if not python:
        log.info("decode: no transformers beside (--torch_python)")
        return None
    path = run.settings.target.path
    return _Worker(
        python, str(huggingface.find(path) or gguf.find(path)), about.tokens, run.tokenizer.stop_ids
    )


def _report(
    title: str,
    runs: dict[str, list[Run]],
    parts: dict[str, list[tuple[float, float]]],
    prefills: np.ndarray,
) -> None:
    """Tokens/s from prompt to stop, ratios to autoregressive decoding, and of the rounds alone the share
    that was reached of what verification and drafting would allow; medians over prompts.

    Like is measured against like. `parts` are a target pass over the draft, and one in turn with drafting,
    over a pass of one token: drafting is what the second takes more, its weights no longer in a processor's
    cache. What is reached is a step over a round, both of whole decoding loops.
    """
    plain, rows = runs["autoregressive"], []
    sums = lambda of: np.array([len(r.ids) for r in of])  # noqa: E731
    clock = lambda of: np.array([r.seconds for r in of])  # noqa: E731
    steps = (clock(plain) - prefills) / np.maximum(1, sums(plain) - 1)
    rates = sums(plain) / clock(plain)
    for name, of in runs.items():
        low, middle, high = np.quantile(sums(of) / clock(of) / rates, (0.1, 0.5, 0.9))
        whole = sums(of).sum() / clock(of).sum()
        same = sum(r.ids == p.ids for r, p in zip(of, plain, strict=True))
        cells = [
            f"{whole:.1f}",
            f"{whole * clock(plain).sum() / sums(plain).sum():.2f}x",
            f"{middle:.2f}x ({low:.2f} to {high:.2f})",
        ]
        more = [""] * 4
        if name in parts:
            rounds = np.array([len(r.emitted) for r in of])
            tau = sum(sum(r.emitted) for r in of) / rounds.sum()
            verify, needed = np.median(parts[name], 0)
            reached = np.median(np.array(parts[name])[:, 1] * steps * rounds / (clock(of) - prefills))
            costs = f"{verify:.2f} + {needed - verify:.2f}"
            more = [f"{tau:.3f}", costs, f"{tau / needed:.2f}x", f"{reached:.0%}"]
        rows.append([name, *cells, f"{same}/{len(of)}", *more])
    columns = ["decoder", "tokens/s", "ratio", "median (10% to 90%)", "same text"]
    columns += ["tau", "verification + drafting (passes)", "ceiling", "reached"]
    step, prefill = np.median(steps) * 1e3, np.median(prefills) * 1e3
    show(f"{title}; a step {step:.1f} ms, prefill {prefill:.0f} ms", columns, rows)
