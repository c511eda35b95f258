"""Prompt sources: `NAME=SOURCE[,NAME=SOURCE...]`.

SOURCE is `builtin:KIND/SPLIT`, a JSONL path, or `tfds:NAME/SPLIT`, each with an optional `[:N]`.
"""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ppow_jax.data import builtin
from ppow_jax.data.prompt import Prompt
from ppow_jax.errors import ConfigError, UserError

# Features of TFDS datasets that hold what a user would ask, most specific first.
_TFDS_FIELDS = ("turns", "prompt", "instruction", "question", "text", "document", "article", "en")


def load(spec: str, key: str) -> dict[str, list[Prompt]]:
    """Prompts by source name.

    Args:
      spec: see the module's docstring.
      key: the config key that `spec` came from, for messages.

    Raises:
      UserError: malformed spec, missing or malformed file, no prompts, an id that occurs twice.
    """
    sources: dict[str, list[Prompt]] = {}
    sources_of: dict[str, str] = {}
    for name, where, limit in parse(spec, key):
        prompts = _read(where, key)[:limit]
        if not prompts:
            raise UserError(f"{key}: {where!r} holds no prompts; expected at least one")
        for prompt in prompts:
            if prompt.id in sources_of:
                raise UserError(
                    f"{key}: id {prompt.id!r} is in {sources_of[prompt.id]!r} and in {name!r}; ids must be "
                    f"unique"
                )
            sources_of[prompt.id] = name
        sources[name] = prompts
    return sources


def parse(spec: str, key: str) -> list[tuple[str, str, int | None]]:
    """(name, source, limit or None) of each pair.

    Raises:
      ConfigError: a pair that is not NAME=SOURCE, or a name that occurs twice.
    """
    pairs: list[tuple[str, str, int | None]] = []
    for part in filter(None, (p.strip() for p in spec.split(","))):
        match = re.fullmatch(r"([\w.-]+)=(.+?)(?:\[:(\d+)\])?", part)
        if not match:
            raise ConfigError(
                f"config.{key}: found {part!r}, expected NAME=SOURCE, SOURCE being builtin:KIND/SPLIT, "
                "a JSONL path or tfds:NAME/SPLIT, with an optional [:N]"
            )
        name, where, limit = match.groups()
        if name in (n for n, _, _ in pairs):
            raise ConfigError(f"config.{key}: the name {name!r} occurs twice")
        pairs.append((name, where, int(limit) if limit else None))
    return pairs


def _read(where: str, key: str) -> list[Prompt]:
    if where.startswith("builtin:"):
        kind, _, split = where.removeprefix("builtin:").partition("/")
        try:
            return builtin.generate(kind, split)
        except ValueError as e:
            raise ConfigError(f"config.{key}: {e}") from e
    if where.startswith("tfds:"):
        return list(_tfds(where.removeprefix("tfds:"), key))
    return [_prompt(row, where, i) for i, row in enumerate(read_jsonl(where, key), 1)]


def read_jsonl(path: str, key: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
      UserError: no such file, one that is not text, or a line that is not a JSON object.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: no file {path!r}; expected a JSONL file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e}); expected a JSONL file") from e
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not JSON ({e})") from e
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {type(row).__name__}, expected an object")
        rows.append(row)
    return rows


def _prompt(row: dict[str, Any], path: str, number: int) -> Prompt:
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise UserError(f"{path}: object {number} has no 'turns': expected a list of user messages")
    name = str(row.get("id", f"{pathlib.Path(path).stem}/{number}"))
    return Prompt(name, str(row.get("category", "")), tuple(turns))


def _tfds(name_split: str, key: str) -> Iterator[Prompt]:
    import tensorflow_datasets as tfds

    name, _, split = name_split.rpartition("/")
    try:
        source = tfds.data_source(name, split=split)
    except Exception as e:  # tfds raises many kinds for a wrong name, split or format
        message = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{key}: tfds:{name_split} cannot be read ({message}); expected tfds:NAME/SPLIT of a "
            "dataset prepared with file_format='array_record'"
        ) from e
    for i in range(len(source)):
        row = source[i]
        field = next((f for f in _TFDS_FIELDS if f in row), None)
        if field is None:
            raise UserError(
                f"{key}: tfds:{name_split} has the features {sorted(row)}, expected one of "
                f"{', '.join(_TFDS_FIELDS)}"
            )
        value = row[field]
        texts = value if field == "turns" else [value]
        turns = tuple(t.decode() if isinstance(t, bytes) else str(t) for t in texts)
        yield Prompt(f"{name_split}/{i}", name, turns)
