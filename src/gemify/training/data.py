"""Where training texts come from: files read as a stream (any size), or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemify.io.errors import first_line
from gemify.io.rows import COMPRESSIONS, has_row_suffix, read_values, require_text

_PAIRS = (
    ("summary", "context", "summary"),
    ("soft_prompt", "prompt", "answer"),
    ("positive", "anchor", "positive"),  # sentence-transformers' names
)


@dataclass(frozen=True)
class Example:
    """One training text, or a pair of texts."""

    text: str
    second: str | None = None
    """The pair's other text: what to write of ``text`` (summary, soft_prompt), or another view of it (positive)."""
    kind: str = "text"


@dataclass(frozen=True)
class Source:
    """A stream of examples that can be read any number of times, always in the same order.

    Rows hold a text in ``text_column``, or a pair: context and summary, prompt and answer, or anchor and positive.
    """

    name: str
    """A file of rows (`gemify.io.rows`: text, JSON, CSV, TSV, Parquet), or a Hugging Face data set: its name, or a
    directory laid out like one."""
    text_column: str = "text"
    split: str = "train"
    """The part of a data set to read."""
    keep_empty: bool = False
    """Whether a row without text is an example too (row i is then example i) or is skipped."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "no training data: give --data FILE (.txt, .jsonl, .csv, .parquet) or a Hugging Face data set name"
            )
        path = Path(self.name)
        is_file_name = path.is_absolute() or self.name.count("/") > 1 or has_row_suffix(path)
        if not path.exists() and (is_file_name or path.suffix in COMPRESSIONS):
            raise ValueError(f"no such data file: {self.name}")
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{self.name} is empty: it holds no text to train on")

    def __iter__(self) -> Iterator[Example]:
        if not Path(self.name).is_file():
            rows = self._load_dataset()
        else:
            columns = [self.text_column, *(name for _, *names in _PAIRS for name in names)]
            rows = read_values(self.name, text_column=self.text_column, columns=columns)
        for where, row in rows:
            try:
                example = self._example(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if self.keep_empty or example.second is not None or example.text.strip():
                yield example

    def _load_dataset(self) -> Iterator[tuple[str, Any]]:
        from datasets import load_dataset

        try:
            rows: Iterable[Any] = load_dataset(self.name, split=self.split, streaming=True)
        except Exception as error:
            reason = first_line(error)
            raise ValueError(f"{self.name!r} is neither a file nor a data set that can be loaded: {reason}") from error
        return ((f"{self.name} row {n}", row) for n, row in enumerate(rows, start=1))

    def _example(self, row: dict[str, Any]) -> Example:
        if self.text_column not in row:
            for kind, first, second in _PAIRS:
                if first in row and second in row:
                    return Example(require_text(row, first), require_text(row, second), kind)
        return Example(require_text(row, self.text_column))
