"""A shard's rows, read from its file alone: what comes before is not read again while shards are taken in their order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gemify.retrieval.bulk.plan import Shard, damaged_gzip, damaged_parquet, is_parquet, new_digest, opened
from gemify.retrieval.section import replace_surrogates
from gemify.retrieval.vector_table import CorpusMeta

_IDS = ("_id", "id")
_BATCH = 512  # rows of a Parquet file decoded at a time


@dataclass(frozen=True)
class Passage:
    """A row of a corpus."""

    id: str
    text: str
    title: str

    @property
    def embed_text(self) -> str:
        """What is embedded."""
        return f"{self.title}\n{self.text}" if self.title else self.text


class ShardReader:
    """Reads shards of the inputs of one corpus; it keeps the last file open."""

    def __init__(self, meta: CorpusMeta, *, skip_bad: bool = False) -> None:
        self.meta, self.skip_bad = meta, skip_bad
        self._file: _Lines | _Table | None = None

    def passages(self, shard: Shard, skipped: list[str]) -> list[Passage]:
        """The shard's passages. A row that is none raises ValueError, or is skipped and its reason noted."""
        found: list[Passage] = []
        for number, row in self._rows(shard):
            where = f"{shard.path} row {number + 1}"
            try:
                found.append(self._passage(row, shard.source_name or Path(shard.path).name, number))
            except ValueError as error:
                if not self.skip_bad:
                    raise ValueError(f"{where}: {error} (--skip-bad leaves such rows out)") from None
                skipped.append(f"{where}: {error}")
        return found

    def _rows(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        if self._file is None or self._file.path != shard.path:
            self.close()
            self._file = (_Table if is_parquet(shard.path) else _Lines)(shard.path, self.columns)
        return self._file.rows(shard)

    def close(self) -> None:
        """Let go of the file; the next shard opens it anew."""
        if self._file is not None:
            self._file.close()
        self._file = None

    @property
    def columns(self) -> list[str]:
        """Those that are read, that of the text first."""
        ids = _IDS if self.meta.id_column is None else (self.meta.id_column,)
        return list(dict.fromkeys((self.meta.text_column, self.meta.title_column, *ids)))

    def _passage(self, row: Any, file: str, number: int) -> Passage:
        if not isinstance(row, dict):
            row = _parsed(row)
        meta = self.meta
        if meta.text_column not in row:
            there = replace_surrogates(", ".join(sorted(row)))
            raise ValueError(f"no column {meta.text_column!r} (there are {there}): set --text-column")
        text, title = row[meta.text_column], row.get(meta.title_column)
        if not isinstance(text, str):
            raise ValueError(f"{meta.text_column!r} must be text, got {type(text).__name__}")
        title = replace_surrogates(title) if isinstance(title, str) else ""
        return Passage(self._id(row, file, number), replace_surrogates(text), title)

    def _id(self, row: dict[str, Any], file: str, number: int) -> str:
        wanted = _IDS if self.meta.id_column is None else (self.meta.id_column,)
        for column in wanted:
            value = row.get(column)
            if isinstance(value, str | int) and not isinstance(value, bool):
                return replace_surrogates(str(value))
        if self.meta.id_column is not None:
            raise ValueError(f"no text or whole number in column {self.meta.id_column!r}: set --id-column")
        return f"{file}:{number + 1}"


class _Lines:
    """A JSONL file, plain or compressed."""

    def __init__(self, path: str, columns: list[str]) -> None:
        self.path = path
        self._raw = Path(path).open("rb")  # noqa: SIM115 it stays open until close
        self._file: IO[bytes] = opened(self._raw, path)

    def rows(self, shard: Shard) -> Iterator[tuple[int, bytes]]:
        digest = new_digest()
        with damaged_gzip(self.path):
            self._file.seek(shard.offset)  # in a .gz file that goes on from where it is, or begins anew
            for number in range(shard.first, shard.first + shard.rows):
                line = self._file.readline()
                digest.update(line)
                if line.strip():
                    yield number, line
        if digest.hexdigest() != shard.digest:
            raise _changed(self.path)

    def close(self) -> None:
        self._file.close()
        self._raw.close()


class _Table:
    """A Parquet file, decoded from the row group on that the first shard begins in."""

    def __init__(self, path: str, columns: list[str]) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with damaged_parquet(path):
            self._file = pq.ParquetFile(path, pre_buffer=False)
        there = self._file.schema_arrow.names
        if columns[0] not in there:
            raise ValueError(f"{path}: no column {columns[0]!r} (there are {', '.join(there)}): set --text-column")
        self._columns = [c for c in columns if c in there]
        self._next = -1  # the row that comes next
        self._rest: Iterator[Any] = iter(())

    def rows(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        with damaged_parquet(self.path):
            begins = sum(self._file.metadata.row_group(g).num_rows for g in range(shard.offset))
            if not begins <= self._next <= shard.first:
                groups = range(shard.offset, self._file.num_row_groups)
                batches = self._file.iter_batches(_BATCH, row_groups=list(groups), columns=self._columns)
                self._next, self._rest = begins, (row for batch in batches for row in _decoded(batch))
            for row in self._rest:
                self._next += 1
                if self._next > shard.first:
                    yield self._next - 1, row
                if self._next == shard.first + shard.rows:
                    return
        raise _changed(self.path)

    def close(self) -> None:
        self._file.close()


def _changed(path: str) -> ValueError:
    return ValueError(f"{path} changed while it was read: put back what it was, or embed anew elsewhere")


def _decoded(batch: Any) -> Iterator[Any]:
    """Rows of an Arrow batch; where one of them is not UTF-8, each as a batch of its own."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        yield from (batch.slice(number, 1) for number in range(batch.num_rows))


def _parsed(line: Any) -> dict[str, Any]:
    """A line of JSON, or a batch of one row."""
    try:
        row: Any = json.loads(line) if isinstance(line, bytes) else line.to_pylist()[0]
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text: convert the file to UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON: give one JSON object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row
