"""Measures drafters on the texts of a benchmark: tau by exact simulation, speed by decoding for real.

What was found is kept beside the texts, a file for each drafter and kind of measurement, so that another
drafter or another shape is all that is measured again.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ppow_jax.data import conversations, records
from ppow_jax.data.prompts import Prompt
from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig, Decoded
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.decode.session import Session, bucket
from ppow_jax.decode.simulate import Sampled, sampled_texts, simulate
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import files, partition, processes
from ppow_jax.parallel.progress import Loop
from ppow_jax.report import contents, statistics
from ppow_jax.report.statistics import TurnDecoded, TurnRounds
from ppow_jax.settings import AUTOREGRESSIVE

_BUCKET = 64  # texts are padded to a multiple of this
Kind = TypeVar("Kind", statistics.Simulated, statistics.Decoded)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One response of a benchmark: its context and what the target wrote.

    `taps` float32 `[T, C]` and `hidden` float32 `[T, D]`: the target's, while it wrote, at the tokens of
    both.
    """

    prompt: str
    context: np.ndarray
    response: np.ndarray
    taps: np.ndarray
    hidden: np.ndarray


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A drafter to measure."""

    run: str
    drafter: Drafter
    weights: DrafterWeights
    steps: int
    seconds: float
    sha256: str

    @functools.cached_property
    def identity(self) -> list[Any]:
        """All that its drafts depend on, as JSON."""
        vocab = processes.host(self.weights.vocab).astype(np.int32).tobytes()
        shape = dataclasses.asdict(self.drafter.config)
        return [shape, self.sha256, hashlib.sha256(vocab).hexdigest()]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Prompts with the target's answers, which lie in a directory.

    `left_out` says how many prompts and turns have none (`respond.write`).
    """

    name: str
    prompts: Sequence[Prompt]
    directory: pathlib.Path
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def features(self) -> pathlib.Path:
        """Where the taps lie."""
        return self.directory / "features"

    def turns(self, of: Sequence[str] | None = None) -> list[Turn]:
        """The answers, of all prompts or of those named; those of a single token have no rounds."""
        rows: dict[str, list[Turn]] = {}
        features = records.Records(self.features)
        for number, record in enumerate(records.Records(self.directory)):
            if of is not None and record["id"] not in of:
                continue
            text, kept = record["tokens"], features[number]
            rows.setdefault(record["id"], []).extend(
                Turn(record["id"], text[:start], text[start:end], kept["taps"][:end], kept["hidden"][:end])
                for start, end in conversations.spans(record["assistant"])
                if end - start > 1
            )
        return [turn for p in self.prompts for turn in rows.get(p.id, [])]


def measure(
    experiment: Experiment, candidates: Sequence[Candidate], shape: shapes.Shape, benchmark: Benchmark
) -> dict[str, statistics.Measured]:
    """All about the drafters on a benchmark, by run; of what is known nothing is measured again.

    Args:
      experiment: whose target decodes.
      candidates: the drafters.
      shape: of the drafts in decoding for real.
      benchmark: its texts have been written.

    Raises:
      UserError: no text has anything to draft.
    """
    settings, decode = experiment.settings.evaluate, experiment.settings.decode
    turns = functools.cache(functools.partial(_turns, benchmark))
    kept = functools.partial(_kept, benchmark.directory, candidates)

    def simulated(name: str, drafts: shapes.Shape) -> dict[str, statistics.Simulated]:
        of = functools.partial(_simulated, experiment, turns, drafts)
        return kept(statistics.Simulated, name, shapes.name(drafts), of)

    chains = simulated("chain", shapes.chain(settings.window))
    trees = simulated("tree", shapes.parse(settings.tree)) if settings.tree else dict.fromkeys(chains)
    how = [shapes.name(shape), dataclasses.asdict(decode), settings.decode_prompts]
    how += [experiment.settings.seed, contents.device()]
    of = functools.partial(_decoded, experiment, turns, shape)
    timed = kept(statistics.Decoded, "decoded", how, of)
    return {c.run: statistics.Measured(chains[c.run], trees[c.run], timed[c.run]) for c in candidates}


def _turns(benchmark: Benchmark) -> list[Turn]:
    found = benchmark.turns()
    if not found:
        raise UserError(
            f"config.evaluate.prompts: {benchmark.name!r} has no answer of two tokens or more, so there is "
            "nothing to draft; raise config.evaluate.max_new_tokens or use other prompts"
        )
    return found


def _simulated(
    experiment: Experiment,
    turns: Callable[[], Sequence[Turn]],
    shape: shapes.Shape,
    candidates: Sequence[Candidate],
) -> dict[str, statistics.Simulated]:
    """Rounds of all turns, by run."""
    owners = [turn.prompt for turn in turns()]
    found = simulate_all(experiment, candidates, turns(), shape)
    return {run: statistics.by_prompt(owners, rounds, shape.depth) for run, rounds in found.items()}


def _decoded(
    experiment: Experiment,
    turns: Callable[[], Sequence[Turn]],
    shape: shapes.Shape,
    candidates: Sequence[Candidate],
) -> dict[str, statistics.Decoded]:
    """Decoding of the first `evaluate.decode_prompts` prompts, by run."""
    prompts = list(dict.fromkeys(turn.prompt for turn in turns()))
    chosen = prompts[: experiment.settings.evaluate.decode_prompts]
    some = [turn for turn in turns() if turn.prompt in chosen]
    greedy = experiment.sampling == GREEDY
    expected = simulate_all(experiment, candidates, some, shape) if greedy else None
    found = decode_all(experiment, candidates, some, shape)
    plain = found.pop(AUTOREGRESSIVE)
    return {
        run: statistics.decoded_by_prompt(
            plain, drafted, [r.emitted for r in expected[run]] if expected else None
        )
        for run, drafted in found.items()
    }


def _kept(
    directory: pathlib.Path,
    candidates: Sequence[Candidate],
    kind: type[Kind],
    what: str,
    identity: Any,
    of: Callable[[Sequence[Candidate]], dict[str, Kind]],
) -> dict[str, Kind]:
    """Results of the drafters by run: from their files, or, of those that have none, measured by `of`."""
    paths = {}
    for c in candidates:
        mark = hashlib.sha256(json.dumps([c.identity, identity]).encode()).hexdigest()[:12]
        paths[c.run] = directory / f"{c.run}-{what}-{mark}.json"
    known = processes.agreed({run: files.read_json(path) for run, path in paths.items()})
    todo = [c for c in candidates if known[c.run] is None]
    for run, found in (of(todo) if todo else {}).items():
        known[run] = statistics.to_json(found)
        files.write_json(paths[run], known[run])
    return {run: statistics.from_json(kind, values) for run, values in processes.agreed(known).items()}


def simulate_all(
    experiment: Experiment, candidates: Sequence[Candidate], turns: Sequence[Turn], shape: shapes.Shape
) -> dict[str, list[TurnRounds]]:
    """Rounds of every turn by run, in the order of `turns`."""
    size, sampling = experiment.settings.evaluate.batch_size, experiment.sampling
    lengths = [len(t.context) + len(t.response) for t in turns]
    ordered = sorted(range(len(turns)), key=lambda i: lengths[i])
    found: dict[str, dict[int, TurnRounds]] = {c.run: {} for c in candidates}
    loop = Loop(f"evaluate: simulating {shapes.name(shape)}", len(turns) * len(candidates), "texts")
    for at in range(0, len(ordered), size):
        batch = ordered[at : at + size]
        some = [turns[i] for i in batch]
        texts = padded_texts(experiment, some, size)
        draws = _sampled(experiment, some, texts, at) if sampling != GREEDY else None
        for c in candidates:
            rows = processes.host(simulate(c.drafter, c.weights, *texts, shape, draws, sampling))
            for row, i in enumerate(batch):
                count = int((rows.emitted[row] > 0).sum())
                found[c.run][i] = TurnRounds(*(x[row, :count] for x in rows))
            loop.add(len(batch))
    return {run: [by[i] for i in range(len(turns))] for run, by in found.items()}


def _sampled(experiment: Experiment, turns: Sequence[Turn], texts: Texts, number: int) -> Sampled:
    """How the target sampled them, and draws that depend on the seed and the `number` alone."""
    hidden = np.zeros((*texts.tokens.shape, turns[0].hidden.shape[1]), np.float32)
    for row, turn in zip(hidden, turns, strict=False):
        row[: len(turn.hidden)] = turn.hidden
    (hidden,) = partition.shard_batch((hidden,), experiment.mesh)
    key = jax.random.fold_in(experiment.key("evaluate"), number)
    how = experiment.sampling
    return sampled_texts(experiment.target, experiment.target_params, hidden, texts.tokens, how, key)


def padded_texts(experiment: Experiment, turns: Sequence[Turn], rows: int) -> Texts:
    """Turns as a batch of so many rows; those that are missing end at once."""
    lengths = [len(t.context) + len(t.response) for t in turns]
    longest = -(-max(lengths) // _BUCKET) * _BUCKET
    tokens = np.zeros((rows, longest), np.int32)
    taps = np.zeros((rows, longest, turns[0].taps.shape[1]), np.float32)
    start, end = np.ones((2, rows), np.int32)
    for row, (turn, length) in enumerate(zip(turns, lengths, strict=True)):
        tokens[row, :length] = np.concatenate([turn.context, turn.response])
        taps[row, :length] = turn.taps
        start[row], end[row] = len(turn.context), length
    taps, tokens = partition.shard_batch((taps, tokens), experiment.mesh)
    return Texts(taps, tokens, start, end)


def decode_all(
    experiment: Experiment, candidates: Sequence[Candidate], turns: Sequence[Turn], shape: shapes.Shape
) -> dict[str, list[TurnDecoded]]:
    """Decodes every turn one at a time, autoregressively and with each drafter, in turn."""
    settings = experiment.settings.evaluate
    how = experiment.sampling
    config = DecodeConfig(settings.max_new_tokens, experiment.tokenizer.stop_ids, how)
    plain = Session(experiment.target, experiment.target_params, config)
    drafted = {
        c.run: dataclasses.replace(plain, drafting=Eagle(c.drafter, shape), weights=c.weights)
        for c in candidates
    }
    found: dict[str, list[TurnDecoded]] = {name: [] for name in (AUTOREGRESSIVE, *drafted)}
    compiled: set[tuple[Any, int]] = set()
    loop = Loop(f"evaluate: decoding {shapes.name(shape)}", len(turns) * len(found), "texts")
    for number, turn in enumerate(turns):
        keys_B = jax.random.fold_in(experiment.key("decode"), number)[None]
        for name, session in {AUTOREGRESSIVE: plain, **drafted}.items():
            run = functools.partial(session, [turn.context], keys_B)
            program = (session.drafting, bucket(len(turn.context)))
            if program not in compiled:
                jax.block_until_ready(run())
                compiled.add(program)
            began = time.perf_counter()
            out = jax.block_until_ready(run())
            seconds = time.perf_counter() - began
            text: Decoded[np.ndarray] = processes.host(out)
            emitted = text.emitted_by_round[0]
            tokens = text.tokens[0, : text.emitted[0]]
            found[name].append(TurnDecoded(turn.prompt, tokens, emitted[emitted > 0], seconds))
            loop.add(1)
    return found


def params_sha256(params: dict) -> str:
    """sha256 over all parameters, in the order of their paths."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(partition.path_name(path).encode() + processes.host(leaf).tobytes())
    return digest.hexdigest()
