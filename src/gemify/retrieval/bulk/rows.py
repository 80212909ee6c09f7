"""A shard's rows, read from its file alone. Shards taken in their order are read without going back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemify.io.rows import (
    PARQUET_BATCH_ROWS,
    Row,
    decompress,
    detect_format,
    known_columns,
    line_row,
    missing_column,
    optional_text,
    parquet_batch_rows,
    read_rows,
    readable,
    readable_parquet,
    require_text,
    row_format,
    row_id,
)
from gemify.retrieval.bulk.plan import LINE_FORMATS, Shard, new_digest
from gemify.retrieval.vector_table import CorpusMeta

_SKIPPED_BYTES = 1 << 20  # read at a time, to reach a byte of a compressed file


@dataclass(frozen=True)
class Passage:
    """A row of a corpus."""

    id: str
    text: str
    title: str

    @property
    def embed_text(self) -> str:
        """The text to embed: with the title before it, if there is one."""
        return f"{self.title}\n{self.text}" if self.title else self.text


class ShardReader:
    """Reads shards of the inputs of one corpus. It keeps the last file open."""

    def __init__(self, meta: CorpusMeta, *, skip_bad: bool = False) -> None:
        self.meta, self.skip_bad = meta, skip_bad
        self._file: _Lines | _Records | _Table | None = None

    def passages(self, shard: Shard, skipped: list[str]) -> list[Passage]:
        """Read a shard's passages.

        Args:
            shard: A shard of the corpus' inputs.
            skipped: Where to note malformed rows, if they are skipped.

        Raises:
            ValueError: A malformed row, unless such rows are skipped, or a file that changed since it was planned.
        """
        found: list[Passage] = []
        for row in self._rows(shard):
            where = f"{shard.path} row {row.number}"
            try:
                found.append(self._passage(row.parse(), shard.source_name or Path(shard.path).name, row.number))
            except ValueError as error:
                if not self.skip_bad:
                    raise ValueError(f"{where}: {error} (--skip-bad leaves such rows out)") from None
                skipped.append(f"{where}: {error}")
        return found

    def _rows(self, shard: Shard) -> Iterator[Row]:
        if self._file is None or self._file.path != shard.path:
            self.close()
            self._file = _open(shard.path, self.columns)
        return self._file.rows(shard)

    def close(self) -> None:
        """Close the file. The next shard opens it anew."""
        if self._file is not None:
            self._file.close()
        self._file = None

    @property
    def columns(self) -> list[str]:
        """The columns to read, that of the text first."""
        return list(dict.fromkeys((self.meta.text_column, self.meta.title_column, *self._id_columns)))

    @property
    def _id_columns(self) -> tuple[str, ...]:
        return ("_id", "id") if self.meta.id_column is None else (self.meta.id_column,)

    def _passage(self, row: dict[str, Any], file: str, number: int) -> Passage:
        text, title = require_text(row, self.meta.text_column), optional_text(row, self.meta.title_column)
        name = row_id(row, self._id_columns)
        if name is None and self.meta.id_column is not None:
            raise ValueError(f"no text or whole number in column {self.meta.id_column!r}: set --id-column")
        return Passage(name or f"{file}:{number}", text, title)


def _open(path: str, columns: list[str]) -> _Lines | _Records | _Table:
    kind = detect_format(path)
    if kind == "parquet":
        return _Table(path, columns)
    return _Lines(path, columns[0]) if kind in LINE_FORMATS else _Records(path)


class _Lines:
    """A file with a row a line, plain or compressed."""

    def __init__(self, path: str, text_column: str) -> None:
        self.path = path
        self._text_column, self._format = text_column, row_format(path)
        self._open()

    def _open(self) -> None:
        self._raw = Path(self.path).open("rb")  # noqa: SIM115 it stays open until close
        self._file, self._position = decompress(self._raw, self.path), 0

    def rows(self, shard: Shard) -> Iterator[Row]:
        digest = new_digest()
        with readable(self.path):
            self._seek(shard.offset)
            for number in range(shard.first + 1, shard.first + shard.rows + 1):
                line = self._file.readline()
                self._position += len(line)
                digest.update(line)
                row = line_row(number, line, self.path, self._text_column, self._format)
                if row is not None:
                    yield row
        if digest.hexdigest() != shard.digest:
            raise _changed(self.path)

    def _seek(self, offset: int) -> None:
        """Go to a byte of the text; in a compressed file by reading on, or anew from the beginning."""
        if self._file is self._raw:
            self._file.seek(offset)
        elif offset < self._position:
            self.close()
            self._open()
        while self._file is not self._raw and self._position < offset:
            skipped = self._file.read(min(offset - self._position, _SKIPPED_BYTES))
            if not skipped:
                return
            self._position += len(skipped)

    def close(self) -> None:
        self._file.close()
        self._raw.close()


class _Records:
    """A file whose records are no lines (CSV, a JSON array), read from its beginning."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._next, self._rest = 0, read_rows(path)

    def rows(self, shard: Shard) -> Iterator[Row]:
        if self._next > shard.first:
            self._next, self._rest = 0, read_rows(self.path)
        digest = new_digest()
        for row in itertools.islice(self._rest, shard.first + shard.rows - self._next):
            self._next += 1
            if self._next > shard.first:
                digest.update(row.raw)
                yield row
        if digest.hexdigest() != shard.digest:
            raise _changed(self.path)

    def close(self) -> None:
        self._next, self._rest = 0, read_rows(self.path)


class _Table:
    """A Parquet file, decoded from the row group on that the first shard begins in."""

    def __init__(self, path: str, columns: list[str]) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with readable_parquet(path):
            self._file = pq.ParquetFile(path, pre_buffer=False)
        there = self._file.schema_arrow.names
        if not known_columns(there, columns[:1]):
            raise ValueError(f"{path}: {missing_column(columns[0], there)}: set --text-column")
        self._columns = known_columns(there, columns)
        self._next = -1  # the row that comes next
        self._rest: Iterator[Row] = iter(())

    def rows(self, shard: Shard) -> Iterator[Row]:
        with readable_parquet(self.path):
            begins = sum(self._file.metadata.row_group(g).num_rows for g in range(shard.offset))
            if not begins <= self._next <= shard.first:
                groups = range(shard.offset, self._file.num_row_groups)
                batches = self._file.iter_batches(PARQUET_BATCH_ROWS, row_groups=list(groups), columns=self._columns)
                self._next, self._rest = begins, (row for batch in batches for row in parquet_batch_rows(batch))
            for row in self._rest:
                self._next += 1
                if self._next > shard.first:
                    yield row._replace(number=self._next)
                if self._next == shard.first + shard.rows:
                    return
        raise _changed(self.path)

    def close(self) -> None:
        self._file.close()


def _changed(path: str) -> ValueError:
    return ValueError(f"{path} changed while it was read: put back what it was, or embed anew elsewhere")
