"""Stage `evaluate`: acceptance length and speedup of every drafter that the workdir holds.

Texts of the benchmarks are written by the target, autoregressively. tau comes from the exact simulation
on all of them; speedup and identity from decoding some of them for real, each drafter beside
autoregressive decoding of the same prompt in turn, so that a machine's mood hits both.
"""

import dataclasses
import functools
import hashlib
import time
from typing import Any

import jax
import numpy as np

from ppow_jax import partition, preemption, processes, report
from ppow_jax.console import log
from ppow_jax.data import conversations, features, prompts, records
from ppow_jax.decode import cost, shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig, Decoded
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.session import Session, bucket
from ppow_jax.decode.simulate import simulate
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment, exact
from ppow_jax.models.drafter import Drafter, DrafterWeights, weights_of
from ppow_jax.stages import curves, respond, training

_PROFILED = 12  # held-out texts that acceptance is profiled on
_BUCKET = 64  # prompts and texts are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class Turn:
    """One response of a benchmark: its context and what the target wrote.

    `taps` float32 `[T, C]`: what the target saw while it wrote, for the tokens of both.
    """

    prompt: str
    context: np.ndarray
    response: np.ndarray
    taps: np.ndarray


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A drafter to measure."""

    stage: str
    weights: DrafterWeights
    steps: int
    seconds: float
    sha256: str


def run(experiment: Experiment) -> None:
    """Writes report.json, report.md and plots."""
    if experiment.settings.decode.exact:
        experiment = exact(experiment)
    candidates = find_candidates(experiment)
    drafter = training.drafter_of(experiment)
    name, prediction = experiment.settings.decode.shape, None
    if name == "auto":
        shape, prediction = choose_shape(experiment, drafter, candidates[-1])
    else:
        shape = shapes.parse(name)
    gamma = cost.measure_gamma(experiment.target, experiment.target_params, drafter, candidates[0].weights)
    gamma = processes.agreed(gamma)
    results = {c.stage: {} for c in candidates}
    for name, benchmark in prompts.load(experiment.settings.evaluate.prompts, "evaluate.prompts").items():
        for stage, result in _benchmark(experiment, drafter, candidates, shape, name, benchmark).items():
            results[stage][name] = result
        preemption.leave(f"evaluate is done with {name}")
    drafters = {
        c.stage: {
            "params_sha256": c.sha256,
            "steps": c.steps,
            "seconds": round(c.seconds, 1),
            "benchmarks": results[c.stage],
            "mean": report.mean(results[c.stage]),
        }
        for c in candidates
    }
    report.write(
        experiment.workdir,
        {
            "schema": 1,
            "target": {
                "path": experiment.settings.target.path,
                "fingerprint": experiment.fingerprint,
                "dtype": experiment.target.config.dtype,
            },
            "device": report.device(),
            "window": experiment.settings.evaluate.window,
            "decode_shape": shapes.name(shape),
            "prediction": prediction,
            "decode_sampling": dataclasses.asdict(experiment.settings.decode.sampling),
            "gamma_measured": gamma,
            "drafters": drafters,
        },
    )


def choose_shape(
    experiment: Experiment, drafter: Drafter, candidate: Candidate
) -> tuple[shapes.Shape, dict[str, Any]]:
    """The shape of drafts that `auto` finds for a drafter, and what it predicts of it on held-out texts.

    The finding is kept in the workdir, so that a stopped evaluation goes on with it.
    """
    path = experiment.workdir / "evaluate" / "shape.json"
    mark = [candidate.sha256, report.device()]
    known = records.read_json(path)
    if not known or known["mark"] != mark:
        log.info("decode.shape auto: measuring costs and acceptance, a few minutes")
        costs = cost.measure(experiment.target, experiment.target_params, drafter, candidate.weights)
        best = cost.choices(costs, drafter, candidate.weights, held_out(experiment))[0]
        known = {"mark": mark, "shape": shapes.name(best.shape)}
        known["prediction"] = {"tau": best.tau, "speedup": best.speedup, "drafter": candidate.stage}
        known = processes.agreed(known)
        records.write_json(path, known)
    shape, predicted = shapes.parse(known["shape"]), known["prediction"]
    log.info("decode.shape auto: %s, predicted speedup %.2fx", shapes.name(shape), predicted["speedup"])
    return shape, predicted


def held_out(experiment: Experiment) -> Texts:
    """Some of the responses that no drafter was trained on."""
    held = training.corpus(experiment).held
    return curves.texts_of(experiment, [held[i] for i in training.spread(len(held), _PROFILED)])


def find_candidates(experiment: Experiment) -> list[Candidate]:
    """The drafter that was read from files, if any, and those of the stages that have run.

    Raises:
      UserError: there is none.
    """
    found = []
    imported = ("imported",) if experiment.settings.drafter.path else ()
    trained = [s for s in ("supervise", "cst", "ppow") if (experiment.workdir / "checkpoints" / s).exists()]
    for stage in (*imported, *trained):
        state, about = training.load_drafter(experiment, stage)
        weights = weights_of(state["params"], experiment.target_params, state["vocab"])
        sha = params_sha256(state["params"])
        found.append(Candidate(stage, weights, about["steps"], about["seconds"], sha))
    if not found:
        raise UserError(
            f"{experiment.workdir}: no trained drafter to evaluate; add 'supervise' to config.stages"
        )
    return found


def params_sha256(params: dict) -> str:
    """sha256 over all parameters, in the order of their paths."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(partition.path_name(path).encode() + processes.host(leaf).tobytes())
    return digest.hexdigest()


def _benchmark(
    experiment: Experiment,
    drafter: Drafter,
    candidates: list[Candidate],
    shape: shapes.Shape,
    name: str,
    benchmark: list[prompts.Prompt],
) -> dict[str, dict[str, Any]]:
    """Results by stage; kept on disk, so that a stopped evaluation goes on with the next benchmark."""
    settings = experiment.settings.evaluate
    identity = [
        dataclasses.asdict(settings) | {"prompts": None},
        shape,
        experiment.settings.decode,
        [(p.id, p.turns) for p in benchmark],
        [c.sha256 for c in candidates],
    ]
    mark = hashlib.sha256(repr(identity).encode()).hexdigest()
    path = experiment.workdir / "evaluate" / f"{name}.json"
    known = processes.agreed(records.read_json(path))
    if known and known["mark"] == mark:
        return known["results"]
    turns = write_texts(experiment, name, benchmark)
    chosen = {p.id for p in benchmark[: settings.decode_prompts]}
    some = [t for t in turns if t.prompt in chosen]
    simulated = simulate_all(experiment, drafter, candidates, turns, shapes.chain(settings.window))
    greedy = experiment.settings.decode.sampling.temperature == 0
    expected = simulate_all(experiment, drafter, candidates, some, shape) if greedy else None
    decoded = decode_all(experiment, drafter, candidates, some, shape)
    owners = [t.prompt for t in turns]
    results = {}
    for candidate in candidates:
        stage = candidate.stage
        rounds = simulated[stage]
        results[stage] = report.acceptance(owners, rounds, settings.window) | report.speed(
            decoded["autoregressive"], decoded[stage], expected and [r.emitted for r in expected[stage]]
        )
        log.info("evaluate: %s %s %s", name, stage, report.one_line(results[stage]))
    records.write_json(path, {"mark": mark, "results": results})
    return results


def write_texts(experiment: Experiment, name: str, benchmark: list[prompts.Prompt]) -> list[Turn]:
    """The target's greedy answers, turn by turn; responses of a single token have no rounds."""
    settings = experiment.settings.evaluate
    identity = [settings.max_new_tokens, [(p.id, p.turns) for p in benchmark]]
    identity = repr(identity + ["exact"] * experiment.settings.decode.exact)
    mark = hashlib.sha256(identity.encode()).hexdigest()[:12]
    directory = experiment.workdir / "evaluate" / f"{name}-{mark}"
    tokens, size, seen = settings.max_new_tokens, settings.batch_size, directory / "features"
    respond.write(experiment, benchmark, directory, tokens, 0.0, size, label=f"evaluate {name}", kept=seen)
    rows = {}
    for record, kept in zip(records.Records(directory), records.Records(seen), strict=True):
        text, taps = record["tokens"], kept["taps"]
        rows[record["id"]] = [
            Turn(record["id"], text[:start], text[start:end], taps[:end])
            for start, end in conversations.spans(record["assistant"])
            if end - start > 1
        ]
    return [turn for p in benchmark for turn in rows[p.id]]


def simulate_all(
    experiment: Experiment,
    drafter: Drafter,
    candidates: list[Candidate],
    turns: list[Turn],
    shape: shapes.Shape,
) -> dict[str, list[report.TurnRounds]]:
    """Rounds of every turn by drafter, in the order of `turns`."""
    size = experiment.settings.evaluate.batch_size
    lengths = [len(t.context) + len(t.response) for t in turns]
    ordered = sorted(range(len(turns)), key=lambda i: lengths[i])
    found: dict[str, dict[int, report.TurnRounds]] = {c.stage: {} for c in candidates}
    for at in range(0, len(ordered), size):
        batch = ordered[at : at + size]
        longest = -(-lengths[batch[-1]] // _BUCKET) * _BUCKET
        texts = [np.concatenate([turns[i].context, turns[i].response]) for i in batch]
        taps = np.zeros((size, longest, turns[0].taps.shape[1]), np.float32)
        for row, i in enumerate(batch):
            taps[row, : lengths[i]] = turns[i].taps
        padded = features.pad_texts(texts, size, longest)
        tokens, taps = partition.shard_batch((padded, taps), experiment.mesh)
        start_B, end_B = np.ones(size, np.int32), np.ones(size, np.int32)
        start_B[: len(batch)] = [len(turns[i].context) for i in batch]
        end_B[: len(batch)] = [lengths[i] for i in batch]
        for c in candidates:
            rows = processes.host(simulate(drafter, c.weights, taps, tokens, start_B, end_B, shape))
            for row, i in enumerate(batch):
                count = int((rows.emitted[row] > 0).sum())
                found[c.stage][i] = report.TurnRounds(*(x[row, :count] for x in rows))
    return {stage: [by[i] for i in range(len(turns))] for stage, by in found.items()}


def decode_all(
    experiment: Experiment,
    drafter: Drafter,
    candidates: list[Candidate],
    turns: list[Turn],
    shape: shapes.Shape,
) -> dict[str, list[report.TurnDecoded]]:
    """Decodes every turn one at a time, autoregressively and with each drafter, in turn."""
    settings = experiment.settings.evaluate
    how = Sampling(**dataclasses.asdict(experiment.settings.decode.sampling))
    config = DecodeConfig(settings.max_new_tokens, experiment.tokenizer.stop_ids, how)
    plain = Session(experiment.target, experiment.target_params, config)
    drafting = Eagle(drafter, shape)
    drafted = {c.stage: dataclasses.replace(plain, drafting=drafting, weights=c.weights) for c in candidates}
    found: dict[str, list[report.TurnDecoded]] = {name: [] for name in ("autoregressive", *drafted)}
    compiled: set[tuple[bool, int]] = set()
    for number, turn in enumerate(turns):
        keys_B = jax.random.fold_in(experiment.key("decode"), number)[None]
        for name, session in {"autoregressive": plain, **drafted}.items():
            run = functools.partial(session, [turn.context], keys_B)
            program = (session.drafting is None, bucket(len(turn.context)))
            if program not in compiled:
                jax.block_until_ready(run())
                compiled.add(program)
            began = time.perf_counter()
            out: Decoded = jax.block_until_ready(run())
            seconds = time.perf_counter() - began
            out = processes.host(out)
            count = int(out.count[0])
            emitted = out.emitted_by_round[0]
            tokens = out.tokens[0, :count]
            found[name].append(report.TurnDecoded(turn.prompt, tokens, emitted[emitted > 0], seconds))
    return found
