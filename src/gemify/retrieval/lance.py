"""LanceDB: its connections, tables, indexes and errors. The only file that imports it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemify.io.directory import error_reason, is_disk_full, is_remote
from gemify.io.extras import describe_missing

IndexKind = Literal["flat", "sq", "pq", "rq"]
"""Vectors behind partitions: as they are, in 8 bits a number, as codes of their parts, in 1 bit a number."""

_TEXT_INDEX = {"base_tokenizer": "icu/split", "remove_stop_words": False}
"""Words of any script; "The Who" has two."""
_VOWEL_SIGNS = re.compile("[\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670]")
_ACCENTS = re.compile("[\u0300-\u036f\u00ad\u200c-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
"""Also what is not seen: soft hyphens, joiners, marks of direction."""
_ARABIC_ARTICLE = re.compile(r"\b\u0648?[\u0628\u0643\u0641]?\u0627\u0644(?=\w{3})")
_HANGUL = re.compile("[\uac00-\ud7a3]{2,}")
_PART = 500  # values of one SQL list


class StoreLockedError(ValueError):
    """Another process writes to the store."""


class StoreUnavailableError(ValueError):
    """A store that was there cannot be used: it is damaged or gone, or another model has made it again."""


def connect(uri: str) -> Any:
    """Return the database at a URI. Every read sees the last commit."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are for its developers
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(describe_missing(error), name=error.name) from error

    try:
        return lancedb.connect(uri, read_consistency_interval=timedelta(0))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{uri} cannot be opened ({error_reason(error)}): give a directory, or a URI that can be reached, such as s3://bucket/path"
        ) from error


def table_names(database: Any, uri: str) -> list[str]:
    """Return the names of a database's tables."""
    with readable(uri):
        return list(database.list_tables().tables)


def open_table(database: Any, name: str, uri: str) -> Any:
    """Open a table. Raises ValueError if it is lost or damaged."""
    try:
        with readable(uri):
            return database.open_table(name)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise StoreUnavailableError(
            f"the store {uri} has lost its {name}: restore it, or delete it and index again"
        ) from error


def vector_index(kind: IndexKind, *, partitions: int, distance: str = "dot") -> Any:
    """Return the configuration of an index of vectors."""
    from lancedb.index import IvfFlat, IvfPq, IvfRq, IvfSq

    made = {"flat": IvfFlat, "sq": IvfSq, "pq": IvfPq, "rq": IvfRq}[kind]
    return made(distance_type=distance, num_partitions=partitions)


def text_index() -> Any:
    """Return the configuration of a full-text index."""
    from lancedb.index import FTS

    return FTS(**_TEXT_INDEX)


def is_old_text_index(index: Any) -> bool:
    """Whether an index of words was made by an older version, with another idea of what a word is."""
    details = getattr(index, "index_details", None) or {}
    return index.index_type == "FTS" and any(details.get(name, value) != value for name, value in _TEXT_INDEX.items())


def word_form(text: str) -> str:
    """A text as its words are indexed: whichever way a keyboard or a file system writes them, they are found.

    Case, accents, widths, vowel signs and the Arabic article are folded. A Korean word, to whose noun particles are
    attached, is followed by its pairs of syllables and its first one.
    """
    return _HANGUL.sub(lambda match: " ".join([*_hangul_parts(match[0]), match[0][0]]), _fold(text))


def query_form(query: str) -> str:
    """The words of a query as `word_form` has indexed them, now or in an earlier version."""
    words = _HANGUL.sub(lambda match: " ".join(_hangul_parts(match[0])), _fold(query)).split()
    earlier = _VOWEL_SIGNS.sub("", unicodedata.normalize("NFKC", query)).split()
    return " ".join([*words, *(word for word in earlier if word.lower() not in words)])


def _fold(text: str) -> str:
    plain = _ACCENTS.sub("", _VOWEL_SIGNS.sub("", unicodedata.normalize("NFKD", text)))
    return _ARABIC_ARTICLE.sub("", unicodedata.normalize("NFC", plain).casefold())


def _hangul_parts(word: str) -> list[str]:
    return list(dict.fromkeys([word, *(word[at : at + 2] for at in range(len(word) - 1))]))


def word_forms(query: str) -> str:
    """A query with each word in all its Unicode forms, for an index of texts as they were written."""
    kinds: tuple[Literal["NFC", "NFD", "NFKC"], ...] = ("NFC", "NFD", "NFKC")
    return " ".join(
        form for word in query.split() for form in dict.fromkeys(unicodedata.normalize(k, word) for k in kinds)
    )


def text_query(query: str, columns: Sequence[str]) -> Any:
    """Return a search for words in columns that have a full-text index. The score is BM25."""
    from lancedb.query import MatchQuery, MultiMatchQuery

    return MatchQuery(query, columns[0]) if len(columns) == 1 else MultiMatchQuery(query, list(columns))


def sample_rows(table: Any, columns: Sequence[str], limit: int) -> Any:
    """Return columns of at most ``limit`` rows, evenly spread over a table, as an Arrow table."""
    rows = table.count_rows()
    if rows <= limit:
        return table.search().select(list(columns)).to_arrow()
    offsets = [number * rows // limit for number in range(limit)]
    return table.take_offsets(offsets).select(list(columns)).to_arrow()


def to_matrix(column: Any) -> np.ndarray:
    """Return an Arrow column of vectors as an array, float32 [N, D]."""
    width = column.type.list_size
    return np.asarray(column.combine_chunks().flatten(), dtype=np.float32).reshape(-1, width)


def sql_lists(values: Iterable[str]) -> Iterator[str]:
    """Yield texts as SQL lists of some hundred values each."""
    listed = ["'" + v.replace("'", "''") + "'" for v in values]
    for at in range(0, len(listed), _PART):
        yield ", ".join(listed[at : at + _PART])


def remove_prefix(table: Any, column: str, prefix: str) -> None:
    """Cut a prefix off the texts of a column that begin with it, in one commit."""
    for text in sql_lists([prefix] if prefix else []):
        if table.count_rows(f"starts_with({column}, {text})"):
            cut = {column: f"right({column}, character_length({column}) - {len(prefix)})"}
            table.update(where=f"starts_with({column}, {text})", values_sql=cut)


@contextlib.contextmanager
def readable(uri: str) -> Iterator[None]:
    """Turn LanceDB's errors into a StoreUnavailableError of one line, and a full disk into OSError."""
    try:
        yield
    except RuntimeError as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), uri) from error
        raise StoreUnavailableError(
            f"the store {uri} cannot be used ({error_reason(error)}): restore it, or delete it and index again"
        ) from error


@contextlib.contextmanager
def only_writer(uri: str) -> Iterator[None]:
    """Lock a local directory against other writers. The user must give a remote one a single writer."""
    if is_remote(uri):
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(Path(uri) / ".lock")  # the system lets go of it when the process dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreLockedError(f"{uri} is being written by another process: wait for it to end") from None
    try:
        yield
    finally:
        lock.release()
