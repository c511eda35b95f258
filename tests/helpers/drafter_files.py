"""Drafters in files, written and changed, and what is said of those that cannot be read."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import small

from ppow_jax.drafters import eagle3
from ppow_jax.drafters.files import reading, writing
from ppow_jax.errors import UserError
from ppow_jax.models.target import default_taps

TARGET = dataclasses.replace(small.TINY, layers=9, taps=default_taps(9))  # 2, 4, 6
VOCAB = small.DRAFT_VOCAB
PLAIN = eagle3.drafter_config(TARGET, len(VOCAB), 40, "float32")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONVERTED = {  # by llama.cpp itself: parity/llamacpp_converter.py
    "plain": PLAIN,
    "more_heads": dataclasses.replace(PLAIN, kv_heads=4),
    "llama3": dataclasses.replace(PLAIN, rope_scaling=tuple(LLAMA3.items())),
}


def params_of(config) -> dict:
    return small.randomise(eagle3.abstract_params(config), 1)


def numbered(config) -> dict:
    """Parameters that depend on no library's random numbers: quarters from -2 to 2."""
    count = iter(range(100))

    def leaf(like):
        return ((np.arange(like.size) * 7 + next(count)) % 17 / 4 - 2).astype(np.float32).reshape(like.shape)

    return jax.tree.map(leaf, eagle3.abstract_params(config))


def write(directory, config=PLAIN, server="sglang", dtype="float32", target=TARGET, vocab=VOCAB, params=None):
    params = params or params_of(config)
    writing.write(directory, config, params, vocab, target, server, dtype, "ours")
    return params


def tensors_of(directory: pathlib.Path) -> dict:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def config_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def change(directory: pathlib.Path, tensors: dict | None = None, **values) -> None:
    """Other tensors, other values of config.json; None removes one."""
    if tensors:
        changed = {n: t for n, t in (tensors_of(directory) | tensors).items() if t is not None}
        safetensors.numpy.save_file(changed, directory / "model.safetensors")
    config = {k: v for k, v in (config_of(directory) | values).items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config))


def read(directory: pathlib.Path, target=TARGET, fingerprint="ours") -> reading.Imported:
    return reading.read(directory, target, fingerprint)


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), one, other))


def refused(directory: pathlib.Path, *said: str, **how) -> None:
    with pytest.raises(UserError) as e:
        read(directory, **how)
    assert "\n" not in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)
