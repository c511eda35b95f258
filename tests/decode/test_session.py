"""Decoding as a user meets it: prompts in, tokens out, nothing compiled twice, edges with known answers."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import small

from ppow_jax.decode import loop, shapes, watching
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.ngrams import Lookahead, Lookup
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.session import Session, bucket
from ppow_jax.errors import UserError

L, NEVER = small.L, small.NEVER
SHAPES = {"chain": shapes.chain(3), "tree": shapes.Dynamic(9, 3, 3)}


def session(
    chain, name: str | None, count: int = L, stops: tuple[int, ...] = NEVER, context: int = 512
) -> Session:
    """The chain, with a drafter that is always right."""
    target = type(chain.target)(dataclasses.replace(chain.target.config, context=context))
    config = DecodeConfig(count, stops)
    if name is None:
        return Session(target, chain.params, config)
    drafter, weights = small.flawed(chain, ())
    return Session(target, chain.params, config, Eagle(drafter, SHAPES[name]), weights)


def test_a_second_prompt_compiles_nothing(chain):
    decoder = session(chain, "tree")
    decoder([[5, 6, 7]])
    before = loop._decode._cache_size()
    for ids in ([9], list(range(4, 31)) * 2):
        out = decoder([ids])
        assert out.tokens[0].tolist() == small.walk(ids[-1], L)
    assert loop._decode._cache_size() == before
    decoder([[5] * 65])
    assert loop._decode._cache_size() == before + 1


def test_buckets_are_few_and_close():
    lengths = range(1, 5000)
    assert sorted({bucket(n) for n in lengths})[:8] == [64, 96, 128, 192, 256, 384, 512, 768]
    assert all(n <= bucket(n) < max(65, 1.5 * n) for n in lengths)


@pytest.mark.parametrize("name", [None, *SHAPES])
def test_those_who_watch_see_the_tokens_in_order_as_they_come(chain, name):
    stop = small.walk(5, 9)[-1]
    decoder, seen = session(chain, name, stops=(stop,)), []

    def watch(w):
        seen.append([tokens[:kept].tolist() for tokens, kept in zip(w.tokens, w.kept, strict=True)])

    out = decoder([[5], [5, 6]], watch=watch)
    for row in range(2):
        parts = [round_[row] for round_ in seen]
        assert list(itertools.chain(*parts)) == out.tokens[row, : out.emitted[row]].tolist()
        assert [len(p) for p in parts[1:] if p] == small.rounds_of(out, row)
    assert len(seen[0][0]) == 1 and not watching._watchers
    count = loop._decode._cache_size()
    decoder([[7], [8]], watch=lambda watched: None)  # another watcher, the same program
    assert loop._decode._cache_size() == count


@pytest.mark.parametrize("error", [KeyError("enough"), KeyboardInterrupt("enough")])
def test_a_watcher_that_fails_is_heard(chain, error):
    def watch(watched):
        raise error

    with pytest.raises(type(error), match="enough"):
        session(chain, None)([[5]], watch=watch)
    assert not watching._watchers


@pytest.mark.parametrize("name", [None, *SHAPES])
def test_a_text_ends_with_the_targets_context_inside_a_window(chain, name):
    """Prompts that leave room for 1, 2, 6 and 15 tokens."""
    prompts = [[4 + i % 27 for i in range(n)] for n in (15, 14, 10, 1)]
    out = session(chain, name, context=16)(prompts)
    room = [1, 2, 6, 15]
    assert out.emitted.tolist() == room
    assert not out.finished.any()
    for row, (ids, n) in enumerate(zip(prompts, room, strict=True)):
        assert out.tokens[row].tolist() == small.walk(ids[-1], n) + [0] * (L - n)
    if name:
        assert [small.rounds_of(out, row) for row in range(4)] == [[], [1], [4, 1], [4, 4, 4, 2]]


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_that_ends_in_the_prefill_leaves_the_others_alone(chain, name):
    stop = small.walk(5, 1)[0]
    prompts = [[5], [int(np.flatnonzero(small.successors() == 5)[-1])], [9]]
    out = session(chain, name, stops=(stop,))(prompts)
    texts = [[stop], [5, stop], small.walk(9, small.walk(9, 40).index(stop) + 1)[:L]]
    assert [out.tokens[row, : out.emitted[row]].tolist() for row in range(3)] == texts
    assert small.rounds_of(out, 0) == []
    assert small.rounds_of(out, 1) == [1]
    assert out.finished.tolist() == [True, True, texts[2][-1] == stop]


def test_past_max_new_tokens_nothing_is_emitted(chain):
    for count, rounds in ((1, []), (4, [3])):
        out = session(chain, "tree", count)([[9]])
        assert out.tokens[0].tolist() == small.walk(9, count)
        assert small.rounds_of(out, 0) == rounds


def test_a_token_that_the_drafter_does_not_have_is_the_targets_own(chain):
    missing = small.walk(9, 6)[4:]  # the fifth and sixth token after 9
    vocab = small.LETTERS[~np.isin(small.LETTERS, missing)]
    drafter, weights = small.flawed(chain, (), vocab)
    for shape in SHAPES.values():
        out = Session(chain.target, chain.params, DecodeConfig(10, NEVER), Eagle(drafter, shape), weights)(
            [[9]]
        )
        assert out.tokens[0].tolist() == small.walk(9, 10)
        # prefill 1; three drafted and the missing fifth; the missing sixth alone; the rest
        assert small.rounds_of(out, 0) == [4, 1, 4]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("tree", Sampling()),
        ("lookup", Sampling()),
        pytest.param("lookahead", Sampling(), marks=pytest.mark.slow),
        pytest.param("chain", Sampling(1.0), marks=pytest.mark.slow),
        pytest.param("tree", Sampling(1.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_batch_of_1_4_or_16_gives_the_same_texts(tiny, pupil, name, how):
    """Each row has its own length, its own key and its own way through the trees."""
    others = {"lookup": Lookup(3, 2), "lookahead": Lookahead(40, 3)}
    drafting = others.get(name) or Eagle(tiny.drafter, SHAPES[name])
    weights = None if name in others else pupil
    decoder = Session(tiny.target, tiny.params, DecodeConfig(L, (12,), how), drafting, weights)
    prompts = [small.PROMPTS[i % 5] + [i] for i in range(16)]
    keys = jax.random.split(jax.random.key(2), 16)
    whole = decoder(prompts, keys)
    assert len(set(whole.emitted.tolist())) > 2
    for size in (1, 4):
        for at in range(0, 16 if size == 4 else 5, size):
            some = slice(at, at + size)
            out = decoder(prompts[some], keys[some])
            assert out.tokens.tolist() == whole.tokens[some].tolist()
            assert out.emitted_by_round.tolist() == whole.emitted_by_round[some].tolist()


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([], "no prompt"), ([[5], []], "prompt 1: found 0 tokens, expected 1 to 15"),
     ([[5] * 16], "prompt 0: found 16 tokens"), ([[5, 31]], "found token id 31, expected 0 to 30"),
     ([[-1]], "found token id -1")],
)  # fmt: skip
def test_prompts_that_cannot_be_decoded_are_named(chain, prompts, says):
    with pytest.raises(UserError, match=says):
        session(chain, None, context=16)(prompts)
