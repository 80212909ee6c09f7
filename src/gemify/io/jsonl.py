"""Rows of local evaluation data: gzipped or plain JSON lines, read with the line number in every complaint."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_rows(path: Path, columns: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Objects of a .jsonl or .jsonl.gz file, each with the given columns of the given types.

    Raises ValueError in one line: no such file, not text, or which line lacks what.
    """
    rows = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: mend or remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with {', '.join(columns)}, got a {type(row).__name__}")
        for name, kind in columns.items():
            if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
                got = type(row[name]).__name__ if name in row else "nothing"
                wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise ValueError(f"{where}: {name!r} must be {wanted}, got {got}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows


def read_lines(path: Path) -> list[str]:
    """Texts of a .txt or .txt.gz file, a text a line, empty ones left out."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file with their numbers, empty ones left out."""
    return [(number, line.strip()) for number, line in _lines(path) if line.strip()]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise ValueError(f"no such data file: {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not readable as text: {error}") from error
