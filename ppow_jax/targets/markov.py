"""A generated target with a known answer: an order-1 Markov chain written as a Llama decoder.

Attention and MLP outputs are zero, embeddings are one-hot and the head holds log-probabilities, so the
next-token distribution is the chain's row of the last token. The argmax successors form one cycle through all
letters, so that greedy text visits every state.
"""

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ppow_jax.models.target import TargetConfig
from ppow_jax.targets.tokenizer import Tokenizer

SPECIALS = ("<unk>", "<user>", "<assistant>", "<end>")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
SIZE = len(SPECIALS) + len(LETTERS)
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | lower }}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_PEAK = 0.7  # probability of the likeliest successor
_RUNNERS = 3  # successors that share the rest
_RARE = 1e-3  # probability of every other letter: logits of a trainable size
_NEVER = -20.0  # logit of the special tokens: 2e-9, which no text will see


def transition(seed: int) -> np.ndarray:
    """The chain's distribution, float64 `[SIZE, SIZE]`: row = last token; only letters are ever emitted."""
    rng = np.random.default_rng(seed)
    letters = np.arange(len(SPECIALS), SIZE)
    cycle = rng.permutation(letters)
    successor = dict(zip(cycle, np.roll(cycle, -1), strict=True))
    probs = np.zeros((SIZE, SIZE))
    for token in range(SIZE):
        best = successor.get(token, letters[token % len(letters)])
        others = rng.choice(np.setdiff1d(letters, [best]), _RUNNERS, replace=False)
        rest = 1 - _PEAK - _RARE * len(letters)
        probs[token, letters] = _RARE
        probs[token, best] += _PEAK
        probs[token, others] += rest * rng.dirichlet(np.ones(_RUNNERS) * 3)
    return probs


def build(seed: int, dtype: str) -> tuple[TargetConfig, dict, Tokenizer]:
    """The chain as (decoder shape, parameters, tokenizer)."""
    width, hidden = 32, 16
    config = TargetConfig(
        vocab_size=SIZE,
        width=width,
        layers=4,
        heads=4,
        kv_heads=4,
        head_size=16,
        mlp_hidden=hidden,
        context=512,
        rope_theta=10_000.0,
        norm_epsilon=1e-6,
        tied_head=False,
        taps=(1, 2, 3),
        dtype=dtype,
    )
    one_hot = np.eye(SIZE, width) * np.sqrt(width)  # the norms leave it as it is
    zeros = lambda *shape: {"weight": np.zeros(shape, dtype)}  # noqa: E731
    block = {
        "attention_norm": {"scale": np.ones(width, dtype)},
        "attention": {
            "query": zeros(64, width),
            "key": zeros(64, width),
            "value": zeros(64, width),
            "out": zeros(width, 64),
        },
        "mlp_norm": {"scale": np.ones(width, dtype)},
        "mlp": {
            "gate": zeros(hidden, width),
            "up": zeros(hidden, width),
            "down": zeros(width, hidden),
        },
    }
    head = np.zeros((width, SIZE))
    with np.errstate(divide="ignore"):
        head[:SIZE] = np.maximum(np.log(transition(seed)), _NEVER) / np.sqrt(width)
    params = {f"layers_{i}": block for i in range(config.layers)}
    params["embedding"] = {"embedding": one_hot.astype(dtype)}
    params["norm"] = {"scale": np.ones(width, dtype)}
    params["head"] = {"weight": np.ascontiguousarray(head.T.astype(dtype))}
    return config, params, _tokenizer()


def _tokenizer() -> Tokenizer:
    vocab = {t: i for i, t in enumerate([*SPECIALS, *LETTERS])}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIALS])
    return Tokenizer(core, _TEMPLATE, (SPECIALS.index("<end>"),), {"eos_token": "<end>"})
