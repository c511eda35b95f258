"""Statistics of an evaluation: acceptance, speed, and drafters compared prompt by prompt.

Plain NumPy on what was counted for each prompt. All intervals are percentile bootstraps: prompts are drawn
with replacement as many times as there are, a statistic is computed on each of 2,000 such resamples, and the
interval reaches from the 2.5th to the 97.5th percentile. A comparison computes both drafters' statistics on
the same resamples, so that how hard a prompt is cancels out.

Shape letters: B prompts, U resamples, K window.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000


class TurnRounds(NamedTuple):
    """Verification passes of one response: tokens emitted, drafts accepted, drafts comparable."""

    emitted: np.ndarray
    accepted: np.ndarray
    offered: np.ndarray


class TurnDecoded(NamedTuple):
    """One response decoded for real: its prompt's id, its token ids, tokens by round, seconds."""

    prompt: str
    tokens: np.ndarray
    emitted: np.ndarray
    seconds: float


class Simulated(NamedTuple):
    """What the exact simulation of a drafter found on a benchmark.

    Attributes:
      prompts: `[B]` ids.
      tokens, passes: `[B]`, tokens emitted and verification passes of each prompt.
      accepted, offered: `[K]`, rounds that accepted the draft at each position, and rounds that had text to
        compare it with.
    """

    prompts: np.ndarray
    tokens: np.ndarray
    passes: np.ndarray
    accepted: np.ndarray
    offered: np.ndarray


class Decoded(NamedTuple):
    """What decoding a benchmark's prompts for real found, for each of them.

    Attributes:
      prompts: `[B]` ids.
      tokens, seconds: `[B]`, of decoding with the drafter.
      plain_tokens, plain_seconds: `[B]`, of autoregressive decoding in the same session.
      emitted, passes: `[B]`, tokens emitted by verification passes, and their number.
      identical: bool `[B]`, whether all texts are those of autoregressive decoding.
      as_simulated: bool `[B]`, whether all rounds are those of the simulation; None: texts were sampled, and
        there was nothing to compare with.
    """

    prompts: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    plain_tokens: np.ndarray
    plain_seconds: np.ndarray
    emitted: np.ndarray
    passes: np.ndarray
    identical: np.ndarray
    as_simulated: np.ndarray | None


class Measured(NamedTuple):
    """All that was measured of a drafter on a benchmark; `tree` is None where no tree was asked for."""

    chain: Simulated
    tree: Simulated | None
    decoded: Decoded


def by_prompt(owners: Sequence[str], rounds: Sequence[TurnRounds], window: int) -> Simulated:
    """The rounds of responses, added up for the prompts that own them."""
    prompts = list(dict.fromkeys(owners))
    row = {prompt: i for i, prompt in enumerate(prompts)}
    tokens, passes = np.zeros((2, len(prompts)), int)
    for owner, r in zip(owners, rounds, strict=True):
        tokens[row[owner]] += r.emitted.sum()
        passes[row[owner]] += len(r.emitted)
    accepted = np.concatenate([r.accepted for r in rounds])
    offered = np.concatenate([r.offered for r in rounds])
    position_K = np.arange(window)
    counts = ((x[:, None] > position_K).sum(0) for x in (accepted, offered))
    return Simulated(np.array(prompts), tokens, passes, *counts)


def decoded_by_prompt(
    plain: Sequence[TurnDecoded], drafted: Sequence[TurnDecoded], expected: Sequence[np.ndarray] | None
) -> Decoded:
    """Decoded responses, added up for the prompts that own them.

    Args:
      plain: autoregressive decoding of the responses.
      drafted: the same with a drafter.
      expected: emitted tokens by round, by simulation, of the same responses; None: they were sampled.
    """
    prompts = list(dict.fromkeys(turn.prompt for turn in plain))
    row = {prompt: i for i, prompt in enumerate(prompts)}
    tokens, plain_tokens, emitted, passes = np.zeros((4, len(prompts)), int)
    seconds, plain_seconds = np.zeros((2, len(prompts)))
    identical, as_simulated = np.ones((2, len(prompts)), bool)
    for i, (a, b) in enumerate(zip(plain, drafted, strict=True)):
        at = row[a.prompt]
        tokens[at] += len(b.tokens)
        seconds[at] += b.seconds
        plain_tokens[at] += len(a.tokens)
        plain_seconds[at] += a.seconds
        emitted[at] += b.emitted.sum()
        passes[at] += len(b.emitted)
        identical[at] &= np.array_equal(a.tokens, b.tokens)
        as_simulated[at] &= expected is None or np.array_equal(b.emitted, expected[i])
    rounds = None if expected is None else as_simulated
    times = (tokens, seconds, plain_tokens, plain_seconds)
    return Decoded(np.array(prompts), *times, emitted, passes, identical, rounds)


# A statistic of what was measured, on resamples given as the times that each prompt was drawn: [U, B] -> [U].
Statistic = Callable[[Any, np.ndarray], np.ndarray]


def tau(of: Simulated, drawn_UxB: np.ndarray) -> np.ndarray:
    """float64 `[U]`: tokens emitted / verification passes over all rounds (micro-average)."""
    return (drawn_UxB @ of.tokens) / (drawn_UxB @ of.passes)


def speedup(of: Decoded, drawn_UxB: np.ndarray) -> np.ndarray:
    """float64 `[U]`: tokens/s with the drafter / tokens/s of autoregressive decoding."""
    fast = (drawn_UxB @ of.tokens) / (drawn_UxB @ of.seconds)
    return fast / ((drawn_UxB @ of.plain_tokens) / (drawn_UxB @ of.plain_seconds))


def resamples(prompts: int, seed: int = 0) -> np.ndarray:
    """int `[U, B]`: how often each prompt is drawn in each resample."""
    picks = np.random.default_rng(seed).integers(0, prompts, (RESAMPLES, prompts))
    rows = np.arange(RESAMPLES)[:, None] * prompts
    return np.bincount((picks + rows).ravel(), minlength=picks.size).reshape(picks.shape)


def estimate(statistic: Statistic, benchmarks: Sequence[Any]) -> tuple[float, list[float]]:
    """The mean of a statistic over benchmarks with its 95% interval; each is resampled by itself."""
    return _interval(lambda i, drawn: statistic(benchmarks[i], drawn), [len(b.prompts) for b in benchmarks])


def difference(
    statistic: Statistic, benchmarks: Sequence[tuple[Sequence[Any], Sequence[Any]]]
) -> tuple[float, list[float]]:
    """The mean over benchmarks of a difference between drafters, with its paired 95% interval.

    Args:
      statistic: what differs.
      benchmarks: of each, what was measured of the drafters on one side and on the other, on the same
        prompts. A side of several drafters, as of repetitions, counts with the mean of their statistics.

    Raises:
      ValueError: the prompts are not the same.
    """
    for ones, others in benchmarks:
        first, *rest = *ones, *others
        if not all(np.array_equal(first.prompts, other.prompts) for other in rest):
            raise ValueError("only drafters measured on the same prompts can be compared")

    def of(i: int, drawn: np.ndarray) -> np.ndarray:
        ones, others = (np.mean([statistic(m, drawn) for m in side], 0) for side in benchmarks[i])
        return ones - others

    return _interval(of, [len(ones[0].prompts) for ones, _ in benchmarks])


def _interval(
    of: Callable[[int, np.ndarray], np.ndarray], prompts: Sequence[int]
) -> tuple[float, list[float]]:
    """The mean over benchmarks of a statistic `of(benchmark, drawn)`, and its 95% interval."""
    value = np.mean([of(i, np.ones((1, count), int)) for i, count in enumerate(prompts)])
    # other seeds for other benchmarks: their resamples are independent
    resampled = np.mean([of(i, resamples(count, seed=i)) for i, count in enumerate(prompts)], 0)
    return float(value), np.percentile(resampled, [2.5, 97.5]).tolist()


def acceptance(of: Simulated) -> dict[str, Any]:
    """tau with its interval, acceptance by position in the window, and what was counted."""
    value, ci95 = estimate(tau, [of])
    return {
        "tau": value,
        "tau_ci95": ci95,
        "accepted_per_position": (of.accepted / np.maximum(1, of.offered)).tolist(),
        "rounds": int(of.passes.sum()),
        "tokens": int(of.tokens.sum()),
    }


def speed(of: Decoded) -> dict[str, Any]:
    """Speedup of really decoded prompts, and identity of those that were decoded greedily."""
    same = {}
    if of.as_simulated is not None:
        same["identical_outputs"] = int(of.identical.sum())
        same["same_rounds_as_simulated"] = int(of.as_simulated.sum())
    return {
        "tokens_per_s": float(of.tokens.sum() / of.seconds.sum()),
        "tokens_per_s_autoregressive": float(of.plain_tokens.sum() / of.plain_seconds.sum()),
        "speedup": float(speedup(of, np.ones((1, len(of.prompts)), int))[0]),
        "decode_tau": float(of.emitted.sum() / max(1, of.passes.sum())),
        "prompts": len(of.prompts),
    } | same


def result(of: Measured) -> dict[str, Any]:
    """All about a drafter on a benchmark."""
    return acceptance(of.chain) | _tree([of]) | speed(of.decoded)


def mean(benchmarks: Sequence[Measured]) -> dict[str, Any]:
    """Averages over benchmarks, each counting as much as the others."""
    value, ci95 = estimate(tau, [of.chain for of in benchmarks])
    faster, _ = estimate(speedup, [of.decoded for of in benchmarks])
    return {"tau": value, "tau_ci95": ci95, "speedup": faster} | _tree(benchmarks)


def _tree(benchmarks: Sequence[Measured]) -> dict[str, Any]:
    if any(of.tree is None for of in benchmarks):
        return {}
    value, ci95 = estimate(tau, [of.tree for of in benchmarks])
    return {"tau_tree": value, "tau_tree_ci95": ci95}


def compared(
    benchmarks: Sequence[tuple[Sequence[Measured], Sequence[Measured]]],
) -> dict[str, dict[str, Any]]:
    """`difference`, and `difference_tree` where there are trees; benchmarks as in the function `difference`.

    The interval of the speedup's difference is that of other prompts; it does not cover slow moments of the
    machine.
    """
    value, ci95 = difference(tau, _part(benchmarks, "chain"))
    faster, faster_ci95 = difference(speedup, _part(benchmarks, "decoded"))
    found = {"difference": {"tau": value, "ci95": ci95, "speedup": faster, "speedup_ci95": faster_ci95}}
    trees = _part(benchmarks, "tree")
    if all(of is not None for pair in trees for side in pair for of in side):
        value, ci95 = difference(tau, trees)
        found["difference_tree"] = {"tau": value, "ci95": ci95}
    return found


def _part(
    benchmarks: Sequence[tuple[Sequence[Measured], Sequence[Measured]]], name: str
) -> list[tuple[list[Any], list[Any]]]:
    """One part of what was measured, in the same places."""
    part = lambda side: [getattr(of, name) for of in side]  # noqa: E731
    return [(part(ones), part(others)) for ones, others in benchmarks]


def spread(benchmark_results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation (of a sample: n - 1) over repetitions of tau, of trees too, and speedup."""
    found: dict[str, float] = {}
    for name in ("tau", "tau_tree", "speedup"):
        if all(name in result for result in benchmark_results):
            values = [result[name] for result in benchmark_results]
            found |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
    return found


def to_json(of: NamedTuple) -> dict[str, Any]:
    """`Simulated` or `Decoded` as JSON."""
    return {name: None if x is None else np.asarray(x).tolist() for name, x in of._asdict().items()}


def from_json(cls: type, values: Mapping[str, Any]) -> Any:
    """What `to_json` wrote."""
    return cls(**{name: None if x is None else np.asarray(x) for name, x in values.items()})
