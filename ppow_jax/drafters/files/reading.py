"""Reads a drafter that we, EAGLE, SpecForge or the speculators library wrote."""

import contextlib
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np

from ppow_jax.drafters.eagle3 import DrafterConfig, abstract_params
from ppow_jax.drafters.files import dialects
from ppow_jax.drafters.files.shape import shape
from ppow_jax.errors import UserError
from ppow_jax.models import fields
from ppow_jax.models.target import TargetConfig
from ppow_jax.parallel import partition
from ppow_jax.targets import weights
from ppow_jax.targets.weights import Stored

_NOT_NEEDED = r"rotary_emb|^verifier_|^mask_hidden$"
_NO_WEIGHTS = re.compile(rf"{_NOT_NEEDED}|^(d2t|t2d)$")


class Imported(NamedTuple):
    """A drafter from files.

    Attributes:
      config: its shape.
      params: float32 parameters; without `head` where that is the target's.
      vocab: int32 `[N]`, target ids of the draft ids, ascending.
      taps: the target's layers whose inputs it sees.
      head: whose matrix it predicts with: empty, its own; or the target's "head" or "embedding".
    """

    config: DrafterConfig
    params: dict
    vocab: np.ndarray
    taps: tuple[int, ...]
    head: str = ""


def read(directory: pathlib.Path, target: TargetConfig, fingerprint: str) -> Imported:
    """Reads a drafter.

    Args:
      directory: with `config.json` and safetensors.
      target: shape of the target that will verify.
      fingerprint: names that target.

    Raises:
      UserError: a file is missing or damaged, weights are quantised, a tensor has no place or another shape,
        or the drafter is for another target.
    """
    about = fields.read(directory / "config.json", "an EAGLE-3 drafter's")
    with contextlib.ExitStack() as stack:
        tensors = weights.open_all(directory, "the drafter's weights", stack, _NO_WEIGHTS)
        _check_fingerprint(tensors, fingerprint)
        config, taps = shape(about, tensors, target)
        weights.require_layers(directory / "config.json", config.layers, tensors)
        vocab = _vocab(tensors, config, target, directory)
        server = dialects.server_of(tensors)
        places, head = abstract_params(config), ""
        if dialects.HEAD not in tensors and config.vocab_size == target.vocab_size:
            del places["head"]
            tied = about.flag("tie_word_embeddings")
            head = "embedding" if tied else "head"
            if not tied and config.width != target.width:
                raise about.wrong(
                    "hidden_size", f"{target.width}, as wide as the target's head, which it reads"
                )

        def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
            name = dialects.tensor_name(partition.path_name(path), config, server)
            if name not in tensors:
                raise UserError(f"{directory}: found no tensor {name!r}, which config.json asks for")
            return _tensor(tensors.pop(name), like.shape)

        params = jax.tree_util.tree_map_with_path(leaf, places)
    for name, stored in tensors.items():
        if not re.search(_NOT_NEEDED, name):
            raise UserError(f"{stored.file}: tensor {name!r} has no place in the drafter of config.json")
    if head == "embedding" and config.embedding_size:
        params["head"], head = {"weight": params["embedding"]["embedding"].copy()}, ""
    return Imported(config, params, vocab, taps, head)


def _check_fingerprint(tensors: dict[str, Stored], fingerprint: str) -> None:
    """Raises `UserError` if the files name another target; those of others name none."""
    for stored in {stored.file: stored for stored in tensors.values()}.values():
        trained_for = (stored.reader.metadata() or {}).get(dialects.FINGERPRINT, fingerprint)
        if trained_for != fingerprint:
            raise UserError(
                f"{stored.file}: this drafter belongs to target {trained_for[:12]}, not to "
                f"{fingerprint[:12]}; its drafts would be refused"
            )


def _tensor(stored: Stored, expected: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of the expected shape."""
    found = stored.reader.get_tensor(stored.name)
    if found.shape != expected:
        raise UserError(
            f"{stored.file}: tensor {stored.name!r} has the shape {found.shape}, expected {expected} by "
            "config.json and the target"
        )
    return found.astype(np.float32)


def _vocab(
    tensors: dict[str, Stored], config: DrafterConfig, target: TargetConfig, directory: pathlib.Path
) -> np.ndarray:
    """int32 `[N]`: the target's ids of the draft ids."""
    N, V = config.vocab_size, target.vocab_size
    offsets, mask = _integers(tensors, "d2t", N), _integers(tensors, "t2d", V)
    if offsets is None and N != V:
        raise UserError(
            f"{directory}: found no 'd2t', expected it where {N} draft ids stand for {V} of the target"
        )
    ids = np.arange(N) + (0 if offsets is None else offsets)
    if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= V:
        raise UserError(
            f"{directory}: 'd2t' does not hold offsets (target id = draft id + d2t[draft id]) of ascending "
            f"ids below {V}; is it of another target, or are its ids absolute?"
        )
    if mask is not None and not np.array_equal(np.flatnonzero(mask), ids):
        raise UserError(f"{directory}: 't2d' and 'd2t' name different tokens; the file is damaged")
    return ids.astype(np.int32)


def _integers(tensors: dict[str, Stored], name: str, size: int) -> np.ndarray | None:
    """A list of whole numbers, int64; None: it is not there."""
    if (stored := tensors.pop(name, None)) is None:
        return None
    found = stored.reader.get_tensor(stored.name)
    if found.shape != (size,) or found.dtype.kind not in "iub":
        raise UserError(
            f"{stored.file}: tensor {name!r} is {found.dtype} of the shape {found.shape}, expected whole "
            f"numbers of the shape ({size},) by config.json and the target"
        )
    return found.astype(np.int64)
