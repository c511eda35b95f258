"""How large a result of a chat template's filters and methods can be, known before it is made."""

import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any

LARGEST = 10**7  # characters of a text, items of a list
_WIDE = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "to_bytes", "tojson", "zfill")
_SLOW = (
    "pprint",
    "striptags",
    "title",
    "truncate",
    "urlize",
    "wordcount",
    "wordwrap",
)  # a character takes long
_FORMAT = ("format", "format_map", "%")


def weight(value: Any) -> int:
    """Characters of a value as text, about; counted up to a little more than `LARGEST`."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple | set | frozenset):
        return value.bit_length() // 3 + 1 if isinstance(value, int) else 1
    total = 2
    for item in value:
        total += weight(item) + 2
        if total > LARGEST:
            break
    return total


def made(name: str, value: Any, given: Iterable[Any]) -> int:
    """At most so many characters come of a filter, a method or `%`.

    Args:
      name: of it.
      value: what it is applied to.
      given: its arguments.
    """
    text = value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""
    given = list(given)
    if name == "format" and isinstance(value, str) and "%" in text:
        name = "%"  # as the filter of that name
    places = {
        "expandtabs": text.count("\t"),
        "indent": text.count("\n") + 1,
        "join": len(given[0]) if given and isinstance(given[0], Sized) else 1,
        "replace": len(text) + 1 if not given or not given[0] else text.count(str(given[0])),
        "translate": len(text),
        "wordwrap": len(text) // 8,
        "%": text.count("%"),
    }.get(name, text.count("{") if name in _FORMAT else 1)
    if name == "join" and not isinstance(value, str | bytes):  # the filter
        places = len(value) if isinstance(value, Sized) else 1
    if name == "tojson":
        places = weight(value)
    widths = [x for x in given if isinstance(x, int)] if name in _WIDE or "*" in text or "{" in text else []
    if name in _FORMAT:
        widths += [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    each = max([8, *widths, sum(weight(x) for x in given)])
    return weight(value) * (20 if name in _SLOW else 1) + places * each
