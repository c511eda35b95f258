"""Small files that claim to be large: refused before memory is taken for what they claim.

Meanwhile the process may not take much more than it has.
"""

import gzip
import pathlib
import struct

import gguf_bytes
import pytest
import strange
from test_model_files import shards

from ppow_jax.data import prompts
from ppow_jax.errors import UserError
from ppow_jax.targets import gguf_files, weights

resource = pytest.importorskip("resource", reason="limits are Unix's")
HUGE = (2**31, 10**18, 2**63 - 1, 2**64 - 1)
ROOM = 2**28  # bytes


def limited(read, *said: str) -> None:
    """Asserts that a reader refuses a file, and takes little memory for that."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    held = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, kept[1]))
    try:
        with pytest.raises(UserError) as caught:
            read()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)
    for words in said:
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("size", HUGE)
def test_a_header_of_safetensors(size, tmp_path):
    file = tmp_path / "model.safetensors"

    def opened() -> None:
        with weights.open_one(file, "weights"):
            pass

    file.write_bytes(struct.pack("<Q", size) + b"{}")
    limited(opened, str(file), "not a complete safetensors file")
    head, data = strange.parted(next(iter(shards().values())))
    for about in head.values():
        about["shape"][0] = size
    file.write_bytes(strange.joined(strange.dumped(head), data))
    limited(opened, str(file), "not a complete safetensors file")


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize(
    "what", ["tensors", "metadata", "a text", "a list", "a list of texts", "a tensor", "an offset"]
)
def test_a_gguf_file(what, size, tmp_path):
    about, file = gguf_bytes.sound(), tmp_path / "model.gguf"
    if what == "a tensor":
        about["tensors"][0]["sizes"] = [size % 2**63, size % 2**63]
    elif what == "an offset":
        about["tensors"][0]["offset"] = size // 32 * 32
    data, packed = gguf_bytes.file(about), struct.pack("<Q", size)
    at = {
        "tensors": 8,
        "metadata": 16,
        "a text": 24,
        "a list": data.index(b"tokenizer.ggml.token_type") + 25 + 8,
        "a list of texts": data.index(b"tokenizer.ggml.tokens") + 21 + 8,
    }.get(what)
    file.write_bytes(data if at is None else data[:at] + packed + data[at + 8 :])
    limited(lambda: gguf_files.read(file), str(file), "not a complete GGUF file")


@pytest.mark.parametrize("byte", [b" ", b"[", b"9", b'"'])
def test_a_gzip_file(byte, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(gzip.compress(byte * 2**27, 1))
    limited(lambda: prompts.load(f"x={file}", "respond.prompts"), str(file), "more than 67108864 bytes")
