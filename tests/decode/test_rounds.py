"""The rounds that are shown as text are those that the simulation counts, and what they hold is the text.

Those that are watched while a text is decoded are the same.
"""

import numpy as np
import pytest
import small

from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Drafting, Eagle, Together
from ppow_jax.decode.loop import DecodeConfig, Decoded
from ppow_jax.decode.ngrams import Lookup
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.rounds import Round, rounds_of, seen
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.session import Session
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


def watched(
    chain: small.Chain,
    drafting: Drafting | None,
    weights,
    prompts: list[list[int]],
    stops: tuple[int, ...] = small.NEVER,
    sampling: Sampling = Sampling(),  # noqa: B008
    scores: bool = False,
) -> tuple[Decoded, list[list[Round]]]:
    """What is decoded, and the rounds of each prompt until it ends."""
    found: list[list[Round]] = [[] for _ in prompts]

    def watch(told):
        for row, rounds in enumerate(found):
            if told.kept[row]:
                rounds.append(seen(told, row))

    config = DecodeConfig(L, stops, sampling)
    session = Session(chain.target, chain.params, config, drafting, weights)
    return session(prompts, watch=watch, scores=scores), found


@pytest.mark.parametrize("shape", ["chain:3", "tree:9x3x3", "paths:0-0-0,1-0", "none", "lookup", "together"])
def test_watched_rounds_add_up_to_the_text(chain, shape):
    drafter, weights = small.flawed(chain, (7, 12))
    kinds = {"none": (None, None), "lookup": (Lookup(3), None)}
    kinds["together"] = (Together(Eagle(drafter, shapes.chain(3)), Lookup(2)), (weights, None))
    drafting, own = kinds.get(shape) or (Eagle(drafter, shapes.parse(shape)), weights)
    out, found = watched(chain, drafting, own, [[5], [5, 9, 5, 9], [8]], (small.walk(8, 9)[-1],))
    for row, rounds in enumerate(found):
        text = out.tokens[row, : out.emitted[row]].tolist()
        assert [token for r in rounds for token in r.tokens] == text
        assert [len(r.tokens) for r in rounds[1:]] == small.rounds_of(out, row)
        assert rounds[0].drafted == [] and rounds[0].nodes == () and len(rounds[0].own) == 1
        for r in rounds[1:]:
            assert len(r.nodes) == (drafting.tokens - 1 if drafting else 0)
            assert all(node.parent < number for number, node in enumerate(r.nodes))
            assert set(r.drafted) <= {node.token for node in r.nodes}
            assert not r.own or r.own[0] not in r.drafted[r.accepted :][:1]


def test_a_flawed_drafter_is_seen_to_be_wrong_where_it_is(chain):
    """What comes after one token it does not know: a pass accepts what is before, and nothing behind."""
    text, at = small.walk(5, L), 5
    drafter, weights = small.flawed(chain, (text[at],))
    for shape in ("chain:3", "tree:4x3x1"):
        _, (rounds,) = watched(chain, Eagle(drafter, shapes.parse(shape)), weights, [[5]])
        done, refused = 1, 0
        for r in rounds[1:]:
            right = min(3, at - done + 1) if at >= done - 1 else 3
            right = min(right, L - done)
            assert r.accepted == right, (shape, done)
            assert r.drafted[:right] == text[done : done + right]
            assert r.own == text[done + right : done + right + 1]
            if right < 3 and r.own:
                assert r.drafted[right] != text[done + right] and len(r.drafted) == 3
                refused += 1
            done += len(r.tokens)
        assert refused == 1


@pytest.mark.parametrize("shape", ["chain:3", "tree:9x3x3", "paths:0-0,1-0"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_log_probabilities_are_those_of_both_models(chain, shape, temperature):
    probs = np.full((len(chain.probs), len(small.LETTERS)), 0.5 / len(small.LETTERS))
    probs[np.arange(len(probs)), np.arange(len(probs)) % len(small.LETTERS)] += 0.5
    drafter, weights = chain.drafter(probs, small.LETTERS)
    how = Sampling(temperature)
    _, (rounds,) = watched(
        chain, Eagle(drafter, shapes.parse(shape)), weights, [[5]], sampling=how, scores=True
    )

    def expected(row: np.ndarray, token: int) -> float:
        with np.errstate(divide="ignore"):
            logits = np.log(row) / (temperature or 1.0)
        return logits[token] - np.log(np.exp(logits).sum())

    last = rounds[0].own[0]
    for r in rounds[1:]:
        for node in r.nodes:
            above = last if node.parent < 0 else r.nodes[node.parent].token
            draft_id = small.LETTERS.tolist().index(node.token)
            assert node.drafter == pytest.approx(expected(probs[above], draft_id), abs=1e-3)
            assert node.target == pytest.approx(expected(chain.probs[above], node.token), abs=1e-3)
        last = r.tokens[-1]


def test_n_grams_have_no_log_probabilities_and_none_are_told_unasked(chain):
    drafter, weights = small.flawed(chain, ())
    both = Together(Eagle(drafter, shapes.chain(2)), Lookup(2))
    _, (rounds,) = watched(chain, both, (weights, None), [[5, 6, 5]], scores=True)
    nodes = rounds[-1].nodes
    assert [node.drafter is None for node in nodes] == [False, False, True, True]
    assert [node.target is None for node in nodes] == [node.token < 0 for node in nodes]
    _, (rounds,) = watched(chain, both, (weights, None), [[5, 6, 5]])
    assert {(node.drafter, node.target) for r in rounds for node in r.nodes} == {(None, None)}
