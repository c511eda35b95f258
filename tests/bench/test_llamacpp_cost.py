"""What a round costs in llama.cpp: known costs are found again, and what they predict is so."""

import pathlib

import pytest

from ppow_jax.bench.llamacpp import cost
from ppow_jax.bench.llamacpp.server import Answer, Engine
from ppow_jax.decode import profile
from ppow_jax.errors import UserError

TAU = {1: 1.5, 2: 2.0, 4: 2.5}  # tokens a round, by depth


def passing(tokens: int) -> float:
    """Seconds of a pass."""
    return 10.0 + tokens


def round_of(depth: int) -> float:
    """Seconds of a round: its pass, 3 a step of the drafter, 5 for the rest."""
    return passing(depth + 1) + 3 * depth + 5


class Given:
    """A server that takes as long as it is told; its texts have 61 tokens."""

    def __init__(self, target, context, threads, drafter=None, depth=0):
        self.drafter, self.depth = drafter, depth

    def __call__(self, ids, tokens, to_the_end=False):
        if self.drafter:
            rounds = round(60 / TAU[self.depth])
            return Answer("", 61, rounds * self.depth, 60 - rounds, rounds * round_of(self.depth))
        rounds = -(-60 // (self.depth + 1))
        return Answer("", 61, rounds * self.depth, 60 - rounds, rounds * passing(self.depth + 1))


def test_the_parts_are_found_from_the_shortest_and_the_longest_chain():
    passes = {n: passing(n) for n in range(1, 8)}
    found = cost.fit(passes, {1: round_of(1), 6: round_of(6)})
    assert found.draft == pytest.approx(3)
    assert found.rest == pytest.approx(5)
    assert [found.round(depth) for depth in (1, 2, 4, 6)] == pytest.approx(
        [round_of(d) for d in (1, 2, 4, 6)]
    )


def test_a_text_that_does_not_repeat_itself_tells_no_pass():
    short = lambda ids, tokens, to_the_end: Answer("", 61, 12, 6, 1.0)  # noqa: E731
    with pytest.raises(UserError, match="a pass of 4 tokens cannot be timed"):
        cost.measure_pass(short, 3, [1] * 8)


def test_the_tables(monkeypatch, capsys):
    """A token takes 11 alone. Chains of 2 need 24 / 11 = 2.18 tokens a round, have 2.2 on held-out texts."""
    monkeypatch.setattr(cost, "Server", Given)
    monkeypatch.setattr(Engine, "server", lambda self, depth, _: Given(0, 0, 1, depth and "drafter", depth))

    class Profiled:
        def tau(self, tokens, depth):
            assert tokens == depth + 1
            return 2.2

    class Candidate:
        drafter = weights = None

    monkeypatch.setattr(profile, "measure", lambda *about: Profiled())
    engine = Engine(pathlib.Path("t"), pathlib.Path("d"), 1, "it")
    cost.costs(Candidate, engine, None, {"a": [7] * 8, "b": [8] * 9}, 61, [1, 2, 4])
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    table = {row[0]: row[1:] for row in rows}
    assert table["a token without drafter"] == ["11000.00", "1.00"]
    assert table["target pass, 3 tokens"] == ["13000.00", "1.18"]
    assert table["drafter, a step"] == ["3000.00", "0.27"]
    assert table["drafter, the rest of a round"] == ["5000.00", "0.45"]
    assert table["chain:2"] == ["2.18", "2.18", "2.20", "1.01x", "2.00", "0.92x"]
