"""Safetensors of a directory: one file or shards, whole and unquantised, or refused by name."""

import contextlib
import json
import pathlib
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ppow_jax.errors import UserError
from ppow_jax.targets import weights

NOTHING = re.compile("^others$")
A, B = "a-00001.safetensors", "sub/b.safetensors"


def values(directory: pathlib.Path) -> dict[str, list]:
    with contextlib.ExitStack() as stack:
        found = weights.open_all(directory, "the model's weights", stack, NOTHING)
        return {name: stored.slices()[:].tolist() for name, stored in found.items()}


def refused(directory: pathlib.Path, *said: str) -> None:
    with pytest.raises(UserError) as e:
        values(directory)
    assert "\n" not in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)


def index(directory: pathlib.Path, weight_map, **more) -> None:
    (directory / weights.INDEX).write_text(json.dumps({"weight_map": weight_map} | more))


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    (tmp_path / "sub").mkdir()
    safetensors.numpy.save_file({"x": np.ones(2, "f")}, tmp_path / A)
    safetensors.numpy.save_file({"y": np.zeros(3, "f"), "others": np.ones(1, np.int8)}, tmp_path / B)
    index(tmp_path, {"x": A, "y": B}, metadata={"total_size": 20})
    return tmp_path


def test_shards_are_read_by_their_index_and_one_file_goes_first(shards):
    assert values(shards) == {"x": [1, 1], "y": [0, 0, 0], "others": [1]}
    assert weights.names(shards) == [A, B]
    safetensors.numpy.save_file({"z": np.ones(1, "f")}, shards / weights.WHOLE)
    assert values(shards) == {"z": [1]} and weights.names(shards) == [weights.WHOLE]


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, "x", [["x", A]], {"x": 1}, {"x": [A]}, {"x": None}],
)
def test_an_index_that_holds_something_else(shards, weight_map):
    index(shards, weight_map)
    refused(
        shards, weights.INDEX, "weight_map" if weight_map != {"x": 1} else "weight_map.x 1, expected a text"
    )
    (shards / weights.INDEX).write_text(json.dumps([{"weight_map": {"x": A}}]))
    refused(shards, weights.INDEX, "expected an object")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "sub/../../a", "/etc/passwd", "..", "..\\a", "c:\\a", ""]
)
def test_files_outside_the_directory_are_not_read(shards, name):
    index(shards, {"x": name, "y": B})
    refused(shards, weights.INDEX, "weight_map.x", "expected a file inside the directory")


def test_a_shard_whose_name_is_too_long(shards):
    index(shards, {"x": "a" * 300 + ".safetensors", "y": B})
    refused(shards, "cannot be read (File name too long)")


def test_an_index_that_does_not_fit_its_files(shards):
    index(shards, {"x": B, "y": B})
    refused(shards, weights.INDEX, "'x' in sub/b.safetensors, which does not hold it")
    index(shards, {"x": A, "y": B, "gone": B})
    refused(shards, "'gone'", "does not hold it")
    index(shards, {"x": A, "y": "c.safetensors"})
    refused(shards, "c.safetensors: not there", weights.INDEX)
    safetensors.numpy.save_file({"x": np.ones(2, "f"), "y": np.ones(3, "f")}, shards / A)
    index(shards, {"x": A, "y": B})
    refused(shards, B, "tensor 'y' is in a-00001.safetensors too")


def header(entries: dict, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        header({"x": entry(0, 8)}, 2**60),
        header({"x": entry(0, 8)}, 10),
        header({"x": entry(0, 8)}, data=bytes(7)),
        header({"x": entry(0, 8)}, data=bytes(9)),
        header({"x": entry(0, 8), "y": entry(4, 8)}),
        header({"x": entry(0, 4), "y": entry(8, 12)}, data=bytes(12)),
        header({"x": entry(0, 8) | {"shape": [3]}}),
        header({"x": entry(0, 8) | {"shape": [2**62, 2**62]}}),
        header({"x": entry(0, 8, "F5")}),
        header({"x": [0, 8]}),
        header([]),
        bytes(8) + b"{}",
    ],
)
def test_headers_that_lie(tmp_path, content):
    (tmp_path / weights.WHOLE).write_bytes(content)
    refused(
        tmp_path, weights.WHOLE, f"not a complete safetensors file ({len(content)} bytes", "fetch it again"
    )


def test_what_stands_for_a_file(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / weights.WHOLE).write_bytes(pointer)
    refused(tmp_path, "Git LFS pointer", "git lfs pull")
    (tmp_path / weights.WHOLE).unlink()
    (tmp_path / weights.WHOLE).mkdir()
    refused(tmp_path, f"{weights.WHOLE}: not there")


FLOAT8 = np.ones((2, 2), ml_dtypes.float8_e4m3fn)
QUANTISED = {
    "whole numbers": ({"m.weight": np.ones((2, 2), np.int8)}, "'m.weight' holds I8,"),
    "bytes": ({"m.weight": np.ones((2, 2), np.uint8)}, "holds U8,"),
    "long whole numbers": ({"m.weight": np.ones((2, 2), np.int64)}, "holds I64,"),
    "truth": ({"m.weight": np.ones((2, 2), bool)}, "holds BOOL,"),
    "floats of 8 bits": ({"m.weight": FLOAT8}, "holds F8_E4M3,"),
    "other floats of 8 bits": ({"m.weight": FLOAT8.astype(ml_dtypes.float8_e5m2)}, "holds F8_E5M2,"),
    "gptq": ({"m.qweight": np.ones((2, 2), np.int32)}, "GPTQ or AWQ"),
    "gptq's order": ({"m.g_idx": np.ones(2, np.int32)}, "GPTQ or AWQ"),
    "compressed-tensors": ({"m.weight_packed": np.ones((2, 2), np.int32)}, "compressed-tensors"),
    "bitsandbytes": ({"m.SCB": np.ones(2, "f")}, "bitsandbytes"),
    "bitsandbytes, 4 bits": ({"m.weight.absmax": np.ones(2, "f")}, "bitsandbytes"),
    "fp8 in blocks": ({"m.weight_scale_inv": np.ones(2, "f")}, "FP8 in blocks"),
    "scales": ({"m.weight_scale": np.ones(2, "f")}, "scales beside them"),
    "scales of inputs": ({"m.input_scale": np.ones(1, "f")}, "scales beside them"),
    "mlx": ({"m.scales": np.ones(2, "f")}, "packed"),
    "mxfp4": ({"m.gate_blocks": np.ones(2, np.uint8)}, "packed"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_refused_by_their_scheme(name, tmp_path):
    tensors, said = QUANTISED[name]
    safetensors.numpy.save_file(tensors, tmp_path / weights.WHOLE)
    refused(tmp_path, weights.WHOLE, said, "expected weights in float32, bfloat16 or float16")


def test_floats_of_16_bits_and_more_are_read(tmp_path):
    kinds = ("float16", ml_dtypes.bfloat16, "float32", "float64")
    safetensors.numpy.save_file(
        {f"x{i}": np.ones(1, k) for i, k in enumerate(kinds)}, tmp_path / weights.WHOLE
    )
    assert set(map(str, values(tmp_path))) == {"x0", "x1", "x2", "x3"}


def test_pickles_are_not_read_and_it_is_said_how_to_convert_them(tmp_path):
    refused(tmp_path, f"{weights.WHOLE}: not there", "if they come as pytorch_model.bin alone", "convert")
    (tmp_path / "training_args.bin").touch()
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    refused(tmp_path, "shards of pytorch_model.bin", "save_pretrained('converted')")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(
        tmp_path, "found pytorch_model.bin, a pickle", "torch.load('pytorch_model.bin'", "weights_only=True"
    )
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "drafter.pt")
    refused(tmp_path, "found drafter.pt, a pickle", "torch.load('drafter.pt'")
