"""The safetensors files of a model's directory, of a target or a drafter: one, or shards with an index."""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (lets NumPy, and so safetensors, know bfloat16)
import safetensors

from ppow_jax.errors import UserError
from ppow_jax.models import fields
from ppow_jax.targets import quantised

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = re.compile(r".+\.(bin|pt|pth|ckpt)")
LFS = b"version https://git-lfs"


class Stored(NamedTuple):
    """Where a tensor is: its name in an open file."""

    file: pathlib.Path
    reader: safetensors.safe_open
    name: str

    def slices(self) -> Any:
        """The tensor, read where it is indexed."""
        return self.reader.get_slice(self.name)


def names(directory: pathlib.Path) -> list[str]:
    """The names of the files that hold a model's weights.

    Raises:
      UserError: the index is damaged, or names a file outside the directory.
    """
    return sorted(set(_listed(directory).values())) or [WHOLE]


def _listed(directory: pathlib.Path) -> dict[str, str]:
    """Tensor -> file, from the index; {}: there is one file, which goes first as in transformers."""
    if (directory / WHOLE).is_file() or not (directory / INDEX).is_file():
        return {}
    index = fields.read(directory / INDEX, "the index of a model's shards")
    index.of = "such an index"
    found = index.group("weight_map")
    if not (found and found.values):
        raise index.wrong("weight_map", "the file of each tensor")
    for tensor in found.values:
        file = found.text(tensor)
        if (
            pathlib.PurePosixPath(file).is_absolute()
            or ".." in re.split(r"[/\\]", file)
            or "\\" in file
            or not file
        ):
            raise found.wrong(tensor, "a file inside the directory")
    return dict(found.values)


def open_all(
    directory: pathlib.Path, expected: str, stack: contextlib.ExitStack, others: re.Pattern
) -> dict[str, Stored]:
    """All tensors of a directory, by their names.

    Args:
      directory: of the model.
      expected: whose weights they are, for errors.
      stack: closes the files.
      others: tensors that are no weights of the model, by their names: they may be of any dtype.

    Raises:
      UserError: a file is missing, damaged or of another kind; weights are quantised; the index does not fit
        the files.
    """
    listed = _listed(directory)
    found: dict[str, Stored] = {}
    if not listed and not (directory / WHOLE).is_file():
        raise UserError(instead(directory, expected))
    for file in (directory / name for name in names(directory)):
        reader = stack.enter_context(open_one(file, f"{expected}, which {INDEX} names"))
        for name in reader.keys():  # noqa: SIM118
            if name in found:
                raise UserError(
                    f"{file}: tensor {name!r} is in {found[name].file.name} too, expected it once"
                )
            found[name] = Stored(file, reader, name)
            if not others.search(name):
                quantised.refuse_tensor(file, name, found[name].slices().get_dtype())
    for name, holder in listed.items():
        if name not in found or found[name].file != directory / holder:
            raise UserError(f"{directory / INDEX}: found tensor {name!r} in {holder}, which does not hold it")
    return found


def require_layers(where: Any, layers: int, tensors: Sized) -> None:
    """Raises `UserError` if a file claims more layers than it has tensors: to lay them all out takes long."""
    if layers > len(tensors):
        raise UserError(
            f"{where}: found {layers} layers, but {len(tensors)} tensors; is it of another model?"
        )


def is_pickle(file: pathlib.Path) -> bool:
    """Whether its name says that torch wrote it."""
    return _PICKLES.fullmatch(file.name) is not None


def instead(directory: pathlib.Path, expected: str) -> str:
    """Says what a directory holds in place of safetensors, and what to do."""
    where = f"{directory / WHOLE}: not there; expected {expected} as safetensors"
    if others := sorted(p.name for p in directory.glob("*.safetensors")):
        return (
            f"{where}; found {', '.join(others[:3])}: fetch {INDEX}, which says what each of them holds, or "
            f"give the file, if it is all, the name {WHOLE}"
        )
    pickles = sorted(p.name for p in directory.iterdir() if is_pickle(p) and p.name != "training_args.bin")
    if "pytorch_model.bin" in pickles or (len(pickles) == 1 and "-of-" not in pickles[0]):
        name = "pytorch_model.bin" if "pytorch_model.bin" in pickles else pickles[0]
        return f"{where}; found {name}, a pickle, which is not read because it can run code; {_convert(name)}"
    if pickles or (directory / "pytorch_model.bin.index.json").is_file():
        return (
            f"{where}; found shards of pytorch_model.bin, pickles, which are not read because they can run "
            'code; convert them there: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('.', torch_dtype='auto').save_pretrained('converted')\""
        )
    return f"{where}; if they come as pytorch_model.bin alone, fetch it and {_convert('pytorch_model.bin')}"


def _convert(name: str) -> str:
    """How to make safetensors of one pickle, without running what is in it."""
    return (
        'convert it there: python -c "import torch, safetensors.torch as s; '
        f"w = torch.load('{name}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone() for k, v in w.items()}}, '{WHOLE}')\""
    )


@contextlib.contextmanager
def open_one(file: pathlib.Path, expected: str) -> Iterator[safetensors.safe_open]:
    """A reader of NumPy arrays.

    Args:
      file: to read.
      expected: what should be there, for the error.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        there = file.is_file()
    except OSError as e:  # as of a name that is too long
        raise UserError(f"{file}: cannot be read ({e.strerror}); expected {expected}") from e
    if not there:
        raise UserError(f"{file}: not there; expected {expected}")
    try:
        with safetensors.safe_open(file, framework="numpy") as reader:
            yield reader
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(damaged(file, "safetensors", e)) from e


def damaged(file: pathlib.Path, kind: str, error: Exception, remedy: str = "fetch it again") -> str:
    """What is said of a file of weights that cannot be read."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            pointer = f.read(len(LFS)) == LFS
    except OSError as e:
        return f"{file}: cannot be read ({e.strerror})"
    if pointer:
        return (
            f"{file}: found a Git LFS pointer, expected the {kind} file that it stands for; run git lfs pull"
        )
    reason = " ".join(str(error).split())[:160]
    return f"{file}: not a complete {kind} file ({size} bytes; {reason}); {remedy}"
