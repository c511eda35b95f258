"""The keys of a JSON object in a model's files: of their type, within limits, and none of them overlooked."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ppow_jax.errors import UserError

WHOLE = 2**31 - 1  # the largest whole number: a dimension of an array
REQUIRED: Any = object()  # as a default: there is none


def read(path: pathlib.Path, expected: str) -> "Fields":
    """What a JSON file holds.

    Args:
      path: of the file.
      expected: what it should be, for the error.

    Raises:
      UserError: it is not there, cannot be read, or holds no object.
    """
    try:
        text = path.read_text("utf-8-sig")
        values = json.loads(text)
        if r"\ud" in text.lower():  # perhaps a half of a surrogate pair, which is no text
            json.dumps(values, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as e:
        reason = "brackets without end" if isinstance(e, RecursionError) else e
        raise UserError(f"{path}: no readable JSON file ({reason}); expected {expected}") from e
    return Fields(values, str(path))


def read_if_there(path: pathlib.Path) -> "Fields":
    """What a JSON file of a model holds; no keys where there is no file. Errors as of `read`."""
    return read(path, f"the {path.name} of a model") if path.is_file() else Fields({}, str(path))


class Fields:
    """A group of keys, each asked for with its type, its limits and what it is where it is missing.

    A key that holds null is missing too. `rest` refuses keys that nobody has asked for.

    Attributes:
      values: all of them.
      where: the file, for errors.
      asked: what has been asked for so far, with what it is.
      of: what has such keys, for errors.
      remedy: what to do where a key is missing or wrong, for errors.
    """

    def __init__(
        self, values: Any, where: str, prefix: str = "", of: str = "a model", remedy: str = ""
    ) -> None:
        self.values, self.where, self.of, self.prefix, self.remedy = values, where, of, prefix, remedy
        self.asked: dict[str, Any] = {}
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: found {shown(values)}, expected an object: keys and their values")

    def given(self, key: str) -> bool:
        """Whether there is such a key, and not null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, expected: str, found: str = "") -> UserError:
        """The error of a key that holds something else than what is expected.

        `found` says what, where that is not the value itself.
        """
        found = found or shown(self.values.get(key))
        remedy = f"; {self.remedy}" if self.remedy else ""
        return self.error(f"found {self.prefix}{key} {found}, expected {expected}{remedy}")

    def error(self, message: str) -> UserError:
        """An error of the file."""
        return UserError(f"{self.where}: {message}")

    def _get(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        if not self.given(key):
            if default is REQUIRED:
                missing = f"found no {self.prefix + key!r}, which {self.of} has"
                raise self.error(f"{missing}; {self.remedy or 'add it'}")
            self.asked[key] = default
        elif not fits(self.values[key]):
            raise self.wrong(key, expected)
        else:
            self.asked[key] = self.values[key]
        return self.asked[key]

    def whole(self, key: str, default: Any = REQUIRED, least: int = 1, most: int = WHOLE) -> Any:
        """A whole number."""
        limits = f"a whole number from {least} to {most}"
        return self._get(key, default, lambda v: _is_whole(v) and least <= v <= most, limits)

    def number(self, key: str, default: Any = REQUIRED, above: float = 0.0, zero: bool = False) -> Any:
        """A finite number above a limit, or 0 if `zero` says so, as a float."""
        fits = lambda v: _is_number(v) and (v > above or (zero and v == 0))  # noqa: E731
        found = self._get(key, default, fits, f"a number above {above:g}{' or 0' if zero else ''}")
        return found if found is default else float(found)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        return self._get(key, default, lambda v: isinstance(v, bool), "true or false")

    def text(self, key: str, default: Any = REQUIRED, choices: Mapping | tuple | None = None) -> Any:
        """A text, one of the choices if there are any."""
        expected = f"one of {', '.join(choices)}" if choices else "a text"
        return self._get(
            key, default, lambda v: isinstance(v, str) and (choices is None or v in choices), expected
        )

    def listed(self, key: str, kind: type, count: int | None = None, default: Any = REQUIRED) -> Any:
        """A list as a tuple: of texts (`str`), whole numbers (`int`) or numbers above 0 (`float`)."""
        fits_one, plural = _KINDS[kind]
        expected = f"a list of {'' if count is None else f'{count} '}{plural}"
        fits = lambda v: isinstance(v, list | tuple) and count in (None, len(v))  # noqa: E731
        found = self._get(key, default, fits, expected)
        if found is default:
            return default
        for value in found:
            if not fits_one(value):
                raise self.wrong(key, expected, f"with {shown(value)} in it")
        return tuple(map(kind, found))

    def mixed(self, key: str, kind: type, expected: str) -> Any:
        """A list or an object of values that the caller checks; an empty one where the key is missing."""
        return self._get(key, kind(), lambda v: isinstance(v, kind), expected)

    def group(self, key: str) -> "Fields | None":
        """Keys one level down; None: there are none."""
        return self.part(key) if self._get(key, None, lambda v: True, "") is not None else None

    def part(self, key: str) -> "Fields":
        """Keys one level down, which must be there."""
        found = self._get(key, REQUIRED, lambda v: isinstance(v, Mapping), "a group of keys")
        return Fields(found, self.where, f"{self.prefix}{key}.", self.of, self.remedy)

    def only(self, key: str, value: Any, why: str = "nothing else is supported") -> None:
        """Raises `UserError` unless a key is missing or holds this value."""
        same = lambda v: v == value and isinstance(v, bool) == isinstance(value, bool)  # noqa: E731
        self._get(key, value, same, f"{json.dumps(value)}: {why}")

    def rest(self, harmless: Callable[[str], bool]) -> None:
        """Raises `UserError` if there is a key that nobody has asked for, unless it changes no result.

        That is so if it is known to be `harmless`, or if it holds nothing: null, false, 0 or what is empty.
        """
        for key, value in self.values.items():
            if key not in self.asked and value and not harmless(key):
                raise self.error(
                    f"found {self.prefix}{key} {shown(value)}, which is not known here and may change what "
                    f"the model computes; if it does not, remove it"
                )


def shown(value: Any) -> str:
    """A value in an error: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


_KINDS = {
    str: (lambda v: isinstance(v, str), "texts"),
    int: (lambda v: _is_whole(v) and abs(v) <= WHOLE, "whole numbers"),
    float: (lambda v: _is_number(v) and v > 0, "numbers above 0"),
}
