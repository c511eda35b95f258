"""Windows of a drafter as text, to be read."""

import functools
from collections.abc import Sequence
from typing import Any

from ppow_jax.data.prompts import Prompt
from ppow_jax.decode.rounds import Round, rounds_of
from ppow_jax.experiment import Experiment
from ppow_jax.report.measure import Benchmark, Candidate, Turn, padded_texts
from ppow_jax.targets.tokenizer import Tokenizer

_PART = "\ufffd"  # of a character, as decoders show it


def samples(
    experiment: Experiment, candidate: Candidate, benchmarks: Sequence[Benchmark], prompts: int, tokens: int
) -> list[dict[str, Any]]:
    """The windows of a drafter as text, on the first answers of some prompts of all benchmarks, in turn.

    Args:
      experiment: whose target wrote them.
      candidate: the drafter.
      benchmarks: where the prompts are taken from.
      prompts: how many.
      tokens: of each answer that are looked at.
    """
    depth = max(len(b.prompts) for b in benchmarks)
    found: list[tuple[Benchmark, Prompt, Turn]] = []
    for benchmark, prompt in (
        (b, b.prompts[i]) for i in range(depth) for b in benchmarks if i < len(b.prompts)
    ):
        found += [(benchmark, prompt, turn) for turn in benchmark.turns([prompt.id])[:1]]
        if len(found) == prompts:
            break
    texts = padded_texts(experiment, [turn for _, _, turn in found], len(found))
    window = experiment.settings.evaluate.window
    rounds = rounds_of(candidate.drafter, candidate.weights, texts, window, tokens)
    return [
        {"benchmark": benchmark.name, "prompt": prompt.id, "question": prompt.turns[0]}
        | as_text(experiment, turn, of)
        for (benchmark, prompt, turn), of in zip(found, rounds, strict=True)
    ]


def as_text(experiment: Experiment, turn: Turn, rounds: Sequence[Round]) -> dict[str, Any]:
    """An answer's windows as text: `first`, what prefill wrote; `rounds`; `cut`, whether the answer goes on.

    Of each round: `drafted`, how many tokens; `count`, how many were accepted; and text: `accepted`,
    `refused` (the first token that was), `dropped` (what was drafted behind it) and `own`.
    """
    known = turn.response[:1].tolist()
    first, found = experiment.tokenizer.decode(known), rounds_as_text(experiment.tokenizer, known, rounds)
    emitted = len(known) + sum(len(of.tokens) for of in rounds)
    return {"first": first, "rounds": found, "cut": emitted < len(turn.response)}


def rounds_as_text(
    tokenizer: Tokenizer, known: list[int], rounds: Sequence[Round], special: bool = True
) -> list[dict[str, Any]]:
    """Rounds as text, each behind those before it; arguments as of `round_as_text`."""
    found = []
    for of in rounds:
        found.append(round_as_text(tokenizer, known, of, special))
        known = known + of.tokens
    return found


def round_as_text(tokenizer: Tokenizer, known: list[int], of: Round, special: bool = True) -> dict[str, Any]:
    """A round as text, behind the ids that are known; see `as_text`.

    A character of several tokens stands whole where its last one is, so that the parts in a row are the text.

    Args:
      tokenizer: the target's.
      known: ids of the text so far.
      of: the round.
      special: whether special tokens are part of the text.
    """
    text_of = functools.partial(tokenizer.added, special=special)
    kept, refused = of.drafted[: of.accepted], of.drafted[of.accepted :]
    return {
        "drafted": len(of.drafted),
        "count": of.accepted,
        "accepted": text_of(known, kept).rstrip(_PART),
        "refused": text_of(known + kept, refused[:1]),
        "dropped": text_of(known + kept + refused[:1], refused[1:]),
        "own": text_of(known + kept, of.own).rstrip(_PART),
    }
