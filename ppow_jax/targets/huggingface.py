"""Targets from a Hugging Face directory: `config.json` and safetensors shards (tokenizer: `tokenizer_files`).

Weights go slice by slice into arrays that are laid out over the mesh: every process reads what it holds.
"""

import contextlib
import pathlib
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ppow_jax.errors import UserError
from ppow_jax.models import fields
from ppow_jax.models.target import TargetConfig, abstract_params, with_taps
from ppow_jax.parallel import files, partition
from ppow_jax.targets import directories, families, weights
from ppow_jax.targets.weights import Stored

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_MODULES = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
    "input_layernorm": "attention_norm",
}
_NORMS = {  # the second norm of a layer stands before the MLP, or behind attention in a sandwich
    False: {"post_attention_layernorm": "mlp_norm"},
    True: {
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}
_ENDS = {
    _EMBEDDING: "embedding/embedding",
    "model.norm.weight": "norm/scale",
    _HEAD: "head/weight",
}
_AT_ONCE = 2**24  # bytes
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")
_COMPARED = 64  # rows


def find(path: str) -> pathlib.Path | None:
    """The directory that a path or a name of the hub (`ORGANISATION/MODEL`) means; None: neither."""
    return directories.find(path, "target.path")


def description(path: str) -> dict[str, Any]:
    """What a local directory's config.json says; {} if there is none."""
    return fields.read_if_there(files.path_of(path) / "config.json").values


def load(
    directory: pathlib.Path, dtype: str, mesh: Mesh, taps: tuple[int, ...] | None = None
) -> tuple[TargetConfig, dict]:
    """Shape, with the taps of `with_taps`, and parameters (on the mesh) of the model in a directory.

    Raises:
      UserError: a missing or damaged file, weights that are quantised, a tensor that has no place or another
        shape, or an architecture that is not supported.
    """
    config_file = directory / "config.json"
    about = fields.read(config_file, "the config.json of a model").values
    # what is wrong in it says more than what is wrong in the weights would
    with_taps(families.target_config(about, True, dtype, str(config_file)), taps)
    with contextlib.ExitStack() as stack:
        tensors = _tensors(directory, stack)
        config = families.target_config(about, _HEAD not in tensors, dtype, str(config_file))
        if config.tied_head and _HEAD in tensors:
            _check_tied(tensors, config_file)
        weights.require_layers(config_file, config.layers, tensors)
        places = {_place(name, config, stored.file): stored for name, stored in tensors.items()}
        places.pop(None, None)

        def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
            at = partition.path_name(path)
            if at not in places:
                raise UserError(f"{directory}: found no tensor for {at}, which {config_file.name} asks for")
            return _read(places.pop(at), like, mesh, at)

        params = jax.tree_util.tree_map_with_path(leaf, abstract_params(config))
    if places:
        left = next(iter(places.values()))
        raise UserError(
            f"{left.file}: tensor {left.name!r} has no place in the decoder of {config_file.name}"
        )
    return with_taps(config, taps), params


def _tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """All tensors about text, by their names without the prefix of a model that sees pictures."""
    found, plain = weights.open_all(directory, "the model's weights", stack, _IGNORED), {}
    for name, stored in found.items():
        if _plain(name) in plain:
            raise UserError(f"{stored.file}: tensor {name!r} is there by another name too, expected it once")
        plain[_plain(name)] = stored
    return plain


def _check_tied(tensors: dict[str, Stored], config_file: pathlib.Path) -> None:
    """Raises `UserError` if a head that should be the embedding is another matrix, by its first rows."""
    if _EMBEDDING not in tensors:
        return
    head, embedding = (tensors[name].slices()[:_COMPARED] for name in (_HEAD, _EMBEDDING))
    if not np.array_equal(head, embedding):
        raise UserError(
            f"{config_file}: found tie_word_embeddings true, but {_HEAD} is not {_EMBEDDING}; expected false "
            "to use it, or a file without it"
        )


def _plain(name: str) -> str:
    return re.sub(r"^(model\.)?language_model\.(model\.)?(?=embed|layers|norm)", "model.", name).replace(
        "language_model.lm_head", "lm_head"
    )


def _place(name: str, config: TargetConfig, file: pathlib.Path) -> str | None:
    """Our path of a tensor; None if it is not needed.

    Raises:
      UserError: there is no such path.
    """
    if _IGNORED.search(name) or (name == _HEAD and config.tied_head):
        return None
    if name in _ENDS:
        return _ENDS[name]
    modules = _MODULES | _NORMS[config.post_norms]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in modules:
        raise UserError(f"{file}: tensor {name!r} has no place in the decoder of config.json")
    module = modules[match[2]]
    kind = "scale" if module.endswith("norm") else match[3]
    return f"layers_{match[1]}/{module}/{kind}"


def _read(stored: Stored, like: jax.ShapeDtypeStruct, mesh: Mesh, path: str) -> jax.Array:
    """One tensor, laid out by the table; only the slices that this process holds are read."""
    rows = stored.slices()
    if tuple(rows.get_shape()) != like.shape:
        raise UserError(
            f"{stored.file}: tensor {stored.name!r} has the shape {tuple(rows.get_shape())}, expected "
            f"{like.shape} by config.json"
        )
    layout = jax.sharding.NamedSharding(mesh, partition.spec(path, like.shape, mesh))
    array = jax.make_array_from_callback(like.shape, layout, lambda at: _slice(rows, at or (), like))
    return jax.block_until_ready(array)  # copies go on in the background: the next would be held beside it


def _slice(rows: Any, at: tuple[slice, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
    """A part of a tensor, read some rows at a time: the library holds twice what it reads at once."""
    first, *rest = (slice(*part.indices(size)) for part, size in zip(at, like.shape, strict=True))
    out = np.empty([part.stop - part.start for part in (first, *rest)], like.dtype)
    step = max(1, _AT_ONCE // max(1, out[:1].nbytes))
    for row in range(0, len(out), step):
        end = min(row + step, len(out))
        out[row:end] = rows[(slice(first.start + row, first.start + end), *rest)]
    return out
