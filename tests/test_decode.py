"""Lossless decoding: the text is the target's own, whatever drafts it; and simulation is decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.simulate import simulate
from ppow_jax.models.drafter import weights_of
from ppow_jax.stages import supervise

PROMPTS = [[3, 9, 1], [4], [7, 7, 2, 8, 1, 30], [11, 12], [25, 0, 0, 39, 2, 6, 6, 8]]
L = 20
NEVER = (-1,)
LETTERS = np.arange(len(small.markov.SPECIALS), small.markov.SIZE)
FEW = np.concatenate([[0, 1, 3], np.delete(LETTERS, [2, 11, 23])])  # three letters it cannot draft

pytestmark = pytest.mark.usefixtures("quick_compilation")


def greedy(window: int, stops: tuple[int, ...] = NEVER, count: int = L) -> DecodeConfig:
    return DecodeConfig(count, window, 0.0, stops)


@pytest.fixture(scope="module")
def texts(tiny) -> list[list[int]]:
    """The naive loop's."""
    return [small.naive_greedy(tiny.target, tiny.params, p, L) for p in PROMPTS]


@pytest.fixture(scope="module")
def pupil(tiny, texts) -> small.DrafterWeights:
    """The random drafter after enough supervised steps to be right now and then."""
    tokens = np.zeros((len(PROMPTS), 8 + L), np.int32)
    assistant = np.zeros(tokens.shape, bool)
    for b, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        row = prompt + text
        tokens[b, : len(row)] = row
        assistant[b, len(prompt) : len(row)] = True
    optimizer = optax.adam(1e-2)
    params = jax.tree.map(jnp.copy, tiny.weights.params)  # the step donates them
    learner = {"params": params, "opt_state": optimizer.init(params)}
    update = supervise.make_update(tiny.target, tiny.drafter, optimizer, 16, 2, 0.8)
    batch = {"tokens": tokens, "assistant": assistant}
    for number in range(25):
        key = jax.random.key(number)
        learner, _ = update(learner, tiny.weights.vocab, tiny.params, batch, key)
    return weights_of(learner["params"], tiny.params, tiny.weights.vocab)


@functools.cache
def successors() -> np.ndarray:
    """Of every letter, the token that the chain most often writes next."""
    return small.markov_chain().law.argmax(-1)


def walk(token: int, count: int) -> list[int]:
    """The chain's greedy text after `token`."""
    out = []
    for _ in range(count):
        token = int(successors()[token])
        out.append(token)
    return out


def flawed(chain, wrong: tuple[int, ...], vocab: np.ndarray = LETTERS):
    """A drafter that knows the chain's greedy text but for what follows the tokens in `wrong`."""
    law = np.full((small.markov.SIZE, len(vocab)), 1e-6)
    for token, best in enumerate(successors()):
        law[token, vocab == best] = 1.0
        if token in wrong:
            law[token] = np.roll(law[token], 3)
    return chain.drafter(law / law.sum(-1, keepdims=True), vocab)


def rounds_by_hand(prompt, text, window, wrong, vocab=LETTERS) -> list[int]:
    """Tokens of each verification pass, walked in plain Python; the first token is prefill's."""
    row = prompt[-1:] + text
    at, rounds = 1, []  # row[at] is the last known token
    while at + 1 < len(row):
        k = 0
        while k < window and row[at + k] not in wrong and successors()[row[at + k]] in vocab:
            k += 1
            if at + k + 1 == len(row):
                break
        rounds.append(min(k + 1, len(row) - 1 - at))
        at += rounds[-1]
    return rounds


def rounds_of(out, row: int) -> list[int]:
    return [n for n in out.emitted_by_round[row].tolist() if n]


def test_autoregressive_text_is_that_of_reading_everything_again_for_every_token(tiny, texts):
    out = small.generate(tiny, PROMPTS, greedy(0))
    assert out.tokens.tolist() == texts
    assert out.count.tolist() == [L] * len(PROMPTS)
    assert not out.finished.any()
    assert rounds_of(out, 0) == [1] * (L - 1)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_drafted_text_is_the_targets_own_and_simulation_counts_the_same_rounds(tiny, texts, pupil, window):
    weights = [small.random_weights(s, tiny.params) for s in (1, 2)] + [pupil]
    for number, w in enumerate(weights):
        out = small.generate(tiny, PROMPTS, greedy(window), tiny.drafter, w)
        assert out.tokens.tolist() == texts
        assert (out.emitted_by_round.sum(1) == out.count - 1).all()
        assert simulated(tiny, tiny.drafter, w, texts, window) == [
            rounds_of(out, row) for row in range(len(PROMPTS))
        ]
        if number == 2:  # else nothing but refusals would have been seen
            longest = int(out.emitted_by_round.max())
            assert longest > min(window, 2)


def simulated(pair, drafter, weights, texts, window, prompts=PROMPTS) -> list[list[int]]:
    """Emitted counts of the simulated rounds of every text."""
    tokens = np.zeros((len(texts), 8 + L), np.int32)
    for row, prompt, text in zip(tokens, prompts, texts, strict=True):
        row[: len(prompt + text)] = prompt + text
    start = np.array([len(p) for p in prompts], np.int32)
    end = start + np.array([len(t) for t in texts], np.int32)
    taps = small.forward(pair.target, pair.params, tokens)[0].taps[:, 0]
    rounds = simulate(drafter, weights, taps, tokens, start, end, window)
    emitted, accepted = np.asarray(rounds.emitted), np.asarray(rounds.accepted)
    live = emitted > 0
    assert (accepted[~live] == -1).all()
    assert (accepted <= rounds.offered)[live].all()
    ahead = end[:, None] - start[:, None] - 1 - np.cumsum(emitted, 1) + emitted
    assert (np.asarray(rounds.offered) == np.where(live, np.minimum(window, ahead), 0)).all()
    assert (emitted == np.minimum(accepted + 1, ahead))[live].all()
    return [row[row > 0].tolist() for row in emitted]


def test_rounds_of_drafters_with_known_flaws_are_those_walked_by_hand(chain):
    prompts = [[5, 6], [9], [4, 4, 30], [17]]
    texts = [walk(p[-1], L) for p in prompts]
    for wrong, vocab in (((), LETTERS), ((8, 19, 30), LETTERS), ((), FEW), ((8, 19), FEW)):
        drafter, weights = flawed(chain, wrong, vocab)
        out = small.generate(chain, prompts, greedy(3), drafter, weights)
        assert out.tokens.tolist() == texts
        walked = [
            rounds_by_hand(prompt, text, 3, wrong, vocab) for prompt, text in zip(prompts, texts, strict=True)
        ]
        assert [rounds_of(out, row) for row in range(4)] == walked
        assert simulated(chain, drafter, weights, texts, 3, prompts) == walked


def test_a_perfect_drafter_emits_whole_windows(chain):
    drafter, weights = chain.drafter(chain.law[:, LETTERS], LETTERS)
    out = small.generate(chain, [[5], [9], [4], [17]], greedy(3), drafter, weights)
    assert [rounds_of(out, row) for row in range(4)] == [[4, 4, 4, 4, 3]] * 4  # 1 + 19 = L


def test_a_stop_token_ends_the_text_wherever_it_falls_in_a_window(chain):
    """Row r stops at its token r + 1: prefill's, accepted ones, and those that the target adds."""
    stop = 6
    before = walk(stop, 27)  # once round the cycle: the last but r is r tokens away from the stop
    prompts = [[before[-2 - row]] for row in range(9)]
    drafter, weights = flawed(chain, ())
    plain = small.generate(chain, prompts, greedy(0, (1, stop)))
    drafted = small.generate(chain, prompts, greedy(3, (1, stop)), drafter, weights)
    texts = [walk(prompt[0], row + 1) for row, prompt in enumerate(prompts)]
    assert all(text[-1] == stop for text in texts)
    for out in (plain, drafted):
        assert out.tokens.tolist() == [text + [0] * (L - len(text)) for text in texts]
        assert out.count.tolist() == list(range(1, 10))
        assert out.finished.all()
    walked = [rounds_by_hand(p, t, 3, ()) for p, t in zip(prompts, texts, strict=True)]
    assert walked[4] == [4]
    assert walked[6] == [4, 2]
    assert [rounds_of(drafted, row) for row in range(9)] == walked
    assert simulated(chain, drafter, weights, texts, 3, prompts) == walked


@pytest.mark.parametrize("count", [1, 3])
def test_a_text_is_cut_at_max_new_tokens_inside_a_window(chain, count):
    prompts = [[5, 6], [9], [4, 4, 30], [17]]
    drafter, weights = flawed(chain, (9,))
    out = small.generate(chain, prompts, greedy(3, NEVER, count), drafter, weights)
    texts = [walk(p[-1], count) for p in prompts]
    assert out.tokens.tolist() == texts
    assert out.count.tolist() == [count] * 4
    assert not out.finished.any()
    walked = [rounds_by_hand(p, t, 3, (9,)) for p, t in zip(prompts, texts, strict=True)]
    assert [rounds_of(out, row) for row in range(4)] == walked
    assert simulated(chain, drafter, weights, texts, 3, prompts) == walked


def test_a_prompt_decoded_alone_and_without_padding_gives_the_text_of_its_row(tiny, pupil, texts):
    out = small.generate(tiny, PROMPTS[1:2], greedy(3), tiny.drafter, pupil, padded=1)
    assert out.tokens.tolist() == texts[1:2]


def test_a_sample_depends_on_its_rows_key_and_not_on_the_batch(tiny):
    config = DecodeConfig(L, 0, 1.0, NEVER)
    keys = jax.random.split(jax.random.key(4), 5)
    out = small.generate(tiny, PROMPTS, config, keys=keys)
    order = np.array([3, 0, 4, 1, 2])
    again = small.generate(tiny, [PROMPTS[i] for i in order], config, keys=keys[order])
    assert (np.asarray(again.tokens) == np.asarray(out.tokens)[order]).all()
    other = small.generate(tiny, PROMPTS, config, keys=keys.at[0].set(jax.random.key(99)))
    assert other.tokens[1:].tolist() == out.tokens[1:].tolist()
    assert other.tokens[0].tolist() != out.tokens[0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_text_follows_the_law_of_the_chain(chain, temperature):
    """Transitions counted over 64 texts, the first token's too, each within 5 sigma."""
    rows, count = 64, 40
    prompts = [[4 + i % 27] for i in range(rows)]
    config = DecodeConfig(count, 0, temperature, NEVER)
    out = small.generate(chain, prompts, config, padded=1)
    text = np.concatenate([np.array(prompts), np.asarray(out.tokens)], 1)
    counts = np.zeros_like(chain.law)
    np.add.at(counts, (text[:, :-1].ravel(), text[:, 1:].ravel()), 1)
    first = np.zeros_like(chain.law)
    np.add.at(first, (text[:, 0], text[:, 1]), 1)
    law = chain.law ** (1 / temperature)
    law /= law.sum(-1, keepdims=True)
    for seen in (counts, first):
        expected = seen.sum(-1, keepdims=True) * law
        assert seen[law == 0].sum() == 0
        often = expected >= 5  # of the rare transitions only the total is judged
        terms = (seen - expected)[often] ** 2 / expected[often]
        rare = expected[~often].sum()
        if often.any():
            assert abs(terms.sum() - often.sum()) < 5 * np.sqrt(2 * often.sum())
        assert abs(seen[~often].sum() - rare) < 5 * np.sqrt(rare)
    assert len(np.unique(text, axis=0)) > rows - 8  # a chance pair may be alike, rows of one key all are


def test_drafted_sampling_is_refused():
    with pytest.raises(ValueError, match="temperature 0 only"):
        DecodeConfig(L, 3, 1.0, NEVER)
