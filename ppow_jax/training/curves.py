"""Acceptance while training goes on: greedy and sampled, on held-out texts and on as many training texts.

Rewards of rollouts rise on the anchors and texts that training chose; whether decoding gains is read here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppow_jax.data import texts
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.shapes import chain
from ppow_jax.decode.simulate import Sampled, expected_accepted, sampled_texts, simulate
from ppow_jax.drafters.eagle3 import Drafter, weights_of
from ppow_jax.experiment import Experiment
from ppow_jax.models.target_outputs import hidden_of, taps_of
from ppow_jax.parallel import partition, processes
from ppow_jax.training.step import State, drafter_params

_ANCHORS = 16  # a text, evenly spread


class _Sample(NamedTuple):
    """Texts to measure on, anchors `[B, A]` with `real` where they are not padding, and how the texts were
    sampled, if they were."""

    texts: Texts
    anchors: np.ndarray
    real: np.ndarray
    sampled: Sampled | None


def acceptance(
    experiment: Experiment, corpus: texts.Corpus, drafter: Drafter
) -> Callable[[State], dict[str, float]]:
    """Measures a drafter; the window is that of `evaluate`.

    Returns:
      A function of the state: for `holdout` and `train`, `_tau` (of chains, by exact simulation: greedy
      ones, or sampled ones where the texts were sampled) and `_sampled` (mean accepted length of sampled
      windows, in expectation, at the temperature of the texts, or 1 if they are greedy). It measures nothing
      if there are no held-out texts, or if they are not the target's own.
    """
    sampling = Sampling(experiment.settings.respond.temperature or 1.0)
    if not len(corpus.held) or experiment.settings.respond.keep_answers:
        return lambda state: {}
    held, trained = len(corpus.held), texts.spread(len(corpus.train), len(corpus.held))
    samples = {"holdout": (corpus.held, range(held)), "train": (corpus.train, trained)}
    K, rows = experiment.settings.evaluate.window, experiment.settings.evaluate.batch_size
    shape = chain(K)

    def measure(state: State) -> dict[str, float]:
        weights = weights_of(drafter_params(state), experiment.target_params, state["vocab"])
        metrics = {}
        for name, (items, chosen) in samples.items():
            emitted, lengths = [], []
            for at in range(0, len(chosen), rows):  # read anew: their taps are too large to be kept
                s = _sample(experiment, [items[i] for i in chosen[at : at + rows]])
                drafted = simulate(drafter, weights, *s.texts, shape, s.sampled, sampling)
                emitted.append(processes.host(drafted.emitted))
                about = (s.texts.taps, s.texts.tokens, s.texts.end, s.anchors, K)
                log_prob = s.sampled.log_prob if s.sampled else None
                accepted = expected_accepted(drafter, weights, *about, log_prob, sampling)
                lengths.append(processes.host(accepted)[s.real])
            tokens, rounds = sum(x.sum() for x in emitted), sum((x > 0).sum() for x in emitted)
            metrics[f"{name}_tau"] = float(tokens / max(1, rounds))
            metrics[f"{name}_sampled"] = float(np.concatenate(lengths).mean())
        return metrics

    return measure


def texts_of(experiment: Experiment, items: Sequence[Mapping[str, Any]]) -> Texts:
    """The first responses of items of a corpus."""
    return _texts_in(experiment, items, partition.shard_batch(texts.stack(items), experiment.mesh))


def _texts_in(
    experiment: Experiment, items: Sequence[Mapping[str, Any]], batch: dict[str, jax.Array]
) -> Texts:
    """`texts_of`, the items stacked and on the mesh."""
    spans = [texts.first_span(item["assistant"]) for item in items]
    start, end = (np.asarray(x, np.int32) for x in zip(*spans, strict=True))
    return Texts(taps_of(experiment.target, experiment.target_params, batch), batch["tokens"], start, end)


def _sample(experiment: Experiment, items: Sequence[Mapping[str, Any]]) -> _Sample:
    batch = partition.shard_batch(texts.stack(items), experiment.mesh)
    some = _texts_in(experiment, items, batch)
    sampled, temperature = None, experiment.settings.respond.temperature
    if temperature > 0:
        hidden = hidden_of(experiment.target, experiment.target_params, batch)
        how = (hidden, some.tokens, Sampling(temperature), experiment.key("curves"))
        sampled = sampled_texts(experiment.target, experiment.target_params, *how)
    # the first anchor is the one whose first drafted token is the response's second
    steps = (np.arange(_ANCHORS) * np.maximum(some.end - some.start - 1, 1)[:, None]) // _ANCHORS
    anchors = (some.start - 1)[:, None] + steps
    real = (np.diff(anchors, prepend=-1, axis=1) > 0) & (anchors + 2 < some.end[:, None])
    return _Sample(some, anchors.astype(np.int32), real, sampled)
