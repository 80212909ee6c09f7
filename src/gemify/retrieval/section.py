"""What reading yields: a section of text that knows where in its file each character stands."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Section:
    """A run of text under one heading."""

    text: str
    title: str = ""
    """Of the whole document, where it has one."""
    headings: tuple[str, ...] = ()
    """From the outermost to the one right above."""
    unit: Literal["", "line", "page", "row"] = ""
    """What a place in this file is called; a .docx file has none."""
    first: int = 1
    """The line or page that the text begins on."""
    starts: tuple[int, ...] = ()
    """For pages: the offset at which each begins. Lines are counted."""
    name: str = ""
    """For rows: the row's own id, or its number."""

    def location(self, start: int, end: int) -> str:
        """Where the characters from ``start`` to ``end`` stand, in words: ``lines 3-9``, ``page 2``, ``row q17``."""
        if self.unit == "row":
            return f"row {self.name}"
        if not self.unit:
            return ""
        first, last = self._number(start), self._number(max(start, end - 1))
        return f"{self.unit} {first}" if first == last else f"{self.unit}s {first}-{last}"

    def _number(self, offset: int) -> int:
        if self.unit == "page":
            return self.first + max(0, bisect_right(self.starts, offset) - 1)
        return self.first + self.text.count("\n", 0, offset)


@dataclass(frozen=True)
class Skipped:
    """Something that was not read, and why."""

    path: str
    reason: str
