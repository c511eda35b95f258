"""What a round costs in llama.cpp, and which length of chain pays there.

A round is a pass of the target over K + 1 tokens, K steps of the drafter, and what does not depend on K. A
pass is timed where the drafts cost nothing: a text that repeats itself, its next tokens looked up in what was
written before. What the rounds of the shortest and of the longest chain take beyond their passes gives the
drafter's step and the rest; those of the chains between are predicted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ppow_jax.bench.llamacpp.compare import rate
from ppow_jax.bench.llamacpp.server import Answer, Engine, Server, room
from ppow_jax.bench.machine import show
from ppow_jax.decode import profile
from ppow_jax.decode.profile import Texts
from ppow_jax.errors import UserError
from ppow_jax.parallel.console import log
from ppow_jax.report.measure import Candidate

SIZES = (1, 2, 3, 4, 6, 8)  # tokens of the passes that are always measured
_CYCLE, _TURNS = 8, 12  # tokens of what the repeated text repeats, and how often
_WRITTEN = 64  # tokens that it is continued by


class Costs(NamedTuple):
    """Seconds in llama.cpp.

    Attributes:
      passes: of a target pass, with the rest of a round without drafter, by its number of tokens.
      draft: of a drafter's step.
      rest: of what a drafter adds to a round, however many tokens it drafts.
    """

    passes: Mapping[int, float]
    draft: float
    rest: float

    def round(self, depth: int) -> float:
        """Seconds of a round with a chain of `depth`."""
        return self.passes[depth + 1] + depth * self.draft + self.rest


def fit(passes: Mapping[int, float], rounds: Mapping[int, float]) -> Costs:
    """The costs that the rounds of the shortest and of the longest chain have.

    Args:
      passes: seconds of passes by tokens, those of all chains among them.
      rounds: seconds of a round by depth of its chain; two or more.
    """
    first, last = min(rounds), max(rounds)
    beyond = {depth: rounds[depth] - passes[depth + 1] for depth in (first, last)}
    draft = (beyond[last] - beyond[first]) / (last - first)
    return Costs(passes, draft, beyond[first] - first * draft)


def measure_pass(server: Server, depth: int, ids: Sequence[int]) -> float:
    """Seconds of a pass over depth + 1 tokens.

    Raises:
      UserError: the text does not repeat itself, so that not every round has a whole draft.
    """
    answer = server([*ids[:_CYCLE]] * _TURNS, _WRITTEN, to_the_end=True)
    # the last round may have room for fewer tokens than a draft has
    if depth * (answer.rounds - 1) > answer.drafted:
        raise UserError(
            f"the target does not go on with a text that repeats itself ({answer.drafted} tokens drafted in "
            f"{answer.rounds} rounds): a pass of {depth + 1} tokens cannot be timed"
        )
    return answer.seconds / answer.rounds


def costs(
    candidate: Candidate,
    engine: Engine,
    held_out: Texts,
    asked: dict[str, list[int]],
    tokens: int,
    depths: Sequence[int],
) -> None:
    """Measures, predicts, measures again; prints two tables.

    Args:
      candidate: the drafter.
      engine: llama.cpp with it.
      held_out: texts of the target, on which acceptance is profiled for the prediction.
      asked: ids of prompts that are decoded.
      tokens: to write at most.
      depths: tokens drafted a round; two or more.
    """
    context = room({"": [0] * _CYCLE * _TURNS, **asked}, max(tokens, _WRITTEN))
    plain = engine.server(0, context)
    lookups = {n: Server(engine.target, context, engine.threads, depth=n - 1) for n in _sizes(depths)}
    servers = {depth: engine.server(depth, context) for depth in depths}
    answers: dict[int, list[Answer]] = {depth: [] for depth in (0, *depths)}
    passes: dict[int, list[float]] = {n: [] for n in lookups}
    for number, ids in enumerate(asked.values(), 1):  # all in turn: a slow moment hits them alike
        for n, server in lookups.items():
            passes[n].append(measure_pass(server, n - 1, ids))
        answers[0].append(plain(ids, tokens))
        for depth, server in servers.items():
            answers[depth].append(server(ids, tokens))
        log.info("cost: %d/%d prompts", number, len(asked))
    seconds = {n: sorted(of)[len(of) // 2] for n, of in passes.items()}
    rounds = {d: sum(a.seconds for a in answers[d]) / sum(a.rounds for a in answers[d]) for d in depths}
    found, step = fit(seconds, rounds), 1 / rate(answers[0])
    rows = [["a token without drafter", f"{step * 1e3:.2f}", "1.00"]]
    rows += [
        [f"target pass, {n} tokens", f"{s * 1e3:.2f}", f"{s / step:.2f}"] for n, s in found.passes.items()
    ]
    parts = {"drafter, a step": found.draft, "drafter, the rest of a round": found.rest}
    rows += [[name, f"{s * 1e3:.2f}", f"{s / step:.2f}"] for name, s in parts.items()]
    show(f"costs in llama.cpp, {engine.name}", ["part", "ms", "tokens without drafter"], rows)
    accepted = profile.measure(candidate.drafter, candidate.weights, held_out, max(depths), 1)
    rows = []
    for depth in depths:
        takes = found.round(depth) / step
        tau = accepted.tau(depth + 1, depth)
        real = sum(a.tokens - 1 for a in answers[depth]) / sum(a.rounds for a in answers[depth])
        rows.append(
            [
                f"chain:{depth}",
                f"{takes:.2f}",
                f"{rounds[depth] / step:.2f}",
                f"{tau:.2f}",
                f"{tau / takes:.2f}x",
                f"{real:.2f}",
                f"{rate(answers[depth]) * step:.2f}x",
            ]
        )
    columns = ["draft", "round = tau that pays", "measured", "tau, held-out", "predicted speedup"]
    columns += ["tau, prompts", "measured speedup"]
    show(f"chains, {engine.name}, {len(asked)} prompts", columns, rows)


def _sizes(depths: Sequence[int]) -> list[int]:
    return sorted({*SIZES, *(depth + 1 for depth in depths)})
