"""Rows of files and data sets -> training examples: texts, or pairs with their negatives.

    text column                       a text; a list: a text each
    sentence1, sentence2, score       a pair and how alike its texts are, on any scale (sentence-transformers)
    anchor, positive                  a pair (sentence-transformers); also with negative, negative_1, negative_2, ...
    query, positive | pos             a pair; pos and neg may be lists (BGE, FlagEmbedding)
    query, positive_passages          passages of title and text, with negative_passages (Tevatron)
    context, summary                  what to write of a text
    prompt, answer                    likewise
    messages                          a conversation, as are conversations and prompt, completion
                                      (`gemify.training.conversations`)

A row with several positives is a pair each. ``id``, ``_id`` or ``query_id`` names a row: rows of one id are no
negatives of each other.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from gemify.io.rows import (
    COMPRESSIONS,
    find_column,
    has_column,
    has_row_suffix,
    on_one_line,
    parquet_columns,
    read_rows,
    replace_surrogates,
    require_text,
    row_format,
    row_id,
)
from gemify.io.tables import first_line
from gemify.training.conversations import Conversation, conversation_columns
from gemify.training.recipe import DataSource, Recipe

logger = logging.getLogger(__name__)

_PAIRS = (
    ("summary", "context", "summary"),
    ("soft_prompt", "prompt", "answer"),
    ("scored", "sentence1", "sentence2"),
    ("positive", "anchor", "positive"),
    ("positive", "query", "positive"),
    ("positive", "query", "pos"),
    ("positive", "query", "positive_passages"),
)
_NEGATIVES = re.compile(r"negatives?(_\d+)?|neg|negative_passages")
_SCORE = "score"
_IDS = ("id", "_id", "query_id")
_NOTES = frozenset([*_IDS, "task"])
"""Columns that are no texts and need no word: ids, and what `gemify pairs` says of its own."""


@dataclass(frozen=True)
class Example:
    """One training text, or a pair of texts."""

    text: str
    second: str | None = None
    """The pair's other text: what to write of ``text`` (summary, soft_prompt), or another view of it (positive)."""
    kind: str = "text"
    negatives: tuple[str, ...] = ()
    """Of a positive pair: what ``text`` is not to be near."""
    id: str | None = None
    """Rows of one id are no negatives of each other."""
    conversation: Conversation | None = None
    """What ``text`` and ``second`` are the first question and answer of."""
    score: float | None = None
    """How alike the texts of a scored pair are."""
    row: int = field(default=0, compare=False)
    """The row's number in its file."""


@dataclass
class Source:
    """A stream of examples that can be read any number of times, always in the same order."""

    name: str
    """A file of rows (`gemify.io.rows`: text, JSON, CSV, TSV, Parquet), or a Hugging Face data set: its name, or a
    directory laid out like one."""
    text_column: str = "text"
    split: str = "train"
    """The part of a data set to read."""
    keep_empty: bool = False
    """Whether a row without text is an example too (row i is then example i) or is skipped."""
    skip_bad: bool = False
    """Whether malformed rows are left out and counted."""
    rows: Iterable[Any] | None = None
    """Rows in memory in place of a file: texts, tuples of anchor and positive, lists of messages, or mappings."""
    skipped: int = field(default=0, init=False)
    """How many rows were left out so far, each counted once."""
    first_bad: str = field(default="", init=False)
    """The first of them, and why."""
    _bad: set[int] = field(default_factory=set, init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.rows is not None:
            if isinstance(self.rows, str) or iter(self.rows) is self.rows:
                kind = type(self.rows).__name__
                raise ValueError(f"{self.name} is read once an epoch, got {kind}: give a list or a datasets.Dataset")
            return
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
        for number, row in self._numbered_rows():
            try:
                values = row()
                self._warn_unused(values)
                examples = self._examples(values)
            except ValueError as error:
                self.skip(number, error)
                continue
            for example in examples:
                if example.conversation is not None:
                    example = replace(example, row=number)
                if self.keep_empty or example.second is not None or example.text.strip():
                    yield example

    def _numbered_rows(self) -> Iterator[tuple[int, Any]]:
        """Numbers of rows, each with a function that reads the row."""
        if self.rows is not None:
            return ((n, partial(_as_mapping, row, self.text_column)) for n, row in enumerate(self.rows, start=1))
        return self._read_file() if Path(self.name).is_file() else self._load_dataset()

    def _read_file(self) -> Iterator[tuple[int, Any]]:
        columns: list[str] = []
        if row_format(self.name) == "parquet":
            there = parquet_columns(self.name)
            self._warn_unused(there)
            columns = [self.text_column, *(name for name in there if name in self._used(there) or name in _IDS)]
        for row in read_rows(self.name, text_column=self.text_column, columns=columns):
            yield row.number, row.parse

    def _load_dataset(self) -> Iterator[tuple[int, Any]]:
        from datasets import load_dataset

        try:
            rows: Iterable[Any] = load_dataset(self.name, split=self.split, streaming=True)
        except Exception as error:
            reason = first_line(error)
            raise ValueError(f"{self.name!r} is neither a file nor a data set that can be loaded: {reason}") from error
        return ((number, lambda row=row: row) for number, row in enumerate(rows, start=1))

    def skip(self, number: int, error: ValueError) -> None:
        """Count a malformed row, or end with it. The file is read once an epoch: a row counts once."""
        where = f"{self.name} row {number}: {error}"
        if not self.skip_bad:
            raise ValueError(where) from error
        if number not in self._bad:
            self._bad.add(number)
            self.skipped += 1
            self.first_bad = self.first_bad or where

    def _used(self, names: Collection[str]) -> set[str]:
        """Which of a row's columns are read; none if it holds no text."""
        for text in (self.text_column, self.text_column.partition(".")[0]):
            if text in names:
                return {text}
        if found := conversation_columns(names):
            return found
        for kind, first, second in _PAIRS:
            if first in names and second in names:
                others = {name for name in names if _NEGATIVES.fullmatch(name)} if kind == "positive" else set()
                return {first, second, *others, *({_SCORE} if kind == "scored" else ())}
        return set()

    def _warn_unused(self, columns: Collection[str]) -> None:
        if self._warned or self.keep_empty:
            return
        self._warned, used = True, self._used(columns)
        if used and (unused := sorted({*columns} - used - _NOTES)):
            logger.warning(
                "%s: columns %s are not used (%s are)", self.name, on_one_line(unused), on_one_line(sorted(used))
            )

    def _examples(self, row: Mapping[str, Any]) -> list[Example]:
        name = row_id(row, _IDS)
        if not has_column(row, self.text_column):
            if not self.keep_empty and (conversation := Conversation.from_row(row)) is not None:
                first, second = conversation.pair
                kind = "text" if second is None else "positive"
                return [Example(first, second, kind, id=name, conversation=conversation)]
            for kind, first, second in _PAIRS:
                if first in row and second in row:
                    negatives = [
                        n for c in row if kind == "positive" and _NEGATIVES.fullmatch(c) for n in _texts(row, c)
                    ]
                    if kind == "scored":
                        texts = require_text(row, first), require_text(row, second)
                        return [Example(*texts, kind, id=name, score=_number(row, _SCORE))]
                    anchor, others = require_text(row, first), _texts(row, second)
                    if not others:
                        raise ValueError(f"{second!r} holds no text")
                    return [Example(anchor, other, kind, tuple(filter(str.strip, negatives)), name) for other in others]
        if isinstance(find_column(row, self.text_column), list) and not self.keep_empty:
            return [Example(text, id=name) for text in _texts(row, self.text_column)]
        return [Example(require_text(row, self.text_column), id=name)]


def _as_mapping(row: Any, text_column: str) -> Mapping[str, Any]:
    """A row in memory by its columns."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, str):
        return {text_column: row}
    if isinstance(row, list | tuple) and row and all(isinstance(item, Mapping) for item in row):
        return {"messages": list(row)}
    if isinstance(row, list | tuple) and len(row) > 1 and all(isinstance(item, str) for item in row):
        return {"anchor": row[0], "positive": row[1], "negative": list(row[2:])}
    raise ValueError(
        f"a row must be a text, a tuple of anchor, positive and negatives, a list of messages, or a mapping of columns,"
        f" got {type(row).__name__}"
    )


def open_sources(recipe: Recipe) -> list[tuple[Source, DataSource]]:
    """The data of a recipe, each with its weight."""
    return [(Source(d.path, recipe.text_column, recipe.split, skip_bad=recipe.skip_bad), d) for d in recipe.sources]


def _number(row: Mapping[str, Any], column: str) -> float:
    """The number in a column, as a number or as text."""
    value = find_column(row, column)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column!r} must hold a number, got {value!r}")
    return number


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    """The texts in a column that holds one, a list of them, or a list of passages; none in an empty one."""
    value = find_column(row, column)
    values = value if isinstance(value, list) else [value]
    return [_passage(item, column) for item in values if item is not None]  # lists are filled up with nothing


def _passage(value: Any, column: str) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        title = value.get("title")
        value = f"{title} {value['text']}" if isinstance(title, str) and title else value["text"]
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must hold text, got {type(value).__name__}")
    return replace_surrogates(value)
