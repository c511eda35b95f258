"""Where drafted or batched texts part from autoregressive ones, and by how little.

In exact arithmetic they never do. In floating point a pass over many tokens, or over many rows, adds in
another order than a single step, so that the likeliest token may change where two are all but equally likely.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.bench.machine import show
from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.session import Session, bucket
from ppow_jax.experiment import Experiment
from ppow_jax.models.target import Target
from ppow_jax.parallel.console import log
from ppow_jax.parallel.progress import duration


class Parting(NamedTuple):
    """The first token in which two texts differ.

    Attributes:
      position: tokens of the text that are the same.
      gap: logit of autoregressive decoding's token minus that of the other one, by a pass over the whole
        text.
      rounding: the spacing of numbers of the target's dtype at these logits.
    """

    position: int
    gap: float
    rounding: float


Turn = tuple[list[int], list[int]]  # context, and the autoregressive answer


def conversations(experiment: Experiment, plain: Session, sources: str, count: int) -> Iterator[Turn]:
    """Every turn of `count` prompts a source, as long as the target's context has room."""
    for of in prompts.load(sources, "prompts").values():
        for prompt in of[:count]:
            talk = Conversation(prompt)
            for turn in range(len(prompt.turns)):
                question = talk.question(experiment.tokenizer, turn)
                if question.length + plain.config.max_new_tokens > experiment.target.config.context:
                    break
                talk.ask(question)
                out = plain([talk.tokens])
                answer = np.asarray(out.tokens[0, : out.emitted[0]]).tolist()
                yield list(talk.tokens), answer
                talk.answer(answer)


def compare(
    experiment: Experiment, decoders: dict[str, Session], batch: int, sources: str, count: int, tokens: int
) -> None:
    """Decodes every turn autoregressively and with all decoders, one by one and `batch` at a time.

    Prints a table.
    """
    config = DecodeConfig(tokens, experiment.tokenizer.stop_ids)
    plain = Session(experiment.target, experiment.target_params, config)
    turns: list[Turn] = []
    for turn in conversations(experiment, plain, sources, count):
        turns.append(turn)
        if len(turns) % 20 == 0:
            log.info("parting: %d turns decoded autoregressively", len(turns))
    jobs = {f"autoregressive, batch {batch}": (plain, batch)}
    for name, session in decoders.items():
        jobs |= {name: (session, 1), f"{name}, batch {batch}": (session, batch)}
    rows = []
    for name, (session, size) in jobs.items():
        partings = _partings(experiment, session, turns, size, name)
        row = [name, f"{len(partings)}/{len(turns)}"]
        if partings:
            middle = int(np.median([p.position for p in partings]))
            row += [str(middle), f"{max(abs(p.gap) for p in partings):.2g}"]
            row += [f"{max(abs(p.gap) / p.rounding for p in partings):.1f}"]
        rows.append(row + [""] * (5 - len(row)))
        log.info("parting: %s", " | ".join(row))
    columns = [
        "decoder",
        "texts that part",
        "median position",
        "largest gap of logits",
        "in units of rounding",
    ]
    show(f"{len(turns)} turns of at most {tokens} tokens in {experiment.target.config.dtype}", columns, rows)


def _partings(
    experiment: Experiment, session: Session, turns: Sequence[Turn], size: int, name: str
) -> list[Parting]:
    """Of the turns that part; in batches, turns of like length side by side."""
    order = sorted(range(len(turns)), key=lambda i: len(turns[i][0])) if size > 1 else list(range(len(turns)))
    found, began = [], time.monotonic()
    for at in range(0, len(turns), size):
        some = [turns[i] for i in order[at : at + size]]
        contexts = [context for context, _ in some]
        out = session(contexts + contexts[:1] * (size - len(some)))
        for row, (context, answer) in enumerate(some):
            text = np.asarray(out.tokens[row, : out.emitted[row]]).tolist()
            if text != answer:
                found.append(parting(experiment.target, experiment.target_params, context, answer, text))
        done = at + len(some)
        if at // size % max(1, 20 // size) == 0:
            left = duration((time.monotonic() - began) / done * (len(turns) - done))
            log.info("parting: %s, %d/%d turns, %d part | %s left", name, done, len(turns), len(found), left)
    return found


def parting(target: Target, params: dict, context: list[int], one: list[int], other: list[int]) -> Parting:
    """The first difference of two texts after the same context, and the logits there."""
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    ids = context + one[:same]
    padded = np.zeros(bucket(len(ids)), np.int32)
    padded[: len(ids)] = ids
    logits = np.asarray(_logits_after(target, params, padded, len(ids)))
    first, second = logits[one[same]], logits[other[same]]
    scale = 2.0 ** np.floor(np.log2(max(abs(first), abs(second))))
    rounding = float(jnp.finfo(target.config.dtype).eps) * scale
    return Parting(same, float(first - second), rounding)


@functools.partial(jax.jit, static_argnames="target")
def _logits_after(target: Target, params: dict, tokens_T: jax.Array, length: int) -> jax.Array:
    """float32 `[V]` after the first `length` tokens."""
    out = target.apply({"params": params}, tokens_T[None, None], jnp.arange(len(tokens_T))[None, None])
    return target.apply({"params": params}, out.hidden[0, 0, length - 1], method=Target.logits)
