"""Lossless decoding: the text is the target's own, whatever drafts it; and simulation is decoding."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.simulate import simulate
from ppow_jax.drafters import eagle3

PROMPTS, L, NEVER, LETTERS = small.PROMPTS, small.L, small.NEVER, small.LETTERS
FEW = np.concatenate([[0, 1, 3], np.delete(LETTERS, [2, 11, 23])])  # three letters it cannot draft


def greedy(stops: tuple[int, ...] = NEVER, count: int = L) -> DecodeConfig:
    return DecodeConfig(count, stops)


def rounds_by_hand(prompt, text, window, wrong, vocab=LETTERS) -> list[int]:
    """Tokens of each verification pass, walked in plain Python; the first token is prefill's."""
    row = prompt[-1:] + text
    at, rounds = 1, []  # row[at] is the last known token
    while at + 1 < len(row):
        k = 0
        while k < window and row[at + k] not in wrong and small.successors()[row[at + k]] in vocab:
            k += 1
            if at + k + 1 == len(row):
                break
        rounds.append(min(k + 1, len(row) - 1 - at))
        at += rounds[-1]
    return rounds


def test_autoregressive_text_is_that_of_reading_everything_again_for_every_token(tiny, texts):
    out = small.generate(tiny, PROMPTS, greedy())
    assert out.tokens.tolist() == texts
    assert out.emitted.tolist() == [L] * len(PROMPTS)
    assert not out.finished.any()
    assert small.rounds_of(out, 0) == [1] * (L - 1)


@pytest.mark.parametrize("window", [1, 7])
def test_drafted_text_is_the_targets_own_and_simulation_counts_the_same_rounds(tiny, texts, pupil, window):
    weights = [small.random_weights(s, tiny.params) for s in (1, 2)] + [pupil]
    for number, w in enumerate(weights):
        out = small.generate(tiny, PROMPTS, greedy(), Eagle(tiny.drafter, shapes.chain(window)), w)
        assert out.tokens.tolist() == texts
        assert (out.emitted_by_round.sum(1) == out.emitted - 1).all()
        assert simulated(tiny, tiny.drafter, w, texts, shapes.chain(window)) == [
            small.rounds_of(out, row) for row in range(len(PROMPTS))
        ]
        if number == 2:  # else nothing but refusals would have been seen
            longest = int(out.emitted_by_round.max())
            assert longest > min(window, 2)


@pytest.mark.parametrize("shape", [pytest.param("chain:3", marks=pytest.mark.slow), "tree:8x3x3"])
def test_a_drafter_of_two_layers_drafts_as_in_the_simulation(tiny, texts, pupil, shape):
    """Its second layer attends to what the first made of the text, read piece by piece or at once."""
    config = dataclasses.replace(tiny.drafter.config, layers=2)
    second = small.randomise(eagle3.abstract_params(config)["layers_0"], 4)
    weights = pupil._replace(params=pupil.params | {"layers_0": second})
    drafter = eagle3.Drafter(config)
    out = small.generate(tiny, PROMPTS, greedy(), Eagle(drafter, shapes.parse(shape)), weights)
    assert out.tokens.tolist() == texts
    rounds = [small.rounds_of(out, row) for row in range(len(PROMPTS))]
    assert simulated(tiny, drafter, weights, texts, shapes.parse(shape)) == rounds
    assert max(map(max, rounds)) > 2
    shallow = small.generate(tiny, PROMPTS, greedy(), Eagle(tiny.drafter, shapes.parse(shape)), pupil)
    assert rounds != [small.rounds_of(shallow, row) for row in range(len(PROMPTS))]


def simulated(pair, drafter, weights, texts, shape, prompts=PROMPTS) -> list[list[int]]:
    """Emitted counts of the simulated rounds of every text."""
    tokens = np.zeros((len(texts), 8 + L), np.int32)
    for row, prompt, text in zip(tokens, prompts, texts, strict=True):
        row[: len(prompt + text)] = prompt + text
    start = np.array([len(p) for p in prompts], np.int32)
    end = start + np.array([len(t) for t in texts], np.int32)
    taps = small.forward(pair.target, pair.params, tokens)[0].taps[:, 0]
    rounds = simulate(drafter, weights, taps, tokens, start, end, shape)
    emitted, accepted = np.asarray(rounds.emitted), np.asarray(rounds.accepted)
    live = emitted > 0
    assert (accepted[~live] == -1).all()
    assert (accepted <= rounds.offered)[live].all()
    ahead = end[:, None] - start[:, None] - 1 - np.cumsum(emitted, 1) + emitted
    assert (np.asarray(rounds.offered) == np.where(live, np.minimum(shape.depth, ahead), 0)).all()
    assert (emitted == np.minimum(accepted + 1, ahead))[live].all()
    return [row[row > 0].tolist() for row in emitted]


def test_rounds_of_drafters_with_known_flaws_are_those_walked_by_hand(chain):
    prompts = [[5, 6], [9], [4, 4, 30], [17]]
    texts = [small.walk(p[-1], L) for p in prompts]
    for wrong, vocab in (((), LETTERS), ((8, 19, 30), LETTERS), ((), FEW), ((8, 19), FEW)):
        drafter, weights = small.flawed(chain, wrong, vocab)
        out = small.generate(chain, prompts, greedy(), Eagle(drafter, shapes.chain(3)), weights)
        assert out.tokens.tolist() == texts
        walked = [
            rounds_by_hand(prompt, text, 3, wrong, vocab) for prompt, text in zip(prompts, texts, strict=True)
        ]
        assert [small.rounds_of(out, row) for row in range(4)] == walked
        assert simulated(chain, drafter, weights, texts, shapes.chain(3), prompts) == walked


def test_a_perfect_drafter_emits_whole_windows(chain):
    drafter, weights = chain.drafter(chain.probs[:, LETTERS], LETTERS)
    out = small.generate(chain, [[5], [9], [4], [17]], greedy(), Eagle(drafter, shapes.chain(3)), weights)
    assert [small.rounds_of(out, row) for row in range(4)] == [[4, 4, 4, 4, 3]] * 4  # 1 + 19 = L


def test_a_stop_token_ends_the_text_wherever_it_falls_in_a_window(chain):
    """Row r stops at its token r + 1: prefill's, accepted ones, and those that the target adds."""
    stop = 6
    before = small.walk(stop, 27)  # once round the cycle: the last but r is r tokens away from the stop
    prompts = [[before[-2 - row]] for row in range(9)]
    drafter, weights = small.flawed(chain, ())
    plain = small.generate(chain, prompts, greedy((1, stop)))
    drafted = small.generate(chain, prompts, greedy((1, stop)), Eagle(drafter, shapes.chain(3)), weights)
    texts = [small.walk(prompt[0], row + 1) for row, prompt in enumerate(prompts)]
    assert all(text[-1] == stop for text in texts)
    for out in (plain, drafted):
        assert out.tokens.tolist() == [text + [0] * (L - len(text)) for text in texts]
        assert out.emitted.tolist() == list(range(1, 10))
        assert out.finished.all()
    walked = [rounds_by_hand(p, t, 3, ()) for p, t in zip(prompts, texts, strict=True)]
    assert walked[4] == [4]
    assert walked[6] == [4, 2]
    assert [small.rounds_of(drafted, row) for row in range(9)] == walked
    assert simulated(chain, drafter, weights, texts, shapes.chain(3), prompts) == walked


@pytest.mark.parametrize("count", [1, 3])
def test_a_text_is_cut_at_max_new_tokens_inside_a_window(chain, count):
    prompts = [[5, 6], [9], [4, 4, 30], [17]]
    drafter, weights = small.flawed(chain, (9,))
    out = small.generate(chain, prompts, greedy(NEVER, count), Eagle(drafter, shapes.chain(3)), weights)
    texts = [small.walk(p[-1], count) for p in prompts]
    assert out.tokens.tolist() == texts
    assert out.emitted.tolist() == [count] * 4
    assert not out.finished.any()
    walked = [rounds_by_hand(p, t, 3, (9,)) for p, t in zip(prompts, texts, strict=True)]
    assert [small.rounds_of(out, row) for row in range(4)] == walked
    assert simulated(chain, drafter, weights, texts, shapes.chain(3), prompts) == walked


def test_a_prompt_decoded_alone_and_without_padding_gives_the_text_of_its_row(tiny, pupil, texts):
    out = small.generate(tiny, PROMPTS[1:2], greedy(), Eagle(tiny.drafter, shapes.chain(3)), pupil, padded=1)
    assert out.tokens.tolist() == texts[1:2]


def test_a_sample_depends_on_its_rows_key_and_not_on_the_batch(tiny):
    config = DecodeConfig(L, NEVER, Sampling(1.0))
    keys = jax.random.split(jax.random.key(4), 5)
    out = small.generate(tiny, PROMPTS, config, keys=keys)
    order = np.array([3, 0, 4, 1, 2])
    again = small.generate(tiny, [PROMPTS[i] for i in order], config, keys=keys[order])
    assert (np.asarray(again.tokens) == np.asarray(out.tokens)[order]).all()
    other = small.generate(tiny, PROMPTS, config, keys=keys.at[0].set(jax.random.key(99)))
    assert other.tokens[1:].tolist() == out.tokens[1:].tolist()
    assert other.tokens[0].tolist() != out.tokens[0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_text_follows_the_distribution_of_the_chain(chain, temperature):
    """Transitions counted over 64 texts, the first token's too, each within 5 sigma."""
    rows, count = 64, 40
    prompts = [[4 + i % 27] for i in range(rows)]
    config = DecodeConfig(count, NEVER, Sampling(temperature))
    out = small.generate(chain, prompts, config, padded=1)
    text = np.concatenate([np.array(prompts), np.asarray(out.tokens)], 1)
    counts = np.zeros_like(chain.probs)
    np.add.at(counts, (text[:, :-1].ravel(), text[:, 1:].ravel()), 1)
    first = np.zeros_like(chain.probs)
    np.add.at(first, (text[:, 0], text[:, 1]), 1)
    probs = chain.probs ** (1 / temperature)
    probs /= probs.sum(-1, keepdims=True)
    for seen in (counts, first):
        expected = seen.sum(-1, keepdims=True) * probs
        assert seen[probs == 0].sum() == 0
        often = expected >= 5  # of the rare transitions only the total is judged
        terms = (seen - expected)[often] ** 2 / expected[often]
        rare = expected[~often].sum()
        if often.any():
            assert abs(terms.sum() - often.sum()) < 5 * np.sqrt(2 * often.sum())
        assert abs(seen[~often].sum() - rare) < 5 * np.sqrt(rare)
    assert len(np.unique(text, axis=0)) > rows - 8  # a chance pair may be alike, rows of one key all are
