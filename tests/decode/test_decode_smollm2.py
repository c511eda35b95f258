"""Drafted decoding of the real target, with a drafter that begins as a piece of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Eagle, Together
from ppow_jax.decode.loop import DecodeConfig, decode
from ppow_jax.decode.ngrams import Lookahead, Lookup
from ppow_jax.decode.sampling import Sampling, log_probs
from ppow_jax.decode.session import Session
from ppow_jax.drafters.eagle3 import Drafter, drafter_config, init_params, weights_of
from ppow_jax.targets.tokenizer import Tokenizer
from ppow_jax.targets.tokenizer_gguf import from_gguf

pytestmark = [pytest.mark.slow, pytest.mark.real]
ROWS, TOP, COUNT = 768, 3, 3
NEVER = (-1,)


@pytest.fixture(scope="module")
def text(smollm2) -> Tokenizer:
    return from_gguf(smollm2.metadata)


def beginner(smollm2, vocab: list[int]):
    """A fresh drafter over the given ids."""
    config = drafter_config(smollm2.target.config, len(vocab), 0, "float32", 9)
    ids = jnp.array(vocab)
    params = init_params(config, smollm2.target.config, smollm2.params, ids, jax.random.key(0))
    return Drafter(config), weights_of(params, smollm2.params, ids)


def distribution_of_texts(smollm2, prompt: list[int], how: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every text of `COUNT` tokens after the prompt, by whole passes over each beginning."""
    found = {(): 1.0}
    for length in range(COUNT):
        rows = np.array([prompt + list(begun) for begun in found], np.int32)
        logits = small.forward(smollm2.target, smollm2.params, rows)[1][:, len(prompt) - 1 + length]
        all_probs, longer = np.exp(np.asarray(log_probs(logits, how))), {}
        for (begun, chance), probs in zip(found.items(), all_probs, strict=True):
            for token in np.flatnonzero(probs):
                longer[(*begun, int(token))] = chance * float(probs[token])
        found = longer
    return found


@pytest.mark.parametrize("name", ["group:2x2", "tree:12x2x8"])
def test_sampled_texts_follow_the_targets_distribution(smollm2, text, name):
    """768 texts of three tokens, of 27 that are possible: chi-square, once in a thousand wrong by chance."""
    prompt, how = text.encode("The best way to learn is"), Sampling(1.0, top_k=TOP)
    probs = distribution_of_texts(smollm2, prompt, how)
    assert len(probs) == TOP**COUNT and sum(probs.values()) == pytest.approx(1, abs=1e-4)
    # a fresh drafter knows nothing, but with few tokens to draft it is right now and then
    drafter, weights = beginner(smollm2, sorted({token for t in probs for token in t}))
    eagle, config = Eagle(drafter, shapes.parse(name)), DecodeConfig(COUNT, NEVER, how)
    counts, accepted = dict.fromkeys(probs, 0), 0
    for part in range(ROWS // 256):
        keys = jax.random.split(jax.random.key(part), 256)
        rows, lengths = np.tile(np.int32(prompt), (256, 1)), np.full(256, len(prompt), np.int32)
        out = decode(smollm2.target, smollm2.params, rows, lengths, keys, config, eagle, weights)
        for row in out.tokens.tolist():
            counts[tuple(row)] += 1  # a text that is impossible is a KeyError
        accepted += int((out.emitted_by_round > 1).sum())
    often = [t for t in probs if probs[t] * ROWS >= 5]
    rest = [t for t in probs if probs[t] * ROWS < 5]
    pairs = [(counts[t], probs[t] * ROWS) for t in often]
    pairs.append((sum(counts[t] for t in rest), sum(probs[t] for t in rest) * ROWS))
    chi2 = sum((seen - expected) ** 2 / expected for seen, expected in pairs)
    freedom = len(pairs) - 1
    assert (
        chi2 < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    )  # Wilson, Hilferty
    assert accepted > ROWS / 20


def test_greedy_texts_are_the_same_whatever_is_drafted_and_however_many_are_decoded(smollm2, text):
    drafter, weights = beginner(smollm2, list(range(4096)))  # the ids of frequent tokens
    questions = [
        "Name three colours.",
        "What is 12 times 7?",
        "Write a function that adds two numbers.",
        "Hi!",
    ]
    prompts = [text.first_turn(q) for q in questions]
    config = DecodeConfig(32, text.stop_ids)
    plain = Session(smollm2.target, smollm2.params, config)
    answers = [np.asarray(plain([p]).tokens)[0].tolist() for p in prompts]
    drafters = (
        (Lookahead(smollm2.target.config.vocab_size), None),
        (Together(Eagle(drafter, shapes.parse("tree:8x3x3")), Lookup(3, 2)), (weights, None)),
    )
    for drafting, own in drafters:
        decoder = Session(smollm2.target, smollm2.params, config, drafting, own)
        whole = decoder(prompts)
        assert whole.tokens.tolist() == answers
        assert whole.emitted_by_round.max() > 1
        alone = decoder(prompts[:1])
        assert alone.tokens.tolist() == answers[:1]
        assert list(itertools.chain(*alone.emitted_by_round.tolist())) == whole.emitted_by_round[0].tolist()
