"""Shapes of targets, without their weights."""

from ppow_jax.errors import UserError
from ppow_jax.models.target import TargetConfig, with_taps
from ppow_jax.settings import TargetSettings
from ppow_jax.targets import families, huggingface

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_VICUNA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _sizes(layers: int, width: int, heads: int, mlp: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


# The targets that configs/ names, as their config.json on the Hugging Face hub describes them.
KNOWN = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3 | _sizes(32, 4096, 32, 14336),
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA3 | _sizes(80, 8192, 64, 28672),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(36, 4096, 32, 12288),
    "Qwen/Qwen3-32B": _QWEN3 | _sizes(64, 5120, 64, 25600),
    "lmsys/vicuna-7b-v1.5": _VICUNA | _sizes(32, 4096, 32, 11008),
    "lmsys/vicuna-13b-v1.5": _VICUNA | _sizes(40, 5120, 40, 13824),
}


def shape_of(settings: TargetSettings) -> TargetConfig:
    """The shape of a target that configs/ names, or of a Hugging Face directory, from its config.json alone.

    Raises:
      UserError: it is neither, or has not the layers of `target.taps`.
    """
    known = KNOWN.get(settings.path) or huggingface.description(settings.path)
    if not known:
        raise UserError(
            f"config.target.path: found {settings.path!r}, expected a Hugging Face directory or one of "
            f"{', '.join(KNOWN)}"
        )
    return with_taps(families.target_config(known, False, settings.dtype, settings.path), settings.taps)
