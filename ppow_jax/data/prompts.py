"""Prompt sources: `NAME=SOURCE[,NAME=SOURCE...]`.

SOURCE is `builtin:KIND/SPLIT`, a file (`rows`), `tfds:NAME/SPLIT` or `hub:ORG/NAME/SPLIT` (`datasets`), each
with an optional `[:N]`, `[M:N]` or `[M:]`. A comma separates two pairs only where NAME= follows, so paths may
have commas in them.
"""

import collections
import dataclasses
import re
import reprlib
from collections.abc import Iterable
from typing import NamedTuple

from ppow_jax.data import builtin, datasets, dialogue, rows
from ppow_jax.data.prompt import Prompt
from ppow_jax.data.rows import Row
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import files
from ppow_jax.parallel.console import log

_EXPECTED = (
    "NAME=SOURCE, SOURCE being builtin:KIND/SPLIT, tfds:NAME/SPLIT, hub:ORG/NAME/SPLIT or a file, with an "
    "optional [:N], [M:N] or [M:]"
)


class Source(NamedTuple):
    """A pair of a spec: its name, where the prompts are, and `(M, N)` of `[M:N]`."""

    name: str
    where: str
    wanted: tuple[int | None, int | None]


def load(spec: str, key: str, warn: bool = True) -> dict[str, list[Prompt]]:
    """Prompts by source name.

    Ids are unique. A row without one gets `NAME/number`. An id that several sources have becomes `NAME/id` in
    each of them. Sources count as a whole here, so that ids do not depend on what is wanted of them.

    Args:
      spec: see the module's docstring.
      key: the config key that `spec` came from, for messages.
      warn: whether the log says which rows are left out.

    Raises:
      UserError: malformed spec, missing or malformed file, no prompts, an id that occurs twice in a source.
    """
    sources = parse(spec, key)
    whole = _unique({s.name: _read(s, key, warn) for s in sources}, key)
    found = {}
    for name, where, wanted in sources:
        found[name] = whole[name][slice(*wanted)]
        if not found[name]:
            start, stop = ("" if end is None else end for end in wanted)
            raise UserError(
                f"{key}: [{start}:{stop}] leaves none of the {len(whole[name])} prompts of {where!r}; "
                "expected at least one"
            )
    return found


def parse(spec: str, key: str) -> list[Source]:
    """The pairs of a spec.

    Raises:
      ConfigError: a pair that is not NAME=SOURCE, or a name that occurs twice.
    """
    sources: list[Source] = []
    for part in re.split(r",\s*(?=[\w.-]+=)", spec):
        part = part.strip(" \t\n,")
        if not part:
            continue
        match = re.fullmatch(r"([\w.-]+)=(.+?)(?:\[([0-9]{0,18}):([0-9]{0,18})\])?", part)
        if not match:
            raise ConfigError(f"config.{key}: found {part!r}, expected {_EXPECTED}")
        name, where, *ends = match.groups()
        if name in (s.name for s in sources):
            raise ConfigError(f"config.{key}: the name {name!r} occurs twice")
        first, last = (int(end) if end else None for end in ends)
        sources.append(Source(name, where, (first, last)))
    return sources


def _read(source: Source, key: str, warn: bool) -> list[Prompt]:
    kind, _, rest = source.where.partition(":")
    if kind == "builtin":
        try:
            return builtin.generate(*rest.partition("/")[::2])
        except ValueError as e:
            raise ConfigError(f"config.{key}: {e} in {source.where!r}") from e
    found: Iterable[Row]
    if kind == "tfds":
        found = datasets.tfds(rest, key)
    elif kind == "hub":
        found = datasets.hub(rest, key)
    else:
        _check_path(source.where, key)
        found = rows.read(source.where, key)
    prompts = [prompt for _, prompt in of_rows(found, source.name, source.where, warn)]
    if not prompts:
        raise UserError(f"{key}: {source.where!r} holds no prompts; expected at least one")
    return prompts


def _check_path(path: str, key: str) -> None:
    """What is no file may have been meant as a slice, or as two pairs."""
    if re.search(r",|\]$", path) and not files.path_of(path).exists():
        raise ConfigError(
            f"config.{key}: found {path!r}, of which there is no file; expected {_EXPECTED}; a comma "
            "separates pairs where NAME= follows"
        )


def of_rows(found: Iterable[Row], name: str, where: str, warn: bool) -> list[tuple[Row, Prompt]]:
    """Rows with their prompts; those that are no prompts of text alone are left out, which the log says.

    Args:
      found: the rows.
      name: of the source; part of ids that rows do not have.
      where: they come from, for messages.
      warn: whether the log says which are left out.

    Raises:
      UserError: a malformed row, an id that occurs twice, or no row that is not left out.
    """
    kept: list[tuple[Row, Prompt]] = []
    places: dict[str, str] = {}
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    for row in found:
        try:
            said = dialogue.read(row.values, row.place)
        except dialogue.LeftOut as e:
            left_out[str(e)].append(row.place)
            continue
        id_ = _id(row, name)
        if id_ in places:
            raise UserError(
                f"{row.place}: its id {id_!r} is that of {places[id_]} too; expected ids that are unique"
            )
        places[id_] = row.place
        category = row.values.get("category")
        category = "" if category is None else dialogue.checked(str(category), f"{row.place}: 'category'")
        kept.append((row, Prompt(id_, category, *said)))
    if left_out:
        total = len(kept) + sum(map(len, left_out.values()))
        reasons = ", ".join(f"{len(at)} {why} (the first: {at[0]})" for why, at in left_out.items())
        if not kept:
            raise UserError(f"{where}: no prompt is left of {total} rows: {reasons}; use other rows")
        if warn:
            log.warning("%s: left out of %d rows: %s", where, total, reasons)
    return kept


def _id(row: Row, name: str) -> str:
    """A row's own id, or one made of its number."""
    value = row.values.get("id")
    if value is None or value == "":
        return f"{name}/{row.number}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise UserError(f"{row.place}: found {reprlib.repr(value)} as 'id', expected a string or a number")
    return dialogue.checked(str(value), f"{row.place}: 'id'")


def _unique(sources: dict[str, list[Prompt]], key: str) -> dict[str, list[Prompt]]:
    """The sources with `NAME/id` for every id that several of them have."""
    counts = collections.Counter(p.id for prompts in sources.values() for p in prompts)
    made: dict[str, list[Prompt]] = {}
    owners: dict[str, str] = {}
    for name, prompts in sources.items():
        made[name] = [dataclasses.replace(p, id=f"{name}/{p.id}") if counts[p.id] > 1 else p for p in prompts]
        for prompt in made[name]:
            if prompt.id in owners:
                raise UserError(
                    f"{key}: the id {prompt.id!r}, made of a source's name and an id that several sources "
                    f"have, is in {owners[prompt.id]!r} and in {name!r}; rename that source"
                )
            owners[prompt.id] = name
    return made
