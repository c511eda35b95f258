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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppow_jax.bench.machine import show
from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation
from ppow_jax.decode import cost, shapes
from ppow_jax.decode.drafting import Drafting, Eagle, Together
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.ngrams import Lookahead, Lookup
from ppow_jax.decode.session import Session, bucket
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel.console import log
from ppow_jax.stages import evaluate
from ppow_jax.targets import gguf_files, huggingface

_LOOKAHEAD = (2, 3, 1)  # columns, n-gram and candidates: seven tokens in a pass
_TORCH_LOOKUP = 10  # of transformers, its documentation's
_PAUSE = 0.3  # seconds after which threads of another library have stopped spinning


def costs(experiment: Experiment, run: str) -> None:
    """Costs of the parts, and the shapes that they favour on held-out texts."""
    candidate = evaluate.find_candidate(experiment, run)
    found = cost.measure(experiment.target, experiment.target_params, candidate.drafter, candidate.weights)
    row = lambda name, seconds: [name, f"{seconds * 1e3:.2f}", f"{seconds / found.step:.3f}"]  # noqa: E731
    rows = [row("autoregressive round", found.step)]
    rows += [row(f"target pass, {n} tokens", s) for n, s in found.target.items()]
    rows += [row("drafter, first step", found.first)]
    rows += [row(f"drafter, further step, {n} windows", s) for n, s in found.level.items()]
    rows += [row(f"rest of a round of {n} tokens", s) for n, s in found.overhead.items()]
    show("costs", ["part", "ms", "autoregressive steps"], rows)
    best = cost.choices(found, candidate.drafter, candidate.weights, evaluate.held_out(experiment))
    columns = ["shape", "tau", "round (steps)", "predicted speedup"]
    rows = [
        [shapes.name(c.shape), f"{c.tau:.3f}", f"{c.seconds / found.step:.2f}", f"{c.speedup:.2f}x"]
        for c in best[:12]
    ]
    show(f"shapes for {candidate.run}, on held-out responses", columns, rows)


@dataclasses.dataclass(frozen=True)
class Race:
    """What is raced: `count` prompts of each source, of one bucket of lengths; decoders; torch's Python."""

    prompts: str
    count: int
    tokens: int
    decoders: tuple[str, ...]
    torch_python: str


class DecodedPrompt(NamedTuple):
    """A decoded prompt: seconds by the clock, ids, tokens of each verification pass."""

    seconds: float
    ids: list[int]
    emitted: list[int]


Decoder = Callable[[Sequence[int]], DecodedPrompt]


def race(experiment: Experiment, run: str, about: Race) -> None:
    """All decoders on the same prompts, in turn; prints the table."""
    candidate, ids = evaluate.find_candidate(experiment, run), _prompts(experiment, about)
    length = bucket(len(ids[0]))
    config = DecodeConfig(about.tokens, experiment.tokenizer.stop_ids)
    plain = Session(experiment.target, experiment.target_params, config)
    ours = _drafters(experiment, candidate, about.decoders)
    decoders: dict[str, Decoder] = {"autoregressive": _ours(plain)}
    for name, (drafting, weights) in ours.items():
        decoders[name] = _ours(dataclasses.replace(plain, drafting=drafting, weights=weights))
    worker = _torch(experiment, about)
    if worker:
        decoders["transformers, autoregressive"] = functools.partial(worker, lookup=0)
        decoders["transformers, prompt lookup"] = functools.partial(worker, lookup=_TORCH_LOOKUP)
    for name, decoder in decoders.items():
        log.info("decode: compiling and trying %s", name)
        decoder(ids[0])
    begin = _ours(dataclasses.replace(plain, config=dataclasses.replace(config, max_new_tokens=1)))
    begin(ids[0])
    needed = _needed(experiment, ours, length + about.tokens)
    decoded: dict[str, list[DecodedPrompt]] = {name: [] for name in decoders}
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    prefills = []
    for number, prompt in enumerate(ids):
        for name in list(decoders)[:: 1 if number % 2 else -1]:
            time.sleep(_PAUSE)
            decoded[name].append(decoders[name](prompt))
            if name in ours:  # beside each prompt: a slow moment of the machine hits all alike
                parts[name].append(needed(name))
        prefills.append(begin(prompt).seconds)
        log.info("decode: %d/%d prompts", number + 1, len(ids))
    if worker:
        worker.close()
    about_it = f"{len(ids)} prompts padded to {length}, at most {about.tokens} tokens"
    _report(f"{about_it}, drafter of {candidate.run}", decoded, parts, np.array(prefills))


def _needed(
    experiment: Experiment, ours: Mapping[str, tuple[Drafting, Any]], slots: int
) -> Callable[[str], tuple[float, float]]:
    """Measures, of a decoder, a target pass over its draft, and one in turn with drafting, in passes of one
    token."""
    target, sizes = (experiment.target, experiment.target_params), {d.tokens for d, _ in ours.values()}
    passes = {n: cost.target_timer(*target, n, slots) for n in {1, *sizes}}
    both = {name: cost.parts_timer(*target, *who, slots) for name, who in ours.items()}

    def needed(name: str) -> tuple[float, float]:
        step, verify = passes[1](), passes[ours[name][0].tokens]()
        return verify / step, both[name]() / step

    return needed


def _prompts(experiment: Experiment, about: Race) -> list[list[int]]:
    """Prompts of the bucket of lengths that most have."""
    sources = prompts.load(about.prompts, "prompts")
    tokenizer = experiment.tokenizer
    ids = {name: [Conversation(p).question(tokenizer, 0).ids for p in of] for name, of in sources.items()}
    common = collections.Counter(bucket(len(i)) for of in ids.values() for i in of).most_common(1)[0][0]
    return [i for of in ids.values() for i in [i for i in of if bucket(len(i)) == common][: about.count]]


def sessions(experiment: Experiment, run: str, names: Sequence[str], tokens: int) -> dict[str, Session]:
    """A session for each decoder named."""
    config = DecodeConfig(tokens, experiment.tokenizer.stop_ids)
    plain = Session(experiment.target, experiment.target_params, config)
    found = _drafters(experiment, evaluate.find_candidate(experiment, run), names)
    return {name: dataclasses.replace(plain, drafting=d, weights=w) for name, (d, w) in found.items()}


def _drafters(
    experiment: Experiment, candidate: evaluate.Candidate, names: Sequence[str]
) -> dict[str, tuple[Drafting, Any]]:
    """Who drafts, with weights, by name: a shape, `lookup:K`, `lookahead`, or two of them with a +."""
    drafter = candidate.drafter
    found: dict[str, tuple[Drafting, Any]] = {}
    for name in names:
        if name == "auto":
            shape, _ = evaluate.choose_shape(experiment, candidate)
            found[f"auto ({shapes.name(shape)})"] = (Eagle(drafter, shape), candidate.weights)
            continue
        drafters: list[tuple[Drafting, Any]] = []
        for part in name.split("+"):
            kind, _, size = part.partition(":")
            if kind == "lookup" and size.isdecimal() and int(size):
                drafters.append((Lookup(int(size)), None))
            elif part == "lookahead":
                drafters.append((Lookahead(experiment.target.config.vocab_size, *_LOOKAHEAD), None))
            else:
                drafters.append((Eagle(drafter, shapes.parse(part, "--decoders")), candidate.weights))
        if len(drafters) > 2:
            raise UserError(f"--decoders: found {name!r}, expected one drafter or two")
        one, *other = drafters
        found[name] = (Together(one[0], other[0][0]), (one[1], other[0][1])) if other else one
    return found


def _ours(session: Session) -> Decoder:
    def decode(ids: Sequence[int]) -> DecodedPrompt:
        began = time.perf_counter()
        out = jax.block_until_ready(session([ids]))
        seconds = time.perf_counter() - began
        emitted = np.asarray(out.emitted_by_round[0])
        return DecodedPrompt(
            seconds, np.asarray(out.tokens[0, : out.emitted[0]]).tolist(), emitted[emitted > 0].tolist()
        )

    return decode


class _Worker:
    """transformers in a process of its own."""

    def __init__(self, python: str, file: str, tokens: int, stops: Sequence[int]) -> None:
        script = pathlib.Path(__file__).with_name("torch_worker.py")
        command = [python, str(script), "--model", file, "--threads", str(cores())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._about = {"tokens": tokens, "stops": list(stops)}
        log.info("decode: %s", self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout  # a pipe
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"--torch_python: the worker ended with status {self._process.wait()}; see above")
        return json.loads(line)

    def __call__(self, ids: Sequence[int], lookup: int) -> DecodedPrompt:
        asked = self._about | {"ids": list(ids), "lookup": lookup}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return DecodedPrompt(**self._answer(), emitted=[])

    def close(self) -> None:
        self._process.communicate()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch(experiment: Experiment, about: Race) -> _Worker | None:
    """The rival, if there is one."""
    python = about.torch_python or (sys.executable if importlib.util.find_spec("transformers") else "")
    if not python:
        log.info("decode: no transformers beside (--torch_python)")
        return None
    path = experiment.settings.target.path
    return _Worker(
        python,
        str(huggingface.find(path) or gguf_files.find(path)),
        about.tokens,
        experiment.tokenizer.stop_ids,
    )


def _report(
    title: str,
    decoded: dict[str, list[DecodedPrompt]],
    parts: dict[str, list[tuple[float, float]]],
    prefills: np.ndarray,
) -> None:
    """Tokens/s from prompt to stop, ratios to autoregressive decoding, and of the rounds alone the share
    that was reached of what verification and drafting would allow; medians over prompts.

    Like is measured against like. `parts` are a target pass over the draft, and one in turn with drafting,
    over a pass of one token: drafting is what the second takes more, its weights no longer in a processor's
    cache. What is reached is a step over a round, both of whole decoding loops.
    """
    plain, rows = decoded["autoregressive"], []
    sums = lambda of: np.array([len(r.ids) for r in of])  # noqa: E731
    clock = lambda of: np.array([r.seconds for r in of])  # noqa: E731
    steps = (clock(plain) - prefills) / np.maximum(1, sums(plain) - 1)
    rates = sums(plain) / clock(plain)
    for name, of in decoded.items():
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
