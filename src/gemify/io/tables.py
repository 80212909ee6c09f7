"""Text for people: Markdown tables and their cells, errors as one line, sizes in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

MISSING = "\N{EN DASH}"
"""Stands in a cell for a number that was not measured."""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: bool = False) -> str:
    """A table in GitHub's Markdown, without a newline at the end.

    Args:
        header: Names of the columns.
        rows: Cells of each row, as many as there are columns. They may hold Markdown: only newlines and bare pipes are
            replaced, see `escape_markdown` for text from data or users.
        numeric: Align every column but the first to the right.

    Raises:
        ValueError: A row has more or fewer cells than the header.
    """
    lines = [_row(header), "|---" + ("|--:" if numeric else "|---") * (len(header) - 1) + "|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a table of {len(header)} columns got a row of {len(row)} cells: {list(row)}")
        lines.append(_row(row))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in cells) + " |"


def escape_markdown(text: str) -> str:
    """Text as Markdown that shows it literally, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def format_number(value: object, spec: str = ".2f") -> str:
    """A value as a cell: a number by its format spec, None as `MISSING`, anything else as ``str`` has it."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format(value, spec) if math.isfinite(value) else "not finite"


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text.

    Args:
        error: An exception, or a message.

    Returns:
        The first line without surrounding white space; the exception's type name if it has no text.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def parse_bytes(text: str | None) -> int | None:
    """Bytes of a size such as 500MB. ValueError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"a size must be a number of bytes such as 500MB or 2GB, got {text!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
