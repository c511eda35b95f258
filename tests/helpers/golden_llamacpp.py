"""How the golden file of llama.cpp's converter describes a tensor; for its environment too, without JAX."""

import hashlib
from typing import Any

import numpy as np

DIVISORS = "rope_freqs.weight"  # the converter computes them in float32, we in float64


def described(tensor: Any) -> list:
    """Type, shape and hash of a tensor of a `gguf.GGUFReader`."""
    data = np.ascontiguousarray(tensor.data)
    return [
        tensor.tensor_type.name,
        [int(n) for n in tensor.shape],
        hashlib.sha256(data.tobytes()).hexdigest(),
    ]
