"""Flash attention, where a kernel that JAX ships applies: cuDNN's, on GPUs of NVIDIA.

Shape letters as in `layers`. On a CPU attention runs in blocks; on a TPU too, as the accounts of its compiler
(docs/scaling.md) do not see into kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend import backend

from ppow_jax.models.cache import KeyValues
from ppow_jax.parallel import partition

_CAPABILITY = 8.0  # Ampere
_HEAD_SIZES = range(8, 129, 8)


@functools.cache
def capability() -> float:
    """The compute capability of this machine's cards; 0 if they are not NVIDIA's."""
    client = backend.get_backend()
    return float(client.devices()[0].compute_capability) if "cuda" in client.platform_version else 0.0


def applies(queries_BxWxKxHxE: jax.Array, own: KeyValues) -> bool:
    """Whether the kernel computes that: one text a row, read from its beginning, in a dtype of 16 bits, of a
    length that is even, which its backward pass asks for."""
    _, W, K, _, E = queries_BxWxKxHxE.shape
    half = queries_BxWxKxHxE.dtype in (jnp.bfloat16, jnp.float16)
    fits = W == 1 and own.values.shape[-2] == K and K % 2 == 0 and half and E in _HEAD_SIZES
    return fits and partition.platform() == "gpu" and capability() >= _CAPABILITY


def causal(queries_Bx1xKxHxE: jax.Array, own: KeyValues, scale: float) -> jax.Array:
    """`attend` of texts in which every token sees itself and those before it: `[B, 1, K, H * E]`."""
    B, _, K, _, _ = queries_Bx1xKxHxE.shape
    keys_BxKxFxE, values_BxKxFxE = own.keys[:, :, 0].transpose(0, 3, 1, 2), own.values[:, :, 0].swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        queries_Bx1xKxHxE[:, 0],
        keys_BxKxFxE,
        values_BxKxFxE,
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return out.reshape(B, 1, K, -1)
