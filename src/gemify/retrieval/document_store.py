"""The store of chunks and their vectors: two LanceDB tables.

`chunks` has a row a chunk, with the version of its file (a hash of path, content and way of reading). `files` has a row
a file, which names the committed version. A chunk is live if its file's row names its version:

    add or change a file:  append its new chunks (any number of commits)  ->  write its row  ->  delete the old chunks
    remove a file:                                                            delete its row ->  delete its chunks

LanceDB applies a commit whole or not at all. So a file changes in the moment its row is committed, however many chunks
it has and whenever the process dies. Chunks of other versions are pending and hidden from every search. The next run
keeps those of the version it is about to write, in their order, and `optimize` deletes the rest.
The tables name what lies in the store's parent directory by its path from there, so that both may move together.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import timedelta
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np

from gemify.io.directory import is_remote, relative_to, resolve_uri
from gemify.io.vectors import normalize
from gemify.retrieval.lance import (
    IndexKind,
    connect,
    is_old_text_index,
    only_writer,
    open_table,
    query_form,
    readable,
    remove_prefix,
    sample_rows,
    sql_lists,
    table_names,
    text_index,
    text_query,
    to_matrix,
    vector_index,
    word_form,
)
from gemify.retrieval.metadata import (
    OWN_COLUMNS,
    Value,
    arrow_type,
    file_metadata,
    filtering,
    fits,
    new_columns,
    to_column,
)
from gemify.retrieval.store_meta import StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord, Hit

logger = logging.getLogger(__name__)

_CHUNKS, _FILES = "chunks", "files"
# Columns on the disk, and the fields of `Chunk` they hold.
_CHUNK_COLUMNS = {"text": "text", "title": "title", "heading": "heading", "place": "location", "words": "embed_text"}
_HIT_COLUMNS = ("version", "ordinal", "file", "text", "title", "heading", "place")
_INDEX_MIN_ROWS = 20_000  # up to here an exact scan takes under 30 ms of two cores
_PROBES = 24  # partitions of the vector index that a search looks into
_QUANTIZE_MIN_ROWS = 256
_RESCORED = {"int8": 100, "binary": 1000}  # candidates of a search, rescored with their full vectors
_MAX_UNINDEXED_SHARE = 0.2  # of the rows; with more outside, the vector index is trained anew
_MAX_SMALL_FRAGMENTS = 8  # with more, they are compacted
_MOVED_CHUNKS = 5_000  # copied in one commit, about
_KEPT_FOR = timedelta(minutes=10)  # old files stay on the disk, as a reader may have them open


class Store:
    """An open store. Every method raises ValueError, in one line, if the store is damaged."""

    def __init__(self, uri: str, database: Any, meta: StoreMeta) -> None:
        self.uri, self.meta = uri, meta
        self._root = "" if is_remote(uri) else str(Path(uri).parent)
        self._chunks, self._files = open_table(database, _CHUNKS, uri), open_table(database, _FILES, uri)
        self._pending: tuple[tuple[int, int], dict[str, int]] | None = None  # one value, as threads share it
        self._words_checked = False

    # Opening

    @classmethod
    def open(cls, uri: str | Path) -> Store:
        """Open a store.

        Args:
            uri: A directory, or a URI that LanceDB takes (``s3://bucket/path``).

        Raises:
            ValueError: There is no store, or it is damaged.
        """
        uri = resolve_uri(uri)
        if not is_remote(uri) and not Path(uri).is_dir():
            raise ValueError(f"no store at {uri}: make one with `gemify index`")
        database = connect(uri)
        if _FILES not in table_names(database, uri):
            raise ValueError(f"no store in {uri}: make one with `gemify index`")
        return cls(uri, database, StoreMeta.from_schema(open_table(database, _FILES, uri).schema, uri))

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Return whether there is a store at a URI, even a damaged one. A killed `create` made none."""
        uri = resolve_uri(uri)
        if not is_remote(uri) and not Path(uri).is_dir():
            return False
        database = connect(uri)
        tables = table_names(database, uri)
        if _FILES in tables:
            with contextlib.suppress(ValueError):
                open_table(database, _FILES, uri)
                return True
        with contextlib.suppress(ValueError):
            return _CHUNKS in tables and bool(open_table(database, _CHUNKS, uri).count_rows())
        return False

    @classmethod
    def create(cls, uri: str | Path, meta: StoreMeta) -> Store:
        """Make an empty store. The table of files, with ``meta`` in its schema, is written last and makes it one.

        Args:
            uri: A directory, or a URI that LanceDB takes.
            meta: Model and settings.

        Raises:
            ValueError: The URI is a file, or cannot be written to.
        """
        uri = resolve_uri(uri)
        if not is_remote(uri) and Path(uri).exists() and not Path(uri).is_dir():
            raise ValueError(f"cannot make a store at {uri}: it is a file, give a directory")
        database = connect(uri)
        import pyarrow as pa

        width = pa.float16() if meta.precision == "float16" else pa.float32()
        text = [pa.field(n, pa.string()) for n in ("version", "file", *_CHUNK_COLUMNS)]
        text += [pa.field(name, arrow_type(value)) for name, value in file_metadata("txt", 0.0).items()]
        chunks = [*text, pa.field("ordinal", pa.int32()), pa.field("vector", pa.list_(width, meta.dimension))]
        files = [pa.field(n, pa.string()) for n in ("path", "hash", "version")]
        files += [pa.field("size", pa.int64()), pa.field("mtime", pa.float64()), pa.field("chunks", pa.int64())]
        with readable(uri):
            table = database.create_table(_CHUNKS, schema=pa.schema(chunks), mode="overwrite")
            table.create_index("words", config=text_index())
            database.create_table(_FILES, schema=pa.schema(files, metadata=meta.to_schema()), mode="overwrite")
        return cls(uri, database, meta)

    @contextlib.contextmanager
    def write_lock(self) -> Iterator[None]:
        """Lock a local store against other writers. The user must give a remote one a single writer."""
        with only_writer(self.uri):
            with readable(self.uri):  # a store of an earlier version has absolute paths alone
                remove_prefix(self._files, "path", os.path.join(self._root, ""))
            yield

    def relative(self, path: str) -> str:
        """Return a file's path as the tables have it: from the store's parent, if it lies there."""
        return relative_to(path, self._root)

    # Writing

    def append(self, rows: Sequence[ChunkRow], vectors_ND: np.ndarray) -> list[tuple[str, str, Value]]:
        """Add chunks in one commit. They stay pending until `commit` names their version.

        Args:
            rows: Chunks; those of a version in their order.
            vectors_ND: Their vectors, [N, D].

        Returns:
            File, column and value of the metadata left out, as it is of another type than its column.
        """
        import pyarrow as pa

        if vectors_ND.shape != (len(rows), self.meta.dimension):
            raise ValueError(f"expected vectors [{len(rows)}, {self.meta.dimension}], got {list(vectors_ND.shape)}")
        kind = self._chunks.schema.field("vector").type
        flat = normalize(vectors_ND).astype(kind.value_type.to_pandas_dtype()).ravel()
        columns: dict[str, Any] = {
            "version": [r.version for r in rows],
            "file": [self.relative(r.file) for r in rows],
            "ordinal": pa.array([r.chunk.ordinal for r in rows], pa.int32()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), self.meta.dimension),
        }
        for column, name in _CHUNK_COLUMNS.items():
            columns[column] = [getattr(r.chunk, name) for r in rows]
        columns["words"] = [word_form(text) for text in columns["words"]]
        with readable(self.uri):
            if added := new_columns(self._chunks.schema.names, (r.chunk.meta for r in rows)):
                self._chunks.add_columns([pa.field(name, kind) for name, kind in added.items()])
            types = {f.name: f.type for f in self._chunks.schema if f.name not in OWN_COLUMNS}
            for name, kind in types.items():
                columns[name] = to_column([r.chunk.meta.get(name) for r in rows], kind)
            self._chunks.add(pa.table(columns).select(self._chunks.schema.names).cast(self._chunks.schema))
        known = [(r.file, name, value) for r in rows for name, value in r.chunk.meta.items()]
        return [item for item in known if not fits(item[2], types.get(item[1]))]

    def commit(self, records: Sequence[FileRecord]) -> None:
        """Make versions of files the committed ones, in one commit."""
        import pyarrow as pa

        if records:
            columns = {f.name: [getattr(r, f.name) for r in records] for f in fields(FileRecord)}
            columns["path"] = [self.relative(path) for path in columns["path"]]
            with readable(self.uri):
                merge = self._files.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(pa.table(columns).select(self._files.schema.names))

    def move(self, moves: Sequence[tuple[FileRecord, FileRecord]]) -> None:
        """Give files and their chunks new paths and versions, without embedding anything.

        The chunks are copied: interrupted, the new versions are pending, and whole.

        Args:
            moves: The old and the new record of each file.
        """
        import pyarrow as pa

        ends = accumulate(old.chunks for old, _ in moves)
        for _, group in groupby(zip(ends, moves, strict=True), lambda item: item[0] // _MOVED_CHUNKS):
            some = [move for _, move in group]
            new = {old.version: new for old, new in some}
            with readable(self.uri):
                for listed in sql_lists(new):
                    rows = self._chunks.search().where(f"version IN ({listed})").to_arrow()
                    given = [new[version] for version in rows["version"].to_pylist()]
                    named = {"version": [r.version for r in given], "file": [self.relative(r.path) for r in given]}
                    schema = self._chunks.schema
                    self._chunks.add(pa.table({n: named.get(n, rows[n]) for n in schema.names}, schema=schema))
            self.commit([new for _, new in some])
            self.remove(old.path for old, _ in some)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files. Their chunks become pending."""
        with readable(self.uri):
            for listed in sql_lists(map(self.relative, paths)):
                self._files.delete(f"path IN ({listed})")

    def optimize(self) -> None:
        """Delete pending chunks, bring the indexes up to date and compact the tables, where there is need."""
        with readable(self.uri):
            for listed in sql_lists(self.pending_versions()):
                self._chunks.delete(f"version IN ({listed})")
            train = self._needs_vector_index()
            if any(is_old_text_index(i) for i in self._chunks.list_indices()):
                self._chunks.create_index("words", config=text_index(), replace=True)
            unindexed = any(i.num_unindexed_rows for i in self._chunks.list_indices())
            if unindexed or self._chunks.stats()["fragment_stats"]["num_small_fragments"] > _MAX_SMALL_FRAGMENTS:
                self._chunks.optimize(cleanup_older_than=_KEPT_FOR)
                self._files.optimize(cleanup_older_than=_KEPT_FOR)
            if train:
                self._build_vector_index()

    def _needs_vector_index(self) -> bool:
        """Whether there are enough rows for a vector index, and too many of them are in none."""
        rows = self._chunks.count_rows()
        if rows < (_QUANTIZE_MIN_ROWS if self.meta.precision in _RESCORED else _INDEX_MIN_ROWS):
            return False
        known = [i for i in self._chunks.list_indices() if i.columns == ["vector"]]
        return not known or known[0].num_unindexed_rows > _MAX_UNINDEXED_SHARE * rows

    def _build_vector_index(self) -> None:
        rows, precision = self._chunks.count_rows(), self.meta.precision
        parts = 1 if rows < _INDEX_MIN_ROWS else round(rows**0.5 / 3)
        if precision == "int8":
            kind: IndexKind = "sq"
        elif precision == "binary" and self.meta.dimension % 8 == 0:
            kind = "rq"
        else:
            kind = "flat"
        self._chunks.create_index("vector", config=vector_index(kind, partitions=parts), replace=True)

    # Reading

    def read_meta(self) -> StoreMeta:
        """Return model and settings as of the last commit."""
        with readable(self.uri):
            return StoreMeta.from_schema(self._files.schema, self.uri)

    def __len__(self) -> int:
        """Return the number of live chunks."""
        return sum(r.chunks for r in self.files().values())

    def files(self) -> dict[str, FileRecord]:
        """Return the committed files by path."""
        with readable(self.uri):
            rows = self._files.to_arrow().to_pylist()
        found = (FileRecord(**row | {"path": os.path.join(self._root, row["path"])}) for row in rows)
        return {record.path: record for record in found}

    def pending_versions(self) -> dict[str, int]:
        """Return versions that are not committed (yet, or any more), with their numbers of chunks."""
        with readable(self.uri):
            now, known = self.version, self._pending
            if known is None or known[0] != now:
                committed = {r.version for r in self.files().values()}
                found: dict[str, int] = {}
                for batch in self._chunks.search().select(["version"]).to_batches(65_536):
                    for pair in batch.column("version").value_counts().to_pylist():
                        found[pair["values"]] = found.get(pair["values"], 0) + pair["counts"]
                known = self._pending = now, {v: n for v, n in found.items() if v not in committed}
            return known[1]

    def vectors(self, version: str) -> dict[tuple[str, str, str], np.ndarray]:
        """Return the vectors of a version's chunks by their texts, titles and headings."""
        (listed,) = sql_lists([version])
        with readable(self.uri):
            found = self._chunks.search().where(f"version = {listed}").select(["text", "title", "heading", "vector"])
            rows = found.to_arrow()
        keys = zip(*(rows[name].to_pylist() for name in ("text", "title", "heading")), strict=True)
        return dict(zip(keys, to_matrix(rows["vector"]), strict=True)) if len(rows) else {}

    def vector_search(self, vector_D: np.ndarray, k: int, where: str | None = None) -> list[Hit]:
        """Find the chunks nearest to a vector.

        Args:
            vector_D: The query's embedding, [D].
            k: How many chunks to find.
            where: A filter of metadata, in SQL. None: all.

        Returns:
            Hits, best first. The score is the cosine.

        Raises:
            ValueError: The vector has another dimension, or the filter is wrong.
        """
        if vector_D.shape != (self.meta.dimension,):
            raise ValueError(f"expected a vector of {self.meta.dimension} numbers, got {list(vector_D.shape)}")
        with readable(self.uri):
            query = self._chunks.search(normalize(vector_D[None])[0], vector_column_name="vector").distance_type("dot")
            if candidates := _RESCORED.get(self.meta.precision):
                query = query.refine_factor(max(candidates // 100, candidates // k))
            hits = self._hits(query.nprobes(_PROBES), k, "_distance", where)
            if where is None or len(hits) == k:
                return hits
            return self._hits(query.maximum_nprobes(0), k, "_distance", where)  # in all partitions, if need be

    def text_search(self, query: str, k: int, where: str | None = None) -> list[Hit]:
        """Find the chunks whose words match a query best.

        Args:
            query: The words to find.
            k: How many chunks to find.
            where: A filter of metadata, in SQL. None: all.

        Returns:
            Hits, best first. The score is BM25.

        Raises:
            ValueError: The filter is wrong.
        """
        with readable(self.uri):
            self._warn_old_words()
            search = self._chunks.search(text_query(query_form(query), ["words"]), query_type="fts")
            return self._hits(search, k, "_score", where)

    def _warn_old_words(self) -> None:
        if not self._words_checked and any(is_old_text_index(i) for i in self._chunks.list_indices()):
            logger.warning("the word index of %s is of an older version: run gemify index on its files again", self.uri)
        self._words_checked = True

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every live chunk as a row of the table, with its vector, in no order."""
        pending = self.pending_versions()
        with readable(self.uri):
            for batch in self._chunks.search().to_batches(4096):
                yield from (row for row in batch.to_pylist() if row["version"] not in pending)

    def hits(self) -> Iterator[Hit]:
        """Yield every live chunk as a search finds it, with score 0, in no order."""
        yield from (self._hit(row, 0.0) for row in self.rows())

    @property
    def version(self) -> tuple[int, int]:
        """What changes with every commit."""
        with readable(self.uri):
            return self._chunks.version, self._files.version

    def sample_vectors(self, limit: int) -> tuple[list[str], list[str], np.ndarray]:
        """Return ids, files and vectors, [N, D], of at most ``limit`` live chunks, evenly spread over the table."""
        pending = self.pending_versions()
        with readable(self.uri):
            rows = sample_rows(self._chunks, ["version", "ordinal", "file", "vector"], limit)
        rows = rows.filter(np.array([v not in pending for v in rows["version"].to_pylist()], dtype=bool))
        listed = rows.select(["version", "ordinal", "file"]).to_pylist()
        files = [os.path.join(self._root, row["file"]) for row in listed]
        return [f"{row['version']}-{row['ordinal']}" for row in listed], files, to_matrix(rows["vector"])

    def read(self, chunk_id: str, before: int = 0, after: int = 0) -> list[Hit]:
        """Return a live chunk and its neighbours in its file, in order, with score 0; nothing if there is none."""
        version, _, number = chunk_id.rpartition("-")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            return []
        (listed,), at = sql_lists([version]), int(number)
        with readable(self.uri):
            if not self._files.count_rows(f"version = {listed}"):
                return []
            query = self._chunks.search().where(
                f"version = {listed} AND ordinal >= {at - before} AND ordinal <= {at + after}"
            )
            rows = sorted(query.select(self._hit_columns).to_arrow().to_pylist(), key=lambda row: row["ordinal"])
        return [self._hit(row, 0.0) for row in rows] if any(row["ordinal"] == at for row in rows) else []

    @property
    def _hit_columns(self) -> list[str]:
        return [*_HIT_COLUMNS, *(name for name in self._chunks.schema.names if name not in OWN_COLUMNS)]

    def _hits(self, query: Any, k: int, score: str, where: str | None) -> list[Hit]:
        conditions = [f"version NOT IN ({listed})" for listed in sql_lists(self.pending_versions())]
        if where is not None:
            conditions.append(f"({where})")
        if conditions:
            query = query.where(" AND ".join(conditions), prefilter=True)
        with filtering(self._chunks, where):
            found = query.limit(k).select([*self._hit_columns, score]).to_arrow().to_pylist()
        hits = [self._hit(row, 1 - row[score] if score == "_distance" else row[score]) for row in found]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))  # equal scores in one order

    def _hit(self, row: dict[str, Any], score: float) -> Hit:
        said = {name: row[column] for column, name in _CHUNK_COLUMNS.items() if column in _HIT_COLUMNS}
        file = os.path.join(self._root, row["file"])
        meta = {n: v for n, v in row.items() if v is not None and n not in OWN_COLUMNS and not n.startswith("_")}
        return Hit(id=f"{row['version']}-{row['ordinal']}", file=file, score=score, meta=meta, **said)
