"""A section of a file's text, which knows the line, page or row of each character."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Section:
    """A run of text under one heading."""

    text: str
    title: str = ""
    """The document's title, if it has one."""
    headings: tuple[str, ...] = ()
    """The headings above the text, the outermost first."""
    unit: Literal["", "line", "page", "row"] = ""
    """The unit of locations in this file. A .docx file has none."""
    first: int = 1
    """The line or page on which the text begins."""
    starts: tuple[int, ...] = ()
    """For pages: the offset at which each begins."""
    name: str = ""
    """For rows: the row's id, or its number."""

    def location(self, start: int, end: int) -> str:
        """Return where a run of characters stands, such as ``lines 3-9``, ``page 2`` or ``row q17``.

        Args:
            start: Offset of the first character.
            end: Offset behind the last one.
        """
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
    """A file, directory or row that was not read, and why."""

    path: str
    reason: str
