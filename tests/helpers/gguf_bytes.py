"""GGUF files of any content, also of such as the library's writer refuses to write."""

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from strange import Edit, edited

_STRING, _ARRAY = 8, 9


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """A value's type in GGUF, and its bytes; what GGUF has not becomes text."""
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int() if 0 <= value < 2**32:
            return 4, struct.pack("<I", value)
        case int() if -(2**63) <= value < 0:
            return 11, struct.pack("<q", value)
        case int() if 0 <= value < 2**64:
            return 10, struct.pack("<Q", value)
        case float():
            return 12, struct.pack("<d", value)
        case list():
            items = [_value(item) for item in value]
            kind = items[0][0] if items else 4
            return _ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
        case str():
            return _STRING, _text(value)
    return _STRING, _text(str(value)[:100] if not isinstance(value, int) else "a large number")


def _packed(letter: str, value: Any) -> bytes:
    """A whole number of the file itself; what is none is 7."""
    whole = value if isinstance(value, int) else 7
    return (whole % 2 ** (8 * struct.calcsize(letter))).to_bytes(struct.calcsize(letter), "little")


def file(about: dict[str, Any]) -> bytes:
    """A file of `metadata`, `tensors` (`name`, `sizes`, `kind`, `offset`) and so many bytes of `data`."""
    metadata, tensors = about.get("metadata"), about.get("tensors")
    metadata = metadata if isinstance(metadata, dict) else {}
    tensors = [t for t in tensors if isinstance(t, dict)] if isinstance(tensors, list) else []
    out = b"GGUF" + _packed("I", about.get("version", 3))
    out += struct.pack("<QQ", len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = _value(value)
        out += _text(key) + struct.pack("<I", kind) + data
    for tensor in tensors:
        sizes = tensor.get("sizes")
        sizes = sizes if isinstance(sizes, list) else []
        out += _text(str(tensor.get("name"))[:300]) + struct.pack("<I", len(sizes))
        out += b"".join(_packed("Q", size) for size in sizes)
        out += _packed("I", tensor.get("kind")) + _packed("Q", tensor.get("offset"))
    return out + bytes(-len(out) % 32) + about["data"]


def sound() -> dict[str, Any]:
    """A model of one layer that loads; numbers are in float32."""
    letters, D, M = [chr(97 + i) for i in range(12)], 8, 16
    tokens = [*letters, "ab", "<end>"]
    layer = {"attn_q": [D, D], "attn_k": [D, D // 2], "attn_v": [D, D // 2], "attn_output": [D, D]}
    layer |= {"ffn_gate": [D, M], "ffn_up": [D, M], "ffn_down": [M, D], "attn_norm": [D], "ffn_norm": [D]}
    shapes = {"token_embd.weight": [D, len(tokens)], "output_norm.weight": [D]}
    shapes |= {f"blk.0.{name}.weight": sizes for name, sizes in layer.items()}
    tensors, end = [], 0
    for name, sizes in shapes.items():
        tensors.append({"name": name, "sizes": sizes, "kind": 0, "offset": end})
        end += 4 * int(np.prod(sizes))
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": D,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.feed_forward_length": M,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<end>{% endfor %}",
        "split.count": 1,
    }
    return {"version": 3, "metadata": metadata, "tensors": tensors, "data": bytes(end)}


@dataclasses.dataclass(frozen=True)
class Content:
    """Edits of what a file holds, which is then written anew."""

    name: str
    edits: Sequence[Edit]

    def on(self, files: dict[str, Any]) -> None:
        """Changes the files."""
        about = sound()
        found = edited({key: about[key] for key in ("metadata", "tensors", "version")}, self.edits)
        files[self.name] = file((found if isinstance(found, dict) else {}) | {"data": about["data"]})
