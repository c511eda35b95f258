"""Targets from a Hugging Face directory: `config.json`, safetensors shards, tokenizer and chat template.

Weights go slice by slice into arrays that are laid out over the mesh: every process reads what it holds.
"""

import contextlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import tokenizers
from jax.sharding import Mesh

from ppow_jax.errors import UserError
from ppow_jax.models.target import TargetConfig, abstract_params
from ppow_jax.parallel import files, partition
from ppow_jax.targets import families
from ppow_jax.targets.tokenizer import ENDS, Tokenizer, with_stops

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
    "model.embed_tokens.weight": "embedding/embedding",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "head/weight",
}
_AT_ONCE = 2**24  # bytes
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")


def find(path: str) -> pathlib.Path | None:
    """The directory that a path or a name of the hub (`ORGANISATION/MODEL`) means; None: neither."""
    directory = pathlib.Path(path).expanduser()
    if (directory / "config.json").is_file():
        return directory
    if directory.is_dir():
        raise UserError(f"target.path: {path!r} has no config.json; expected a Hugging Face directory")
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(".gguf")
    return _download(path) if named and not directory.exists() else None


def description(path: str) -> dict[str, Any]:
    """What a local directory's config.json says; {} if there is none."""
    return _json(pathlib.Path(path).expanduser() / "config.json")


def _download(name: str) -> pathlib.Path:
    """The directory of a model of the Hugging Face hub.

    Raises:
      UserError: huggingface_hub is not installed, or the model cannot be fetched.
    """
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError(f"target.path: {name!r} wants `pip install 'ppow_jax[hub]'`") from e
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # no network, no such model, no access: as many kinds of error
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"target.path: {name!r} cannot be fetched from the Hugging Face hub ({reason}); a local "
            "directory with the same files will do"
        ) from e


def _json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file; {} if there is none.

    Raises:
      UserError: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable JSON file ({e})") from e


def load(directory: pathlib.Path, dtype: str, mesh: Mesh) -> tuple[TargetConfig, dict]:
    """Shape and parameters (on the mesh) of the model in a directory.

    Raises:
      UserError: a missing or truncated file, a tensor that has no place or another shape, or an
        architecture that is not supported.
    """
    config_file = directory / "config.json"
    with contextlib.ExitStack() as stack:
        tensors = _tensors(directory, stack)
        tied = "lm_head.weight" not in tensors
        config = families.target_config(_json(config_file), tied, dtype, str(config_file))
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
    return config, params


class _Stored(NamedTuple):
    """Where a tensor is: its name in an open file."""

    file: pathlib.Path
    reader: safetensors.safe_open
    name: str


def _tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """All tensors by their names without the prefix of a model that sees pictures."""
    index = directory / "model.safetensors.index.json"
    listed = _json(index).get("weight_map")
    names = sorted(set(listed.values())) if listed else ["model.safetensors"]
    expected = f"the model's safetensors{f', which {index.name} names' if listed else ''}"
    found: dict[str, _Stored] = {}
    for file in (directory / name for name in names):
        reader = stack.enter_context(files.open_safetensors(file, expected))
        found |= {_plain(name): _Stored(file, reader, name) for name in reader.keys()}  # noqa: SIM118
    return found


def _plain(name: str) -> str:
    return re.sub(r"^(model\.)?language_model\.(model\.)?(?=embed|layers|norm)", "model.", name).replace(
        "language_model.lm_head", "lm_head"
    )


def _place(name: str, config: TargetConfig, file: pathlib.Path) -> str | None:
    """Our path of a tensor; None if it is not needed.

    Raises:
      UserError: there is no such path.
    """
    if _IGNORED.search(name) or (name == "lm_head.weight" and config.tied_head):
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


def _read(stored: _Stored, like: jax.ShapeDtypeStruct, mesh: Mesh, path: str) -> jax.Array:
    """One tensor, laid out by the table; only the slices that this process holds are read."""
    rows = stored.reader.get_slice(stored.name)
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


def tokenizer(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of a directory: `tokenizer.json`, `tokenizer_config.json`, the chat template.

    Raises:
      UserError: a file is missing or cannot be read, or there is no chat template.
    """
    file = directory / "tokenizer.json"
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing more specific
        raise UserError(f"{file}: no readable tokenizer ({e}); expected the model's tokenizer.json") from e
    about = _json(directory / "tokenizer_config.json")
    text = lambda key: _content(about.get(f"{key}_token")) or ""  # noqa: E731
    ends = [_json(directory / f"{name}.json").get("eos_token_id") for name in ("generation_config", "config")]
    ends = next((e for e in ends if e is not None), [])
    written = [core.token_to_id(text("eos")), *(ends if isinstance(ends, list) else [ends])]
    written += [core.token_to_id(token) for token in ENDS]
    stops = tuple(dict.fromkeys(i for i in written if i is not None))
    if not stops:
        raise UserError(f"{directory}: found no eos_token_id in its files, expected the ids that end a text")
    template = _template(directory, about)
    return with_stops(Tokenizer(core, template, stops, text("bos"), text("eos")))


def _content(token: Any) -> str | None:
    """A token's text, which the files hold alone or as one of its properties."""
    return token["content"] if isinstance(token, dict) else token


def _template(directory: pathlib.Path, about: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = about.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {t["name"]: t["template"] for t in found}.get("default")
    if not found:
        raise UserError(
            f"{directory}: found no chat_template.jinja and no 'chat_template' in tokenizer_config.json; "
            "write the model's template into chat_template.jinja"
        )
    return found
