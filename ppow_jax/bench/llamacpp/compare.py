"""A drafter in llama.cpp beside the same drafter here: accepted tokens, texts, tokens a second.

The servers of llama.cpp answer the same prompts in turn, with and without the drafter, and so do we.
"""

import time
from collections.abc import Sequence

import numpy as np

from ppow_jax.bench import parting
from ppow_jax.bench.llamacpp.server import Answer, Engine, room
from ppow_jax.bench.machine import show
from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.session import Session
from ppow_jax.experiment import Experiment
from ppow_jax.parallel.console import log
from ppow_jax.report.measure import Candidate
from ppow_jax.targets.tokenizer import Tokenizer


def compare(
    experiment: Experiment,
    candidate: Candidate,
    engine: Engine,
    asked: dict[str, list[int]],
    tokens: int,
    depths: Sequence[int],
) -> None:
    """Decodes prompts here and there; prints a table, and one of the texts that part from ours.

    Args:
      experiment: whose target is a GGUF file.
      candidate: the drafter.
      engine: llama.cpp with it.
      asked: ids of prompts.
      tokens: to write at most.
      depths: tokens drafted a round; each is tried.
    """
    sessions = {depth: session(experiment, candidate, depth, tokens) for depth in depths}
    servers = {depth: engine.server(depth, room(asked, tokens)) for depth in (0, *depths)}
    there: dict[int, list[Answer]] = {depth: [] for depth in servers}
    here: dict[int, list[Answer]] = {depth: [] for depth in depths}
    parted = []
    for number, (name, ids) in enumerate(asked.items(), 1):
        for depth, server in servers.items():
            there[depth].append(server(ids, tokens))
        for depth in depths:
            answer, written = ours(sessions[depth], ids, experiment.tokenizer)
            here[depth].append(answer)
            if answer.text == there[depth][-1].text:  # its ids may be others than those of the text read
                continue
            theirs = experiment.tokenizer.encode_after(there[depth][-1].text)
            if any(a != b for a, b in zip(written, theirs, strict=False)):
                at = parting.parting(experiment.target, experiment.target_params, ids, written, theirs)
                parted.append([name, str(depth), str(at.position), f"{at.gap:.2g}"])
        log.info("llamacpp: %d/%d prompts", number, len(asked))
    columns = ["draft", "accepted there", "accepted here", "equal", "texts alike", "as its plain text"]
    columns += ["tokens/s", "plain", "speedup"]
    rows = [_row(depth, there[depth], here[depth], there[0]) for depth in depths]
    show(f"llama.cpp, {engine.name}, {len(asked)} prompts", columns, rows)
    if parted:
        show("texts that part from ours", ["prompt", "chain", "after tokens", "gap of logits"], parted)


def _row(depth: int, there: list[Answer], here: list[Answer], plain: list[Answer]) -> list[str]:
    count = len(plain)
    equal = sum(a.accepted == b.accepted for a, b in zip(there, here, strict=True))
    alike = sum(a.text == b.text for a, b in zip(there, here, strict=True))
    lossless = sum(a.text == b.text for a, b in zip(there, plain, strict=True))
    with_it, without = rate(there), rate(plain)
    return [
        f"chain:{depth}",
        str(sum(a.accepted for a in there)),
        str(sum(a.accepted for a in here)),
        f"{equal}/{count}",
        f"{alike}/{count}",
        f"{lossless}/{count}",
        f"{with_it:.1f}",
        f"{without:.1f}",
        f"{with_it / without:.2f}x",
    ]


def rate(answers: Sequence[Answer]) -> float:
    """Tokens a second after the first of each text."""
    return sum(a.tokens - 1 for a in answers) / sum(a.seconds for a in answers)


def session(experiment: Experiment, candidate: Candidate, depth: int, tokens: int) -> Session:
    """Our decoder with a drafter that drafts chains of `depth`."""
    config = DecodeConfig(tokens, experiment.tokenizer.stop_ids)
    eagle = Eagle(candidate.drafter, shapes.parse(f"chain:{depth}"))
    return Session(experiment.target, experiment.target_params, config, eagle, candidate.weights)


def ours(decoder: Session, ids: list[int], tokenizer: Tokenizer) -> tuple[Answer, list[int]]:
    """What we write, and its ids without the one that ends the text.

    That one is not among the accepted tokens, drafted or not; llama.cpp counts it where it was drafted.
    """
    began = time.perf_counter()
    out = decoder([ids])
    written = np.asarray(out.tokens[0, : int(out.emitted[0])]).tolist()
    seconds = time.perf_counter() - began
    rounds = np.asarray(out.emitted_by_round[0])
    rounds = rounds[rounds > 0]
    kept = written[:-1] if written and written[-1] in tokenizer.stop_ids else written
    accepted = int(rounds.sum() - len(rounds))
    return Answer(tokenizer.decode(kept, special=False), len(written), 0, accepted, seconds), kept
