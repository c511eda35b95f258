"""Rotary frequencies and scales of transformers, for every kind of scaling and every key of it.

    pip install torch==2.13.0 transformers
    python rope.py --out ../golden/rope.json

`tests/models/test_rope_scaling.py` compares ours with what this writes.
"""

import argparse
import json
import pathlib
from typing import Any

HEAD, CONTEXT = 16, 4096
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(HEAD // 2)],
    "long_factor": [2.0 + i * i for i in range(HEAD // 2)],
    "original_max_position_embeddings": 1024,
}
# name -> keys of config.json, the length of a text
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({"rope_theta": 500_000.0}, CONTEXT),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, CONTEXT),
    "llama3": ({"rope_theta": 500_000.0, "rope_scaling": _LLAMA3}, CONTEXT),
    "yarn": ({"rope_theta": 1_000_000.0, "rope_scaling": _YARN}, CONTEXT),
    "yarn, older": (
        {"rope_scaling": {k: v for k, v in _YARN.items() if k != "rope_type"} | {"type": "yarn"}},
        CONTEXT,
    ),
    "yarn, the context's ratio": ({"rope_scaling": _YARN | {"factor": None}}, CONTEXT),
    "yarn, no original context": ({"rope_scaling": {"rope_type": "yarn", "factor": 3.0}}, CONTEXT),
    "yarn, original context outside": (
        {"rope_scaling": _YARN, "original_max_position_embeddings": 256},
        CONTEXT,
    ),
    "yarn, attention": ({"rope_scaling": _YARN | {"attention_factor": 0.75}}, CONTEXT),
    "yarn, both mscales": ({"rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}}, CONTEXT),
    "yarn, one mscale": ({"rope_scaling": _YARN | {"mscale": 0.707}}, CONTEXT),
    "yarn, no mscale": ({"rope_scaling": _YARN | {"mscale": 0, "mscale_all_dim": 1.0}}, CONTEXT),
    "yarn, betas": ({"rope_scaling": _YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}, CONTEXT),
    "yarn, not truncated": ({"rope_scaling": _YARN | {"truncate": False}}, CONTEXT),
    "yarn, equal betas": (
        {"rope_scaling": _YARN | {"beta_fast": 4, "beta_slow": 4, "truncate": False}},
        CONTEXT,
    ),
    "yarn, factor 1": ({"rope_scaling": _YARN | {"factor": 1.0}}, CONTEXT),
    "longrope, short": ({"rope_theta": 10_000.0, "rope_scaling": _LONG}, 1024),
    "longrope, long": ({"rope_theta": 10_000.0, "rope_scaling": _LONG}, 1025),
    "longrope, factor": ({"rope_scaling": _LONG | {"factor": 2.0}}, CONTEXT),
    "longrope, attention": ({"rope_scaling": _LONG | {"attention_factor": 1.5}}, CONTEXT),
}


def case(keys: dict[str, Any], length: int) -> dict[str, Any]:
    """Frequencies and scale."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 4 * HEAD, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    config = LlamaConfig(**sizes, **json.loads(json.dumps(keys)))
    init = LlamaRotaryEmbedding.compute_default_rope_parameters
    if (kind := config.rope_parameters["rope_type"]) != "default":
        init = ROPE_INIT_FUNCTIONS[kind]
    frequencies, scale = init(config, device="cpu", seq_len=length)
    return {"config": keys, "length": length, "frequencies": frequencies.tolist(), "scale": float(scale)}


def main() -> None:
    """Command line."""
    import transformers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    content = {
        "about": "made by tests/parity/rope.py",
        "versions": {"transformers": transformers.__version__},
        "head": HEAD,
        "context": CONTEXT,
        "cases": {name: case(*about) for name, about in CASES.items()},
    }
    args.out.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
