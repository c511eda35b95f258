"""Small random models of every family: the same in NumPy, torch and ours.

    pip install torch==2.13.0 transformers
    python families.py --out ../golden/families.json

writes what transformers + torch compute in float32: logits and tapped layer inputs. The weights follow from
their names alone (`weights`), so that the tests make the same checkpoint again without torch.
"""

import argparse
import json
import pathlib
import zlib
from typing import Any

import numpy as np

LENGTH, VOCAB, TAPS = 40, 96, (2, 3, 4)
POSITIONS = (0, 5, 11, 20, 39)
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "truncate": False,
    "mscale": 2.0,
    "mscale_all_dim": 0.5,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 48,  # of a longer text, transformers takes the long factors
}
_GEMMA = {
    "head_dim": 16,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "layer_types": ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(7)],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
# name -> (class of its configuration, what it has beyond _SHAPE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8, "head_dim": 12}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "llama_yarn": ("LlamaConfig", {"attention_bias": True, "head_dim": 16, "rope_parameters": _YARN}),
    "qwen3_longrope": (
        "Qwen3Config",
        {"attention_bias": True, "head_dim": 16, "rope_parameters": _LONGROPE},
    ),
}


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of one tensor, of a size that keeps activations near 1."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    scale = 0.2 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5
    return (values * scale + name.endswith("norm.weight")).astype(np.float32)


def text() -> np.ndarray:
    """int64 `[LENGTH]` token ids."""
    return np.random.default_rng(0).integers(0, VOCAB, LENGTH)


def case(name: str) -> dict[str, Any]:
    """Golden values of one model."""
    import torch
    import transformers

    kind, more = MODELS[name]
    config = getattr(transformers, kind)(**_SHAPE | more)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shapes = {}
    with torch.no_grad():
        for tensor, value in model.named_parameters():
            shapes[tensor] = list(value.shape)
            value.copy_(torch.from_numpy(weights(tensor, tuple(value.shape))))
        out = model(torch.from_numpy(text())[None], output_hidden_states=True)
    config.architectures = [type(model).__name__]
    rounded = lambda x: [[float(f"{v:.7g}") for v in row] for row in x]  # noqa: E731
    return {
        "config": json.loads(config.to_json_string(use_diff=True)),
        "shapes": shapes,
        "logits": rounded(out.logits[0, list(POSITIONS)].numpy()),
        "taps": rounded(torch.cat([out.hidden_states[i][0, list(POSITIONS)] for i in TAPS], -1).numpy()),
    }


def main() -> None:
    """Command line."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    content = {
        "about": "made by tests/parity/families.py: float32, transformers on torch",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": {name: case(name) for name in MODELS},
    }
    args.out.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
