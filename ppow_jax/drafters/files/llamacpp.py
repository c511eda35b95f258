"""Drafters as llama.cpp reads them: one GGUF file of the architecture `eagle3`.

Names of tensors and keys are those of llama.cpp of October 2026 (`--spec-type draft-eagle3`). Its layers'
ids name layers whose *input* is tapped, as ours; but the output of the last layer it gives as zeros. `d2t`
holds target ids themselves, and not offsets; rows of queries and keys lie for interleaved rotary embedding.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import jax
import numpy as np

from ppow_jax.drafters.eagle3 import DrafterConfig, abstract_params
from ppow_jax.drafters.files.reading import Imported
from ppow_jax.errors import UserError
from ppow_jax.models import rope_scaling, rotary
from ppow_jax.models.fields import Fields
from ppow_jax.models.target import TargetConfig
from ppow_jax.parallel import partition
from ppow_jax.targets import gguf_files
from ppow_jax.targets.gguf import permute, unpermute

NAME, FILE = "llamacpp", "drafter.gguf"  # of `config.export.server`; the file in its directory
ARCHITECTURE = "eagle3"
_TENSORS = {
    "fuse/weight": "fc.weight",
    "norm/scale": "output_norm.weight",
    "head/weight": "output.weight",
    "embedding/embedding": "token_embd.weight",
    "embedding_norm/scale": "blk.0.attn_norm.weight",
    "hidden_norm/scale": "blk.0.attn_norm_2.weight",
    "mlp_norm/scale": "blk.0.ffn_norm.weight",
    "attention/query/weight": "blk.0.attn_q.weight",
    "attention/key/weight": "blk.0.attn_k.weight",
    "attention/value/weight": "blk.0.attn_v.weight",
    "attention/out/weight": "blk.0.attn_output.weight",
    "mlp/gate/weight": "blk.0.ffn_gate.weight",
    "mlp/up/weight": "blk.0.ffn_up.weight",
    "mlp/down/weight": "blk.0.ffn_down.weight",
}
_D2T, _FREQUENCIES = "d2t", "rope_freqs.weight"
FINGERPRINT, _SCALING = "ppow_jax.target_fingerprint", "ppow_jax.rope_scaling"  # read by us alone
DTYPES = tuple(gguf_files.TYPES)


def check(config: DrafterConfig, target: TargetConfig) -> None:
    """Whether llama.cpp computes what a drafter is, beside a target of this shape.

    Raises:
      UserError: it would not load the file, or would ignore something.
    """
    why = []
    if config.layers != 1:
        why.append(f"{config.layers} layers, expected 1")
    if config.taps != 3:
        why.append(f"{config.taps} taps, expected 3")
    for trait in ("attention_bias", "out_bias", "head_norms", "tap_norms", "feeds_normed"):
        if getattr(config, trait):
            why.append(f"{trait} {getattr(config, trait)!r}")
    if config.module != DrafterConfig.module:
        why.append(f"the class {config.module!r}")
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        why.append(f"{kind} scaling of its wavelengths")
    if target.taps[-1] >= target.layers:
        why.append(f"a tap at {target.layers}, the last layer's output, which it gives as zeros")
    if target.post_norms or (target.attention_bias and not target.out_bias):
        why.append("a target whose layers llama.cpp does not tap (Qwen2, Gemma 3)")
    if why:
        raise UserError(
            f"config.export.server: {NAME!r} cannot run this drafter: {'; '.join(why)}. Export for another "
            "server, or train a drafter without"
        )


def write(
    file: pathlib.Path,
    config: DrafterConfig,
    params: dict,
    vocab: np.ndarray,
    target: TargetConfig,
    tokenizer: Mapping[str, Any],
    dtype: str,
    fingerprint: str,
) -> None:
    """Writes a drafter.

    Args:
      file: where.
      config, params: the drafter.
      vocab: `[N]` target ids of the draft ids, ascending.
      target: shape of its target.
      tokenizer: metadata of the target's tokenizer, `tokenizer_gguf.of_target`.
      dtype: of the matrices, one of `DTYPES`; norms are float32. Rows that a quantised type cannot hold,
        whose length is no multiple of 32, are float16.
      fingerprint: names the target; llama.cpp does not read it.

    Raises:
      UserError: see `check`.
    """
    check(config, target)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    for key, value in _metadata(config, target).items():
        _add(writer, f"{ARCHITECTURE}.{key}", value)
    for key, value in tokenizer.items():
        _add(writer, key, value)
    writer.add_string(FINGERPRINT, fingerprint)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        ours = partition.path_name(path)
        values = np.asarray(leaf, np.float32)
        if ours in ("attention/query/weight", "attention/key/weight"):
            values = permute(values, config.heads if "query" in ours else config.kv_heads)
        gguf_files.add(writer, _TENSORS[ours], values, dtype)
    scaling = rotary.scaled(dict(config.rope_scaling), config.rope_theta, config.head_size)
    if scaling.divisors:
        writer.add_string(_SCALING, json.dumps(config.rope_scaling))
        writer.add_tensor(_FREQUENCIES, np.asarray(scaling.divisors, np.float32))
    writer.add_tensor(_D2T, np.asarray(vocab, np.int64))
    gguf_files.close(writer)


def _metadata(config: DrafterConfig, target: TargetConfig) -> dict[str, Any]:
    return {
        "context_length": target.context,
        "target_layers": list(target.taps),
        "target_hidden_size": target.width,
        "embedding_length": config.width,
        "block_count": 1,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_theta,  # without it llama.cpp takes another, without a word
        "feed_forward_length": config.mlp_hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "rope.dimension_count": config.head_size,
        "vocab_size": target.vocab_size,
        "norm_before_residual": config.normed_residual,
        "norm_before_fc": False,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key with a value of its type; whole numbers are unsigned, as llama.cpp expects them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def read(file: pathlib.Path, target: TargetConfig, fingerprint: str) -> Imported:
    """Reads a drafter that we or llama.cpp's converter wrote.

    Args:
      file: of the architecture `eagle3`.
      target: shape of the target that will verify.
      fingerprint: names that target.

    Raises:
      UserError: the file is damaged, of something else or of another target, or a key or tensor is missing,
        of another type or shape, or not supported.
    """
    contents = gguf_files.read(file)
    m = Fields(contents.metadata, str(file), of="an EAGLE-3 drafter of llama.cpp")
    m.text("general.architecture", choices=(ARCHITECTURE,))
    trained_for = m.text(FINGERPRINT, fingerprint)
    if trained_for != fingerprint:
        raise UserError(
            f"{file}: this drafter belongs to target {trained_for[:12]}, not to {fingerprint[:12]}; its "
            "drafts would be refused"
        )
    tensors = dict(contents.tensors)
    config, taps = _shape(m, tensors, target)

    def whole(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{file}: found no tensor {name!r}, which an EAGLE-3 drafter has")
        found = gguf_files.values(tensors.pop(name), file)
        if found.shape != shape:
            raise UserError(
                f"{file}: tensor {name!r} has the shape {found.shape}, expected {shape} by the file's "
                "metadata and the target"
            )
        return found

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        ours = partition.path_name(path)
        values = whole(_TENSORS[ours], like.shape).astype(np.float32)
        if ours in ("attention/query/weight", "attention/key/weight"):
            values = unpermute(values, config.heads if "query" in ours else config.kv_heads)
        return np.ascontiguousarray(values)

    params = jax.tree_util.tree_map_with_path(leaf, abstract_params(config))
    if _D2T in tensors:
        vocab = np.asarray(tensors.pop(_D2T).data).reshape(-1)
    elif config.vocab_size == target.vocab_size:
        vocab = np.arange(config.vocab_size)
    else:
        vocab = np.zeros(0, np.int64)
    ascending = vocab.dtype.kind == "i" and bool((np.diff(vocab) > 0).all())
    if vocab.shape != (config.vocab_size,) or not ascending or vocab[0] < 0 or vocab[-1] >= target.vocab_size:
        raise UserError(
            f"{file}: 'd2t' does not hold {config.vocab_size} ascending ids below {target.vocab_size}, one "
            "for each row of output.weight; is it of another target?"
        )
    divisors = np.zeros(0)
    if _FREQUENCIES in tensors:
        divisors = gguf_files.values(tensors.pop(_FREQUENCIES), file)
    known = rotary.scaled(dict(config.rope_scaling), config.rope_theta, config.head_size).divisors
    if len(divisors) != len(known) or not np.allclose(divisors, known, rtol=1e-6):
        raise UserError(
            f"{file}: {_FREQUENCIES} stretches the wavelengths in a way that {_SCALING} does not say; "
            "expected the EAGLE-3 files that it was converted from: name their directory"
        )
    if tensors:
        raise UserError(f"{file}: tensor {min(tensors)!r} has no place in an EAGLE-3 drafter")
    return Imported(config, params, vocab.astype(np.int32), taps)


def _shape(
    m: Fields, tensors: Mapping[str, gguf.ReaderTensor], target: TargetConfig
) -> tuple[DrafterConfig, tuple[int, ...]]:
    """The drafter's shape, and the target's layers whose inputs it sees."""
    at = ARCHITECTURE
    m.only(f"{at}.block_count", 1, "a drafter of one layer")
    m.only(f"{at}.norm_before_fc", False)
    taps = m.listed(f"{at}.target_layers", int, 3)
    if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] > target.layers:
        raise m.wrong(f"{at}.target_layers", f"ascending layers of the target, from 0 to {target.layers}")
    for key, value in (("target_hidden_size", target.width), ("vocab_size", target.vocab_size)):
        if m.whole(f"{at}.{key}", value) != value:
            raise m.wrong(f"{at}.{key}", f"the target's {value}; this drafter is for another target")
    width, heads = m.whole(f"{at}.embedding_length"), m.whole(f"{at}.attention.head_count")
    kv_heads = m.whole(f"{at}.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise m.wrong(f"{at}.attention.head_count_kv", f"a divisor of head_count, {heads}")
    size = m.whole(f"{at}.attention.key_length", max(1, width // heads))
    if size % 2:
        raise m.wrong(f"{at}.attention.key_length", "an even size of heads, whose halves are rotated")
    for key in ("attention.value_length", "rope.dimension_count"):
        m.only(f"{at}.{key}", size, "the size of a head")
    if "token_embd.weight" not in tensors and width != target.width:
        raise m.wrong(
            f"{at}.embedding_length", f"{target.width}, as wide as the target's embedding, which it reads"
        )
    if "output.weight" not in tensors:
        raise m.error("found no tensor 'output.weight', which an EAGLE-3 drafter has")
    head = tuple(map(int, tensors["output.weight"].shape))
    if len(head) != 2 or not head[1]:
        raise m.error(f"tensor 'output.weight' has the shape {head}, expected two axes: width and tokens")
    config = DrafterConfig(
        vocab_size=head[1],
        width=width,
        taps_width=3 * target.width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        mlp_hidden=m.whole(f"{at}.feed_forward_length"),
        rope_theta=_written(m.number(f"{at}.rope.freq_base", above=1)),
        norm_epsilon=_written(m.number(f"{at}.attention.layer_norm_rms_epsilon", zero=True)),
        embedding_size=target.vocab_size if "token_embd.weight" in tensors else 0,
        rope_scaling=_scaling(m, size),
        normed_residual=m.flag(f"{at}.norm_before_residual"),
    )
    m.whole(f"{at}.context_length", None)
    m.rest(lambda key: not key.startswith(f"{at}."))
    return config, taps


def _scaling(m: Fields, head_size: int) -> tuple[tuple[str, Any], ...]:
    """How the drafter's wavelengths are stretched, by the key that we write."""
    try:
        pairs = json.loads(m.text(_SCALING, "[]"))
        given = {str(key): value for key, value in pairs}
    except (ValueError, TypeError, RecursionError) as e:
        raise m.wrong(_SCALING, "a list of keys and values of rope_scaling") from e
    _, found = rope_scaling.read(Fields({"rope_scaling": given}, f"{m.where}: {_SCALING}"), head_size)
    if found.get("rope_type", "llama3") != "llama3":
        raise m.wrong(_SCALING, "a scaling of the kind 'llama3', or none")
    return tuple((key, found[key]) for key in given if key in found)


def _written(value: float) -> float:
    """The number that was written: 1e-05, where the file's float32 is its neighbour 9.999999747e-06."""
    return float(str(np.float32(value)))
