"""The rounds that are shown as text are those that the simulation counts, and what they hold is the text."""

import numpy as np
import pytest
import small

from ppow_jax.decode.profile import Texts
from ppow_jax.decode.rounds import rounds_of
from ppow_jax.decode.shapes import chain
from ppow_jax.decode.simulate import simulate

K, L = 3, small.L


@pytest.fixture(scope="module")
def written(tiny, texts) -> Texts:
    tokens = np.zeros((len(texts), 8 + L), np.int32)
    for row, prompt, text in zip(tokens, small.PROMPTS, texts, strict=True):
        row[: len(prompt + text)] = prompt + text
    start = np.array([len(p) for p in small.PROMPTS], np.int32)
    end = start + np.array([len(t) for t in texts], np.int32)
    end[1] -= 4  # cut, where the target would have gone on
    return Texts(small.forward(tiny.target, tiny.params, tokens)[0].taps[:, 0], tokens, start, end)


def test_rounds_are_those_of_the_simulation(tiny, pupil, written):
    counted = simulate(tiny.drafter, pupil, *written, chain(K))
    found = rounds_of(tiny.drafter, pupil, written, K, L)
    lengths = set()
    for row, rounds in enumerate(found):
        live = np.asarray(counted.emitted[row]) > 0
        assert [r.accepted for r in rounds] == np.asarray(counted.accepted[row])[live].tolist()
        assert [len(r.drafted) for r in rounds] == np.asarray(counted.offered[row])[live].tolist()
        assert [r.accepted + len(r.own) for r in rounds] == np.asarray(counted.emitted[row])[live].tolist()
        lengths |= {r.accepted for r in rounds}
    assert lengths == set(range(K + 1))


def test_accepted_tokens_and_the_targets_own_are_the_text(tiny, pupil, written):
    for row, rounds in enumerate(rounds_of(tiny.drafter, pupil, written, K, L)):
        text = written.tokens[row, written.start[row] + 1 : written.end[row]].tolist()
        said = [token for r in rounds for token in r.drafted[: r.accepted] + r.own]
        assert said == text
        refused = [(r.drafted[r.accepted], r.own[0]) for r in rounds if r.accepted < len(r.drafted)]
        assert refused and all(drafted != own for drafted, own in refused)


def test_only_the_beginning_is_looked_at(tiny, pupil, written):
    whole = rounds_of(tiny.drafter, pupil, written, K, L)
    for row, some in enumerate(rounds_of(tiny.drafter, pupil, written, K, 7)):
        assert some == whole[row][: len(some)]
        before_the_last = sum(r.accepted + len(r.own) for r in some[:-1])
        assert before_the_last < 7 <= before_the_last + some[-1].accepted + len(some[-1].own)
