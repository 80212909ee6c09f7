"""Where training texts come from: files read as a stream (any size), or a Hugging Face data set."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gemify.io.errors import first_line

_PAIRS = (
    ("summary", "context", "summary"),
    ("soft_prompt", "prompt", "answer"),
    ("positive", "anchor", "positive"),  # sentence-transformers' names
)


@dataclass(frozen=True)
class Example:
    """One training text; with ``second`` a pair: the row of the given kind (summary, soft prompt), or two views (positive)."""

    text: str
    second: str | None = None
    kind: str = "text"


@dataclass(frozen=True)
class Source:
    """A stream of examples that can be read any number of times, always in the same order.

    ``name``: a .txt, .jsonl or .parquet file (.txt and .jsonl also .gz), or a Hugging Face data set: its name, or
    a directory laid out like one. JSONL and
    Parquet rows hold a text in ``text_column``, or a pair: context and summary, prompt and answer, or anchor and
    positive.
    """

    name: str
    text_column: str = "text"
    split: str = "train"
    keep_empty: bool = False
    """Whether a row without text is an example too (row i is then example i) or is skipped."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "no training data: give --data FILE (.txt, .jsonl, .parquet) or a Hugging Face data set name"
            )
        path = Path(self.name)
        looks_like_file = (
            path.suffix in (".txt", ".jsonl", ".json", ".parquet", ".gz", ".csv", ".tsv") or path.is_absolute()
        )
        if not path.exists() and (looks_like_file or self.name.count("/") > 1):
            raise ValueError(f"no such data file: {self.name}")
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{self.name} is empty: it holds no text to train on")

    def __iter__(self) -> Iterator[Example]:
        path = Path(self.name)
        if not path.is_file():
            return self._from_rows(self._hub())
        stem = path.name.removesuffix(".gz")
        if stem.endswith(".parquet"):
            return self._from_rows(self._parquet(path))
        if stem.endswith((".jsonl", ".json")):
            return self._from_rows(self._jsonl(path))
        return (Example(text) for _, text in self._lines(path) if text or self.keep_empty)

    def _lines(self, path: Path) -> Iterator[tuple[int, str]]:
        with _open(path) as file:
            try:
                for number, line in enumerate(file, start=1):
                    text = line.decode("utf-8")
                    if "\0" in text:
                        raise UnicodeDecodeError("utf-8", line, 0, 1, "NUL byte")
                    yield number, text.strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} line {number}: not UTF-8 text (a binary file?): give text, one row a line"
                ) from error
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is a damaged .gz file: {error}") from error

    def _jsonl(self, path: Path) -> Iterator[tuple[str, Any]]:
        for number, line in self._lines(path):
            if not line:
                continue
            try:
                yield f"{path} line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: not JSON: give one JSON object a line") from error

    def _parquet(self, path: Path) -> Iterator[tuple[str, Any]]:
        import pyarrow.parquet as pq
        from pyarrow.lib import ArrowException

        try:
            file = pq.ParquetFile(path)
            columns = set(file.schema_arrow.names)
            wanted = [c for c in (self.text_column, *(n for _, *names in _PAIRS for n in names)) if c in columns]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
        except ArrowException as error:
            raise ValueError(f"{path} is not readable as Parquet: {first_line(error)}") from error

    def _hub(self) -> Iterator[tuple[str, Any]]:
        from datasets import load_dataset

        try:
            rows: Iterable[Any] = load_dataset(self.name, split=self.split, streaming=True)
        except Exception as error:
            reason = first_line(error)
            raise ValueError(f"{self.name!r} is neither a file nor a data set that can be loaded: {reason}") from error
        return ((f"{self.name} row {n}", row) for n, row in enumerate(rows, start=1))

    def _from_rows(self, rows: Iterator[tuple[str, Any]]) -> Iterator[Example]:
        for where, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object with {self.text_column!r}, got {type(row).__name__}")
            if self.text_column in row:
                text = _text(row, self.text_column, where)
                if text.strip() or self.keep_empty:
                    yield Example(text)
                continue
            for kind, first, second in _PAIRS:
                if first in row and second in row:
                    yield Example(_text(row, first, where), _text(row, second, where), kind)
                    break
            else:
                raise ValueError(
                    f"{where}: no column {self.text_column!r} (there are {sorted(row)}): set --text-column"
                )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} must be text, got {type(value).__name__}")
    return value


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")
