"""Inputs -> shards: runs of rows that can be read, embedded and written one by one, each known by what it holds.

Inputs are read through once, in pieces, before anything is embedded: that counts their rows, finds where shards begin,
and makes of every shard's bytes a digest, by which a later run knows that the input is still the same.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from gemify.io.errors import first_line

_PIECE = 1 << 20
_JSON_KEYS = {"offset": "at", "source_name": "called"}
_KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


@dataclass(frozen=True)
class Shard:
    """A run of rows of one input."""

    number: int
    path: str
    first: int
    """Of the input's rows (of a JSONL file: lines), counted from 0."""
    rows: int
    offset: int
    """Byte where its first line begins, uncompressed. For a Parquet file: the row group that holds its first row."""
    digest: str
    source_name: str = ""
    """The input's name in the ids of rows without an id; it differs for files of the same name."""

    @property
    def name(self) -> str:
        return f"{self.number:07d}"

    def to_dict(self) -> dict[str, Any]:
        """Fields under their names in done markers."""
        return {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shard:
        """A shard from what `to_dict` gave."""
        return cls(
            **{name: values[key] for name in cls.__dataclass_fields__ if (key := _JSON_KEYS.get(name, name)) in values}
        )

    def to_json(self) -> str:
        """The shard as one JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """A shard from what `to_json` gave."""
        return cls.from_dict(json.loads(text))


def find_inputs(given: Sequence[str | Path]) -> list[Path]:
    """The files behind paths, in their order; those of a directory by name. Raises ValueError for what cannot be one."""
    found: list[Path] = []
    for one in given:
        if "://" in str(one):
            raise ValueError(f"inputs are files and directories, got {one}: mount the bucket, or copy it")
        path = Path(one).absolute()
        if path.is_dir():
            inner = sorted(p for p in path.rglob("*") if is_input(p) and p.is_file() and not p.name.startswith("."))
            if not inner:
                raise ValueError(f"no {', '.join(_KINDS)} file in {one}: give files of rows")
            found += inner
        elif not path.is_file():
            raise ValueError(f"no such file or directory: {one}")
        elif not is_input(path):
            raise ValueError(f"{one} is not of a known kind: give {', '.join(_KINDS)}")
        else:
            found.append(path)
    if not found:
        raise ValueError("no input given: give .parquet or .jsonl files of rows, or directories of them")
    if len(set(found)) < len(found):
        twice = next(p for p in found if found.count(p) > 1)
        raise ValueError(f"{twice} is given twice: name every input once")
    return found


def is_input(path: Path) -> bool:
    return path.name.lower().endswith(_KINDS)


def is_parquet(path: str | Path) -> bool:
    return str(path).lower().endswith(".parquet")


def plan(
    inputs: Sequence[Path], *, shard_rows: int, columns: Sequence[str], read: Callable[[int], Any] = lambda _: None
) -> Iterator[Shard]:
    """The shards of inputs, in order. ``columns``: of Parquet files those that make a digest; ``read`` is told bytes."""
    number = 0
    names: set[str] = set()
    for path in inputs:
        source_name = next(name for name in _names(path) if name not in names)
        names.add(source_name)
        parts = _parquet(path, shard_rows, columns, read) if is_parquet(path) else _lines(path, shard_rows, read)
        for first, rows, offset, digest in parts:
            yield Shard(number, str(path), first, rows, offset, digest, source_name)
            number += 1


def _names(path: Path) -> Iterator[str]:
    """A file's name, then with ever more of its directories, to the whole path."""
    for parts in range(1, len(path.parts) + 1):
        yield "/".join(path.parts[-parts:])


_Part = tuple[int, int, int, str]  # first row, rows, where, digest


def _lines(path: Path, shard_rows: int, read: Callable[[int], Any]) -> Iterator[_Part]:
    digest, first, rows, at, here, told, ended = new_digest(), 0, 0, 0, 0, 0, True
    with path.open("rb") as raw, damaged_gzip(path), opened(raw, path) as file:
        while piece := file.read(_PIECE):
            start = 0
            ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + 1
            for end in ends[shard_rows - rows - 1 :: shard_rows].tolist():
                digest.update(piece[start:end])
                yield first, shard_rows, at, digest.hexdigest()
                first, at, start, digest = first + shard_rows, here + end, end, new_digest()
            rows = (rows + len(ends)) % shard_rows
            digest.update(piece[start:])
            here, ended = here + len(piece), piece.endswith(b"\n")
            read(raw.tell() - told)
            told = raw.tell()
    if rows or not ended:
        yield first, rows + (not ended), at, digest.hexdigest()


def opened(raw: BinaryIO, path: str | Path) -> IO[bytes]:
    """The lines of a JSONL file, uncompressed."""
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if str(path).lower().endswith(".gz") else raw


@contextlib.contextmanager
def damaged_gzip(path: str | Path) -> Iterator[None]:
    """Say in one line that a file is damaged."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged .gz file ({error}): restore it") from error


@contextlib.contextmanager
def damaged_parquet(path: str | Path) -> Iterator[None]:
    """Say in one line that a file is damaged."""
    from pyarrow.lib import ArrowException

    try:
        yield
    except ArrowException as error:
        raise ValueError(f"{path} is not readable as Parquet: {first_line(error)}") from error


def _parquet(path: Path, shard_rows: int, columns: Sequence[str], read: Callable[[int], Any]) -> Iterator[_Part]:
    """Shards go over the ends of row groups; each has in its digest the groups that it touches."""
    import pyarrow.parquet as pq

    with damaged_parquet(path):
        footer = pq.read_metadata(path)
    first, rows, at, touched = 0, 0, 0, new_digest()
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        whole = _group_digest(path, group, columns)
        read(sum(group.column(c).total_compressed_size for c in range(group.num_columns)))
        left = group.num_rows
        while left:
            if not rows:
                at, touched = number, new_digest()
            taken = min(left, shard_rows - rows)
            touched.update(b"%d %d %s " % (group.num_rows - left, taken, whole))
            rows, left = rows + taken, left - taken
            if rows == shard_rows:
                yield first, rows, at, touched.hexdigest()
                first, rows = first + rows, 0
    if rows:
        yield first, rows, at, touched.hexdigest()


def _group_digest(path: Path, group: Any, columns: Sequence[str]) -> bytes:
    """Of the bytes of a row group's columns, as they lie in the file."""
    digest = new_digest()
    with path.open("rb") as file:
        for number in range(group.num_columns):
            column = group.column(number)
            if column.path_in_schema.split(".")[0] not in columns:
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
    """What a shard's bytes are known by."""
    return hashlib.blake2b(digest_size=16)
