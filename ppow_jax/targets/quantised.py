"""Weights of 8 or fewer bits in safetensors: refused by the name of their scheme.

Read as they lie there they would be numbers that the model never computed with. GGUF files hold such weights
too; those are read (`gguf`).
"""

import re
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models.fields import Fields, shown

FLOATS = ("F64", "F32", "F16", "BF16")
_EXPECTED = "expected weights in float32, bfloat16 or float16; take the model before its quantisation"
# keys of config.json: of transformers, of llm-compressor, of MLX and of AutoGPTQ
_CONFIGS = ("quantization_config", "compression_config", "quantization", "quantize_config")
# names of tensors that schemes put beside or in place of a weight
_SCHEMES = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(weight_packed|weight_shape|weight_zero_point)$", "compressed-tensors"),
    (r"\.(SCB|weight_format)$|\.(nested_)?(absmax|quant_map)$|\.quant_state\.", "bitsandbytes"),
    (r"\.weight_scale_inv$", "FP8 in blocks"),
    (r"\.(weight|input|output|k|v)_(scale|global_scale)(_2)?$", "8 or 4 bits with scales beside them"),
    (r"(\.scales|\.W_q|_blocks|_scales)$", "packed in 8 or fewer bits"),
)


def refuse_scheme(c: Fields) -> None:
    """Raises `UserError` if a model's `config.json` says that its weights are quantised."""
    for key in _CONFIGS:
        if c.values.get(key):
            raise c.error(f"found {c.prefix}{key} of {_name(c.values[key])}, {_EXPECTED}")


def _name(scheme: Any) -> str:
    """What a group of a config calls its scheme."""
    if not isinstance(scheme, dict):
        return shown(scheme)
    method = scheme.get("quant_method") or scheme.get("quant_algo") or scheme.get("mode")
    bits = scheme.get("bits") or next((b for b in (8, 4) if scheme.get(f"load_in_{b}bit")), None)
    said = [f"the scheme {method!r}" if method else "", f"{bits} bits" if bits else ""]
    return ", ".join(filter(None, said)) or shown(scheme)


def refuse_tensor(where: Any, name: str, dtype: str) -> None:
    """Raises `UserError` if a tensor belongs to quantised weights.

    Args:
      where: its file.
      name, dtype: as safetensors has them.
    """
    scheme = next((known for pattern, known in _SCHEMES if re.search(pattern, name)), "")
    if scheme or dtype not in FLOATS:
        of = f" (quantised: {scheme})" if scheme else ""
        raise UserError(f"{where}: tensor {name!r} holds {dtype}{of}, {_EXPECTED}")
