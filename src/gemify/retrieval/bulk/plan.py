"""Inputs divided into shards: runs of rows that are read, embedded and written one by one.

A plan reads the inputs through once, in pieces, before anything is embedded. It counts rows, finds where shards begin,
and makes a digest of each shard's bytes, by which a later run knows that the input is still the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemify.io.rows import (
    ROW_SUFFIXES,
    decompress,
    detect_format,
    has_row_suffix,
    read_rows,
    readable,
    readable_parquet,
)

_PIECE = 1 << 20
_JSON_KEYS = {"offset": "at", "source_name": "called"}
LINE_FORMATS = ("jsonl", "text")
"""Formats with a row a line: a shard is a run of bytes."""
_DIRECTORY_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv")  # .json and .txt are named: they may be notes


@dataclass(frozen=True)
class Shard:
    """A run of rows of one input."""

    number: int
    path: str
    first: int
    """Its first row in the input, counted from 0. In JSON lines and text, blank lines count."""
    rows: int
    offset: int
    """Byte where its first line begins, uncompressed. For a Parquet file: the row group that holds its first row."""
    digest: str
    source_name: str = ""
    """The input's name in the ids of rows without an id; it differs for files of the same name."""

    @property
    def name(self) -> str:
        """The shard's number in the names of its files."""
        return f"{self.number:07d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under their names in done markers."""
        return {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shard:
        """Read what `to_dict` gave."""
        return cls(
            **{name: values[key] for name in cls.__dataclass_fields__ if (key := _JSON_KEYS.get(name, name)) in values}
        )

    def to_json(self) -> str:
        """Return the shard as one JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """Read what `to_json` gave."""
        return cls.from_dict(json.loads(text))


def find_inputs(given: Sequence[str | Path]) -> list[Path]:
    """Find the files of rows behind paths.

    Args:
        given: Files of rows, and directories, of which all files but .json and .txt are taken, by name.

    Returns:
        Absolute paths, in the order given.

    Raises:
        ValueError: A path that does not exist, is given twice, or holds no rows.
    """
    found = [path for one in given for path in _files_of(one)]
    if not found:
        raise ValueError("no input given: give .parquet or .jsonl files of rows, or directories of them")
    if len(set(found)) < len(found):
        twice = next(p for p in found if found.count(p) > 1)
        raise ValueError(f"{twice} is given twice: name every input once")
    return found


def _files_of(one: str | Path) -> list[Path]:
    if "://" in str(one):
        raise ValueError(f"inputs are files and directories, got {one}: mount the bucket, or copy it")
    path = Path(one).absolute()
    if path.is_dir():
        inner = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not (found := sorted(p for p in inner if has_row_suffix(p, _DIRECTORY_SUFFIXES))):
            raise ValueError(f"no {', '.join(_DIRECTORY_SUFFIXES)} file in {one}: give files of rows")
        return found
    if not path.is_file():
        raise ValueError(f"no such file or directory: {one}")
    if not has_row_suffix(path):
        raise ValueError(f"{one} is not of a known kind: give {', '.join(ROW_SUFFIXES)}")
    return [path]


def plan(
    inputs: Sequence[Path],
    *,
    shard_rows: int,
    columns: Sequence[str],
    on_bytes: Callable[[int], Any] = lambda _: None,
) -> Iterator[Shard]:
    """Divide inputs into shards.

    Args:
        inputs: Files of rows, in the order of the corpus.
        shard_rows: Rows of a shard. The last one of a file may have fewer.
        columns: The columns of Parquet files that make a shard's digest.
        on_bytes: A function called with the number of bytes read since its last call.

    Yields:
        Shards, in the order of the inputs.

    Raises:
        ValueError: An input is damaged.
    """
    number = 0
    names: set[str] = set()
    for path in inputs:
        source_name = next(name for name in _names(path) if name not in names)
        names.add(source_name)
        for first, rows, offset, digest in _parts(path, shard_rows, columns, on_bytes):
            yield Shard(number, str(path), first, rows, offset, digest, source_name)
            number += 1


def _parts(path: Path, shard_rows: int, columns: Sequence[str], on_bytes: Callable[[int], Any]) -> Iterator[_Part]:
    kind = detect_format(path)
    if kind == "parquet":
        return _parquet(path, shard_rows, columns, on_bytes)
    if kind in LINE_FORMATS:
        return _lines(path, shard_rows, on_bytes)
    return _records(path, shard_rows, on_bytes)


def _names(path: Path) -> Iterator[str]:
    """A file's name, then with ever more of its directories, to the whole path."""
    for parts in range(1, len(path.parts) + 1):
        yield "/".join(path.parts[-parts:])


_Part = tuple[int, int, int, str]  # first row, rows, offset, digest


def _lines(path: Path, shard_rows: int, on_bytes: Callable[[int], Any]) -> Iterator[_Part]:
    digest, first, rows, offset, position, reported, ended = new_digest(), 0, 0, 0, 0, 0, True
    with path.open("rb") as raw, readable(path):
        file = decompress(raw, path)
        while piece := file.read(_PIECE):
            start = 0
            ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + 1
            for end in ends[shard_rows - rows - 1 :: shard_rows].tolist():
                digest.update(piece[start:end])
                yield first, shard_rows, offset, digest.hexdigest()
                first, offset, start, digest = first + shard_rows, position + end, end, new_digest()
            rows = (rows + len(ends)) % shard_rows
            digest.update(piece[start:])
            position, ended = position + len(piece), piece.endswith(b"\n")
            on_bytes(raw.tell() - reported)
            reported = raw.tell()
    if rows or not ended:
        yield first, rows + (not ended), offset, digest.hexdigest()


def _records(path: Path, shard_rows: int, on_bytes: Callable[[int], Any]) -> Iterator[_Part]:
    """Shards of records that are not lines (CSV, JSON arrays): the digest is of each record's bytes."""
    digest, rows, first = new_digest(), 0, 0
    for row in read_rows(path, on_progress=on_bytes):
        digest.update(row.raw)
        rows += 1
        if rows == shard_rows:
            yield first, rows, 0, digest.hexdigest()
            digest, rows, first = new_digest(), 0, first + rows
    if rows:
        yield first, rows, 0, digest.hexdigest()


def _parquet(path: Path, shard_rows: int, columns: Sequence[str], on_bytes: Callable[[int], Any]) -> Iterator[_Part]:
    """Shards go over the ends of row groups; each has in its digest the groups that it touches."""
    import pyarrow.parquet as pq

    with readable_parquet(path):
        footer = pq.read_metadata(path)
    first, rows, offset, touched = 0, 0, 0, new_digest()
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        whole = _group_digest(path, group, columns)
        on_bytes(sum(group.column(c).total_compressed_size for c in range(group.num_columns)))
        left = group.num_rows
        while left:
            if not rows:
                offset, touched = number, new_digest()
            taken = min(left, shard_rows - rows)
            touched.update(b"%d %d %s " % (group.num_rows - left, taken, whole))
            rows, left = rows + taken, left - taken
            if rows == shard_rows:
                yield first, rows, offset, touched.hexdigest()
                first, rows = first + rows, 0
    if rows:
        yield first, rows, offset, touched.hexdigest()


def _group_digest(path: Path, group: Any, columns: Sequence[str]) -> bytes:
    """Of the bytes of a row group's columns, as they lie in the file."""
    digest = new_digest()
    read = {name for column in columns for name in (column, column.partition(".")[0])}
    with path.open("rb") as file:
        for number in range(group.num_columns):
            column = group.column(number)
            if column.path_in_schema.split(".")[0] not in read:
                continue
            digest.update(column.path_in_schema.encode())
            begin = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
            file.seek(begin)
            left = column.total_compressed_size
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest().encode()


def new_digest() -> Any:
    """Return the hash that a shard's digest is made with."""
    return hashlib.blake2b(digest_size=16)
