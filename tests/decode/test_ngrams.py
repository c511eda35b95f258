"""Drafters without training, alone and beside the trained one: what they propose; texts stay the same."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.decode import shapes, verify
from ppow_jax.decode.drafting import Eagle, Together, VerifiedTokens
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.ngrams import NOTHING, Lookahead, Lookup
from ppow_jax.decode.sampling import GREEDY, Sampling

PROMPTS, L, NEVER = small.PROMPTS, small.L, small.NEVER
TREE = shapes.Dynamic(9, 3, 3)
DRAFTERS = {
    "lookup": Lookup(3),
    "two lookups": Lookup(4, branches=2, ngram=2),
    "lookahead": Lookahead(40, columns=3, ngram=4, candidates=2),
    "trigrams": Lookahead(40, columns=2, ngram=3, candidates=1),
}


def seen_of(text: list[int], slots: int) -> VerifiedTokens:
    """A prompt, the last token of `text` being the first that the target wrote."""
    following = np.full((1, slots), 7, np.int32)
    following[0, : len(text) - 1] = text[1:]
    return VerifiedTokens(None, jnp.array(following), jnp.zeros(1, jnp.int32), jnp.array([len(text) - 2]))


def proposed(drafter: Lookup, text: list[int]) -> list[list[int]]:
    """The branches that `drafter` proposes after a text, the first token of which it never sees."""
    state = drafter.read(None, None, seen_of(text, len(text) + 3))
    draft = drafter.draft(None, drafter.grow(state, 40), GREEDY, None)
    tokens, parents = draft.tokens[0].tolist(), draft.parents[0].tolist()
    assert tokens[0] == text[-1]
    found = []
    for node in (n for n, parent in enumerate(parents) if n and parent == 0):
        branch = [tokens[node]]
        while node in parents[1:]:
            node = parents.index(node, 1)
            branch.append(tokens[node])
        found.append(branch)
    return found


def test_what_followed_the_longest_match_is_proposed_and_of_equals_the_latest():
    text = [0, 1, 2, 3, 9, 2, 3, 8, 1, 2, 3]
    assert proposed(Lookup(3, ngram=3), text) == [[9, 2, 3]]  # 1 2 3
    assert proposed(Lookup(3, ngram=2), text) == [[8, 1, 2]]  # 2 3, the latest
    assert proposed(Lookup(2, branches=3), text) == [[9, 2], [8, 1], [NOTHING] * 2]


def test_a_text_that_repeats_itself_is_taken_to_go_on():
    assert proposed(Lookup(5), [0, 4, 5, 6, 5, 6]) == [[5, 6, 5, 6, 5]]
    assert proposed(Lookup(3), [0, 4, 4]) == [[4, 4, 4]]


def test_branches_begin_with_different_tokens():
    text = [0, 3, 8, 3, 8, 3, 9, 5, 3]
    assert proposed(Lookup(2, branches=3, ngram=1), text) == [[9, 5], [8, 3], [NOTHING] * 2]


@pytest.mark.parametrize("text", [[0, 1], [0, 1, 2, 3]])
def test_without_a_match_nothing_is_proposed(text):
    assert proposed(Lookup(2), text) == [[NOTHING] * 2]


def test_what_was_read_later_is_looked_up_and_what_was_refused_is_not():
    drafter = Lookup(2)
    state = drafter.grow(drafter.read(None, None, seen_of([0, 1, 2], 4)), 20)
    again = VerifiedTokens(
        None, jnp.array([[5, 1, 6, 7]]), jnp.array([2]), jnp.array([1])
    )  # 6 and 7 do not count
    state = drafter.read(None, state, again)
    assert state.tokens[0, :7].tolist() == [NOTHING, 1, 2, 5, 1, NOTHING, NOTHING]
    assert drafter.draft(None, state, GREEDY, None).tokens.tolist() == [[1, 2, 5]]


ALONE_AND_BESIDE = [*((name, False) for name in DRAFTERS), ("lookahead", True)]
ALONE_AND_BESIDE += [pytest.param("lookup", True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "beside"), ALONE_AND_BESIDE)
def test_texts_are_the_targets_own(tiny, texts, pupil, name, beside):
    """Drafters alone, and beside the trained one."""
    drafting, weights = DRAFTERS[name], None
    if beside:
        drafting, weights = Together(Eagle(tiny.drafter, TREE), drafting), (pupil, None)
    out = small.generate(tiny, PROMPTS, DecodeConfig(L, NEVER), drafting, weights)
    assert out.tokens.tolist() == texts
    assert out.emitted_by_round.max() > 1
    config = DecodeConfig(L, NEVER, Sampling(0.7, top_k=4))
    plain = small.generate(tiny, PROMPTS, config)
    sampled = small.generate(tiny, PROMPTS, config, drafting, weights)
    assert sampled.tokens.tolist() == plain.tokens.tolist()


def test_two_drafters_accept_what_the_better_one_does(chain):
    """The trained one is wrong after two letters of the cycle, lookup until the cycle has closed."""
    drafter, weights = small.flawed(chain, (8, 19))
    eagle, lookup, config = Eagle(drafter, shapes.chain(4)), Lookup(4), DecodeConfig(80, NEVER)
    rounds = {}
    for name, *drafting in (
        ("eagle", eagle, weights),
        ("lookup", lookup),
        ("both", Together(eagle, lookup), (weights, None)),
    ):
        out = small.generate(chain, [[5]], config, *drafting, padded=1)
        assert out.tokens[0].tolist() == small.walk(5, 80)
        rounds[name] = small.rounds_of(out, 0)
    closed = next(n for n in range(80) if 1 + sum(rounds["both"][:n]) >= 28)
    assert rounds["both"][: closed - 1] == rounds["eagle"][: closed - 1]
    assert set(rounds["both"][closed:-1]) == {5}
    assert len(rounds["both"]) < min(len(rounds["eagle"]), len(rounds["lookup"]))


class Given(NamedTuple):
    """A drafter of one given tree."""

    tree: verify.Draft
    tokens: int

    def draft(self, *_) -> verify.Draft:
        return self.tree


def test_two_trees_share_their_root_and_keep_their_branches():
    drawn = verify.Drawn(
        jnp.zeros((1, 2, 5)), jnp.array([0, 1, 0]), jnp.array([[1], [2], [-1]]), jnp.arange(5)
    )
    one = Given(verify.Draft(jnp.array([[9, 1, 2]]), jnp.array([[0, 0, 1]]), drawn), 3)
    two = Given(verify.Draft(jnp.array([[9, 3, 4, 5]]), jnp.array([[0, 0, 1, 0]])), 4)
    both = Together(one, two).draft((None, None), (None, None), GREEDY, None)
    assert both.tokens.tolist() == [[9, 1, 2, 3, 4, 5]]
    assert both.parents.tolist() == [[0, 0, 1, 0, 3, 0]]
    assert both.drawn.children.tolist() == [[1], [2], [-1], [-1], [-1], [-1]]
    assert both.drawn.row.tolist()[:3] == [0, 1, 0]


def test_beside_a_drafter_that_draws_the_distribution_is_still_the_targets(chain):
    rows, how = 256, Sampling(1.0)
    prompts = [[4 + i % 8] * 2 for i in range(rows)]
    drafter, weights = small.flawed(chain, (8, 19), np.delete(small.LETTERS, [2, 11]))
    drafting = Together(Eagle(drafter, shapes.group(2, 3)), Lookup(2, 2))
    config = DecodeConfig(12, NEVER, how)
    out = small.generate(chain, prompts, config, drafting, (weights, None), padded=2)
    text = np.concatenate([np.array(prompts)[:, 1:], np.asarray(out.tokens)], 1)
    counts = np.zeros_like(chain.probs)
    np.add.at(counts, (text[:, :-1].ravel(), text[:, 1:].ravel()), 1)
    small.check_counts(counts.ravel(), (counts.sum(-1, keepdims=True) * chain.probs).ravel())


def test_the_second_of_two_drafters_may_not_draw(chain):
    drafter, weights = small.flawed(chain, ())
    eagle = Eagle(drafter, shapes.chain(2))
    config = DecodeConfig(4, NEVER, Sampling(1.0))
    with pytest.raises(ValueError, match="only the first may draw"):
        small.generate(chain, [[5]], config, Together(Lookup(2), eagle), (None, weights))


def test_on_the_chains_cycle_lookup_is_right_from_the_second_time_on(chain):
    """27 letters go by one at a time; then every window is right."""
    count = 60
    out = small.generate(chain, [[5]], DecodeConfig(count, NEVER), Lookup(4), padded=1)
    assert out.tokens[0].tolist() == small.walk(5, count)
    # the prompt itself is not looked up: the 28th letter after it is the first that was seen before
    assert small.rounds_of(out, 0) == [1] * 27 + [5] * 6 + [2]


def test_lookaheads_pool_learns_true_ngrams_of_the_chain(chain):
    """Fed by hand for six rounds: once its rows were all written by the target, every column is a walk."""
    drafter = Lookahead(small.markov.SIZE, columns=3, ngram=4, candidates=2)
    state = drafter.read(None, None, seen_of([0, 9, 5, 17, 20, 6], 8))
    successors = small.successors()
    for _ in range(6):
        draft = drafter.draft(None, state, GREEDY, None)
        above = np.asarray(verify.ancestors(draft.parents, drafter.depth))[0]
        assert above.sum(-1).max() == drafter.depth + 1
        said = jnp.asarray(successors[np.maximum(np.asarray(draft.tokens), 0)])
        new = VerifiedTokens(None, said[:, :1], jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), True, said)
        state = drafter.read(None, state, new)
    for column in np.asarray(state.window)[0].T:
        assert column.tolist() == [column[0], *small.walk(int(column[0]), 2)]
    true = [g for t in range(small.markov.SIZE) for g in state.grams[0, t].tolist() if g == small.walk(t, 3)]
    assert len(true) >= 3
    token = next(t for t in range(small.markov.SIZE) if small.walk(t, 3) in state.grams[0, t].tolist())
    offered = drafter.draft(None, state._replace(last=jnp.array([token])), GREEDY, None)
    assert small.walk(token, 3) in offered.tokens[0, 1:7].reshape(2, 3).tolist()


def test_an_ngram_is_kept_once_and_the_oldest_gives_way():
    drafter = Lookahead(10, columns=1, ngram=3, candidates=2)
    grams, count = jnp.full((10, 2, 2), NOTHING), jnp.zeros(10, jnp.int32)
    for rest in ([4, 5], [4, 5], [6, 7], [8, 9], [6, 7]):
        grams, count = drafter._add(grams, count, jnp.array([[3], [rest[0]], [rest[1]]]))
    assert grams[3].tolist() == [[8, 9], [6, 7]]
    assert (np.delete(np.asarray(grams), 3, 0) == NOTHING).all()


def test_columns_hang_from_the_first_row():
    drafter = Lookahead(10, columns=3, ngram=4, candidates=1)
    assert drafter._parents() == [0, 0, 1, 2, 0, 4, 5, 4, 5, 6, 7, 8, 9]
