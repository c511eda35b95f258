"""A large checkpoint is read with little memory beyond the arrays themselves."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden_families import GOLDEN
from test_huggingface import write_tokenizer

WIDTH, HIDDEN, LAYERS, VOCAB = 2048, 8192, 12, 32000  # 1.9 GB in bfloat16


@pytest.mark.slow
def test_two_gigabytes_need_no_more_than_one_and_a_half_times_the_largest_tensor(tmp_path):
    write_large(tmp_path)
    command = [sys.executable, "-m", "ppow_jax.bench", "load", f"--target={tmp_path}", "--dtype=bfloat16"]
    # an empty value: memory that is freed goes back, which `memory` otherwise keeps for later steps
    env = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200", "GLIBC_TUNABLES": ""}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    numbers = [float(x.replace(",", "")) for x in re.findall(r"[\d,]+\.?\d*", out.split("seconds")[-1])]
    arrays, largest, _, ratio, _ = numbers[-5:]
    assert arrays > 1800 and largest == pytest.approx(VOCAB * WIDTH * 2 / 1e6, rel=0.01)
    assert -0.1 <= ratio < 1.5


def write_large(directory: pathlib.Path) -> None:
    """A Llama of 12 layers, in shards of three."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
    }
    (directory / "config.json").write_text(json.dumps(GOLDEN["llama2"]["config"] | sizes))
    write_tokenizer(directory)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH)}
    shapes["model.norm.weight"] = (WIDTH,)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{m}_proj.weight": (WIDTH, WIDTH) for m in "qkvo"}
        shapes |= {f"{at}.mlp.{m}_proj.weight": (HIDDEN, WIDTH) for m in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{at}.{m}_layernorm.weight": (WIDTH,) for m in ("input", "post_attention")}
    names, where = list(shapes), {}
    for i in range(3):
        file = f"model-{i}.safetensors"
        part = {n: np.full(shapes[n], 0.01, jnp.bfloat16) for n in names[i::3]}
        safetensors.numpy.save_file(part, directory / file)
        where |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
