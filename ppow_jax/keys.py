"""Sections of the configuration: frozen dataclasses whose fields know their limits and what they mean."""

import dataclasses
import importlib
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ppow_jax.errors import ConfigError


def key(
    default: Any,
    comment: str,
    *,
    at_least: float | None = 0,
    above: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    also: tuple[float, ...] = (),
) -> Any:
    """A field of a section.

    Args:
      default: its value where a config says nothing.
      comment: what it means, its unit.
      at_least, above, at_most: limits of a number; None: no limit.
      choices: the strings it may be; empty: any.
      also: numbers that are allowed beyond the limits.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices, "also": also}
    return dataclasses.field(default=default, metadata={"comment": comment, **limits})


def section(cls: type) -> Any:
    """A field that is a section of its own."""
    return dataclasses.field(default_factory=cls)


_PLURALS = {str: "strings", int: "whole numbers"}


def build(
    cls: type, values: Mapping[str, Any], path: str, unknown: str = "", named: Callable | None = None
) -> Any:
    """A section from a mapping of its keys; those that are missing have their defaults.

    Args:
      cls: the section's dataclass.
      values: its keys, sections in it as mappings too.
      path: of the section, for messages.
      unknown: added to the message about a key that the section has not.
      named: (value, path) -> value of a field that holds sections by name; None: there is none.

    Raises:
      ConfigError: naming the key, what was found and what was expected.
    """
    if not hasattr(values, "keys"):
        raise ConfigError(f"{path}: found {values!r}, expected a group of keys")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{path}.{name}: unknown key; expected one of {', '.join(fields)}{unknown}")
    hints, built = typing.get_type_hints(cls), {}
    for name in values:
        where, value = f"{path}.{name}", values[name]
        if named and typing.get_origin(hints[name]) is Mapping:
            if not hasattr(value, "keys"):
                raise ConfigError(f"{where}: found {value!r}, expected runs by name")
            built[name] = {entry: named(value[entry], f"{where}.{entry}") for entry in value}
        else:
            built[name] = _convert(hints[name], value, where)
            _limit(fields[name], built[name], where)
    try:
        return cls(**built)
    except ConfigError as e:  # of keys that do not go together
        raise ConfigError(f"{path}.{e}") from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        if not isinstance(value, tuple | list) or not all(type(v) is of for v in value):
            raise ConfigError(f"{path}: found {value!r}, expected a tuple of {_PLURALS[of]}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: found {value!r} ({type(value).__name__}), expected {kind.__name__}")
    return value


def _known(kind: Any) -> bool:
    """Whether `_convert` knows a type."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return all(map(_known, typing.get_type_hints(kind).values()))
    if typing.get_origin(kind) is tuple:
        of, *rest = typing.get_args(kind)
        return of in _PLURALS and rest == [...]
    return kind in (bool, int, float, str)


def _limit(field: dataclasses.Field, value: Any, path: str) -> None:
    """Holds a value to the limits of its key."""
    limits = field.metadata
    if not limits:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f"{path}: found {value!r}, expected {' or '.join(limits['choices'])}")
    if isinstance(value, bool) or not isinstance(value, int | float) or value in limits["also"]:
        return
    at_least, above, at_most = limits["at_least"], limits["above"], limits["at_most"]
    holds, bounds = math.isfinite(value), []
    if above is not None:
        holds, bounds = holds and value > above, [f"above {above:g}"]
    elif at_least is not None:
        holds, bounds = holds and value >= at_least, [f"{at_least:g} or more"]
    if at_most is not None:
        holds, bounds = holds and value <= at_most, [*bounds, f"at most {at_most:g}"]
    if not holds:
        bounds += [f"or {x:g}" for x in limits["also"]]
        raise ConfigError(f"{path}: found {value!r}, expected {', '.join(bounds) or 'a number'}")


def imported(name: str, complaint: str) -> Any:
    """What `module:attribute` names.

    Raises:
      ConfigError: there is none; the message begins with the complaint.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as e:
        raise ConfigError(f"{complaint} ({e})") from e


def section_class(name: str, complaint: str, taken: Collection[str]) -> type:
    """The dataclass that `module:Class` names, fit to be a section.

    Args:
      name: of the class.
      complaint: what the message begins with, if there is none.
      taken: names that its fields may not have.

    Raises:
      ConfigError: there is no such dataclass, or a field of it has no default or a name that is taken.
    """
    found = imported(name, complaint)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{complaint} ({found!r} is none)")
    try:
        hints = typing.get_type_hints(found)
    except Exception as e:  # whatever a text in the place of a type evaluates to
        raise ConfigError(f"{complaint} (its types cannot be read: {e})") from e
    for field in dataclasses.fields(found):
        if not _known(hints[field.name]):
            raise ConfigError(
                f"{complaint} (its field {field.name!r} has the type {hints[field.name]}; expected bool, "
                "int, float, str, tuple[int, ...], tuple[str, ...] or a dataclass of such)"
            )
        if field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{complaint} (its field {field.name!r} has no default)")
        if field.name in taken:
            raise ConfigError(f"{complaint} (its field {field.name!r} has a name that is taken: rename it)")
    return found


def to_dict(section: Any) -> dict[str, Any]:
    """A section as nested dicts."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {k: to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}


def described(section: Any, path: str = "config") -> Iterator[tuple[str, Any, str]]:
    """(key, value, comment) of every key of a section."""
    for field in dataclasses.fields(section):
        value, where = getattr(section, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from described(value, where)
        elif field.metadata:
            yield where, value, field.metadata["comment"]
