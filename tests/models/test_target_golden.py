"""The target against golden values that transformers + torch computed from the same GGUF file.

`tests/parity` made the golden file and holds the comparison at full size, whose figures the file
repeats under "comparison".
"""

import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.data.conversations import Conversation
from ppow_jax.data.prompt import Prompt
from ppow_jax.decode.loop import DecodeConfig, decode
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import KeyValues
from ppow_jax.models.target import Target, TargetOutput
from ppow_jax.targets import gguf, gguf_files
from ppow_jax.targets.tokenizer import with_stops
from ppow_jax.targets.tokenizer_gguf import from_gguf

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden/smollm2.json").read_text("utf-8"))
CASES = GOLDEN["cases"]
LOGIT_TOLERANCE = 2e-3
TAP_TOLERANCE = 1e-4  # of the norm of a tap at a position
CACHE_TOLERANCE = 1e-4
PROMPTS = [case["ids"] for case in CASES]
TEXTS = [case["ids"] + case["continuation"] for case in CASES]


@pytest.fixture(scope="module")
def loaded(smollm2) -> small.Loaded:
    with gguf_files.find(f"package:{small.SMOLLM2}").open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    assert digest == GOLDEN["comparison"]["gguf_sha256"], "the wheel holds another target"
    return smollm2


def pad(rows: list[list[int]]) -> np.ndarray:
    """int32 `[B, longest]`, zeros on the right."""
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


@functools.partial(jax.jit, static_argnames="target")
def forward(target: Target, params: dict, tokens_BxT: jax.Array) -> TargetOutput:
    """One pass over whole texts."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    return target.apply({"params": params}, tokens_BxT[:, None], positions[:, None])


@functools.partial(jax.jit, static_argnames="target")
def step(
    target: Target,
    params: dict,
    cache: kv_cache.Cache,
    tokens_BxK: jax.Array,
    start_B: jax.Array,
) -> tuple[jax.Array, kv_cache.Cache]:
    """Hidden states `[B, K, D]` of the next tokens of each row, and the cache with them."""
    positions = start_B[:, None] + jnp.arange(tokens_BxK.shape[1])
    visible = kv_cache.visible(start_B, cache[0].values.shape[2])
    out = target.apply({"params": params}, tokens_BxK[:, None], positions[:, None], cache, visible)
    return out.hidden[:, 0], kv_cache.write(cache, kv_cache.as_prefix(out.new), start_B)


@functools.partial(jax.jit, static_argnames="target")
def head(target: Target, params: dict, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states."""
    return target.apply({"params": params}, hidden, method=Target.logits)


@pytest.fixture(scope="module")
def whole(loaded) -> TargetOutput:
    """One pass over all golden texts."""
    return forward(loaded.target, loaded.params, pad(TEXTS))


def golden_positions() -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Rows, positions and values of everything in the golden file."""
    flat = [(row, p) for row, case in enumerate(CASES) for p in case["positions"]]
    rows, values = zip(*flat, strict=True)
    return np.array(rows), np.array([v["position"] for v in values]), list(values)


def logit_error(logits_NxV: np.ndarray, values: list[dict]) -> float:
    """Largest difference of the golden logits and of the logsumexp."""
    got = np.take_along_axis(logits_NxV, np.array([v["top_ids"] for v in values]), 1)
    total = np.asarray(jax.nn.logsumexp(logits_NxV, -1))
    return max(
        np.abs(got - np.array([v["top_logits"] for v in values])).max(),
        np.abs(total - np.array([v["logsumexp"] for v in values])).max(),
    )


def test_token_ids_equal_the_reference(loaded):
    text = from_gguf(loaded.metadata)
    assert [text.first_turn(case["text"]) for case in CASES] == PROMPTS


@pytest.mark.parametrize("case", GOLDEN["conversations"], ids=lambda c: repr(c["texts"][-1][:24]))
def test_ids_of_conversations_equal_the_reference(loaded, case):
    """Odd characters and several turns, built turn by turn as the stages do and rendered as a whole."""
    text = with_stops(from_gguf(loaded.metadata))
    questions, answers = case["texts"][::2], case["texts"][1::2]
    talk = Conversation(Prompt("", "", tuple(questions)))
    for turn, answer in enumerate([*answers, None]):
        talk.ask(talk.question(text, turn))
        if answer is not None:
            talk.answer([*text.encode(answer), text.stop_ids[0]])
    assert [t.tokens for t in talk.texts] == [case["ids"]]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(case["texts"])]
    assert text.encode(text.render(messages)) == case["ids"]


def test_logits_equal_the_reference(loaded, whole):
    rows, positions, values = golden_positions()
    logits = np.asarray(head(loaded.target, loaded.params, whole.hidden[rows, 0, positions]))
    assert logits.dtype == np.float32
    assert logit_error(logits, values) <= LOGIT_TOLERANCE
    assert logits.argmax(-1).tolist() == [v["top_ids"][0] for v in values]


def test_taps_equal_the_reference(loaded, whole):
    assert list(loaded.target.config.taps) == GOLDEN["tap_layers"]
    rows, positions, values = golden_positions()
    taps_Nx3xD = np.asarray(whole.taps[rows, 0, positions]).reshape(len(rows), 3, -1)
    want_Nx3 = np.array([v["tap_norms"] for v in values])
    norms_Nx3 = np.linalg.norm(taps_Nx3xD, axis=-1)
    assert (np.abs(norms_Nx3 / want_Nx3 - 1) <= TAP_TOLERANCE).all()
    got = taps_Nx3xD[..., GOLDEN["tap_dimensions"]]
    error = np.abs(got - np.array([v["taps"] for v in values])).max(-1)
    assert (error <= TAP_TOLERANCE * want_Nx3).all()


@pytest.mark.slow
def test_greedy_decoding_equals_the_reference(loaded):
    count = len(CASES[0]["continuation"])
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    config = DecodeConfig(count, stop_ids=(-1,))
    out = decode(loaded.target, loaded.params, pad(PROMPTS), lengths, keys, config)
    assert out.tokens.tolist() == [case["continuation"] for case in CASES]
    assert out.emitted.tolist() == [count] * len(CASES)
    assert not out.finished.any()


def test_cached_steps_equal_the_whole_text(loaded, whole):
    """From ragged prompts, three tokens at a time: the logits do not notice the cache."""
    target, params = loaded.target, loaded.params
    texts, rows, K = pad(TEXTS), np.arange(len(TEXTS))[:, None], 3
    start = np.array([len(p) for p in PROMPTS], np.int32)
    prompt_only = kv_cache.visible(start, texts.shape[1])[:, :, None]
    cache = tuple(
        KeyValues(jnp.where(prompt_only, kv.keys, 7.0), jnp.where(prompt_only.swapaxes(2, 3), kv.values, 7.0))
        for kv in kv_cache.as_prefix(whole.new)
    )
    for _ in range(4):
        at = start[:, None] + np.arange(K)
        hidden, cache = step(target, params, cache, texts[rows, at], start)
        want = head(target, params, whole.hidden[rows, 0, at])
        np.testing.assert_allclose(head(target, params, hidden), want, atol=CACHE_TOLERANCE, rtol=0)
        start = start + K


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of llama q/k rows: of each head, the two halves interleaved."""
    out = []
    for block in np.split(rows, heads):
        first, second = np.split(block, 2)
        for pair in zip(first, second, strict=True):
            out += pair
    return np.stack(out)


def test_unpermute_inverts_the_order_of_gguf():
    one_head = np.arange(8)[:, None]
    assert permute(one_head, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert gguf.unpermute(one_head, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    rows = np.random.default_rng(0).normal(size=(3 * 16, 5))
    np.testing.assert_array_equal(gguf.unpermute(permute(rows, 3), 3), rows)


def test_without_unpermute_the_logits_are_wrong(loaded):
    """The golden logits do notice the row order, so passing them means something."""
    c = loaded.target.config
    wrong = jax.tree.map(lambda x: x, loaded.params)
    for i in range(c.layers):
        attention = wrong[f"layers_{i}"]["attention"]
        for name, heads in (("query", c.heads), ("key", c.kv_heads)):
            stored = permute(np.asarray(attention[name]["weight"]), heads)
            attention[name] = {"weight": jnp.asarray(stored)}
    rows, positions, values = golden_positions()
    hidden = forward(loaded.target, wrong, pad(TEXTS)).hidden[rows, 0, positions]
    error = logit_error(np.asarray(head(loaded.target, wrong, hidden)), values)
    assert error > 1000 * LOGIT_TOLERANCE
