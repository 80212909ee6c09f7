"""Where chunks and their vectors are kept: two LanceDB tables.

`chunks` has a row a chunk, stamped with the version of its file (a hash of path, content and way of reading). `files`
has a row a file, which names the version that counts. A chunk counts if its file's row names its version:

    add or change a file:  append its new chunks (any number of commits)  ->  write its row  ->  delete the old chunks
    remove a file:                                                            delete its row ->  delete its chunks

LanceDB makes each commit whole or not at all, so the row's commit is the moment at which a file changes, however many
chunks it has and whenever the process dies. Chunks that do not count are hidden from every search; the next run takes
up those of the version that it is about to write, in their order, and `finish` deletes the rest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gemify.io.directory import is_remote, resolve_uri
from gemify.io.vectors import normalize
from gemify.retrieval.chunking import Chunk, ChunkSettings
from gemify.retrieval.lance import (
    IndexKind,
    connect,
    only_writer,
    open_table,
    readable,
    sql_lists,
    table_names,
    text_index,
    text_query,
    vector_index,
)

Precision = Literal["float32", "float16", "int8", "binary"]
FORMAT_VERSION = 1
_META = b"gemify"
_CHUNKS, _FILES = "chunks", "files"
_CHUNK_COLUMNS = {"text": "text", "title": "title", "heading": "heading", "place": "location", "words": "embed_text"}
_HIT_COLUMNS = ("version", "ordinal", "file", "text", "title", "heading", "place")
_IVF_FROM = 20_000  # rows: up to here an exact scan takes under 30 ms of two cores
_PROBES = 24  # partitions of the vector index that a search looks into
_QUANTISE_FROM = 256
_RESCORED = {"int8": 100, "binary": 1000}  # candidates of a search, rescored with their full vectors
_STALE = 0.2  # share of rows outside the vector index from which it is trained anew
_FRAGMENTS = 8  # small ones, from which they are made one
_KEEP = timedelta(minutes=10)  # how long files that a reader may still have open stay on the disk


@dataclass(frozen=True)
class StoreMeta:
    """What a store says of itself."""

    model: str
    """By what name the model was loaded."""
    fingerprint: str
    dimension: int
    precision: Precision = "float32"
    """int8 and binary search quantised vectors and rescore the best with full ones."""
    chunk: ChunkSettings = field(default_factory=ChunkSettings)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"unknown precision {self.precision!r}: choose one of {', '.join(get_args(Precision))}")


@dataclass(frozen=True)
class FileRecord:
    """A file whose chunks are in the store."""

    path: str
    hash: str
    version: str
    size: int
    mtime: float
    chunks: int


@dataclass(frozen=True)
class ChunkRow:
    """A chunk of a version of a file."""

    file: str
    version: str
    chunk: Chunk


@dataclass(frozen=True)
class Hit:
    """A chunk that a search found; a higher score is better."""

    id: str
    file: str
    text: str
    title: str
    heading: str
    location: str
    score: float


class Store:
    """An open store. Every method raises ValueError, in one line, where the store is damaged."""

    def __init__(self, uri: str, database: Any, meta: StoreMeta) -> None:
        self.uri, self.meta = uri, meta
        self._chunks, self._files = open_table(database, _CHUNKS, uri), open_table(database, _FILES, uri)
        self._seen: tuple[int, int] | None = None
        self._hidden: dict[str, int] = {}

    # Opening

    @classmethod
    def open(cls, uri: str | Path) -> Store:
        """An existing store. Raises ValueError where there is none."""
        uri = resolve_uri(uri)
        if not is_remote(uri) and not Path(uri).is_dir():
            raise ValueError(f"no store at {uri}: make one with `gemify index`")
        database = connect(uri)
        if _FILES not in table_names(database, uri):
            raise ValueError(f"no store in {uri}: make one with `gemify index`")
        return cls(uri, database, _read_meta(open_table(database, _FILES, uri).schema.metadata, uri))

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Whether a store was made there, be it damaged. A creation that was killed made none."""
        uri = resolve_uri(uri)
        if not is_remote(uri) and not Path(uri).is_dir():
            return False
        database = connect(uri)
        tables = table_names(database, uri)
        if _FILES in tables:
            with contextlib.suppress(ValueError):
                open_table(database, _FILES, uri)
                return True
        if _CHUNKS not in tables:
            return False
        try:
            return bool(open_table(database, _CHUNKS, uri).count_rows())
        except ValueError:
            return False

    @classmethod
    def create(cls, uri: str | Path, meta: StoreMeta) -> Store:
        """A new, empty store. ``files``, with what the store says of itself, is written last and makes it one."""
        uri = resolve_uri(uri)
        if not is_remote(uri) and Path(uri).exists() and not Path(uri).is_dir():
            raise ValueError(f"cannot make a store at {uri}: it is a file, give a directory")
        database = connect(uri)
        import pyarrow as pa

        width = pa.float16() if meta.precision == "float16" else pa.float32()
        text = [pa.field(n, pa.string()) for n in ("version", "file", *_CHUNK_COLUMNS)]
        chunks = [*text, pa.field("ordinal", pa.int32()), pa.field("vector", pa.list_(width, meta.dimension))]
        files = [pa.field(n, pa.string()) for n in ("path", "hash", "version")]
        files += [pa.field("size", pa.int64()), pa.field("mtime", pa.float64()), pa.field("chunks", pa.int64())]
        described = {_META: json.dumps(asdict(meta)).encode()}
        with readable(uri):
            table = database.create_table(_CHUNKS, schema=pa.schema(chunks), mode="overwrite")
            table.create_index("words", config=text_index())
            database.create_table(_FILES, schema=pa.schema(files, metadata=described), mode="overwrite")
        return cls(uri, database, meta)

    def write_lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep other writers out (local stores; of a remote one the user must keep a single writer)."""
        return only_writer(self.uri)

    # Writing

    def append(self, rows: Sequence[ChunkRow], vectors_ND: np.ndarray) -> None:
        """Add chunks in one commit. They do not count until `record`; those of a version come in their order."""
        import pyarrow as pa

        if vectors_ND.shape != (len(rows), self.meta.dimension):
            raise ValueError(f"expected vectors [{len(rows)}, {self.meta.dimension}], got {list(vectors_ND.shape)}")
        kind = self._chunks.schema.field("vector").type
        flat = normalize(vectors_ND).astype(kind.value_type.to_pandas_dtype()).ravel()
        columns: dict[str, Any] = {
            "version": [r.version for r in rows],
            "file": [r.file for r in rows],
            "ordinal": pa.array([r.chunk.ordinal for r in rows], pa.int32()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), self.meta.dimension),
        }
        for column, name in _CHUNK_COLUMNS.items():
            columns[column] = [getattr(r.chunk, name) for r in rows]
        with readable(self.uri):
            self._chunks.add(pa.table(columns).select(self._chunks.schema.names).cast(self._chunks.schema))

    def commit(self, records: Sequence[FileRecord]) -> None:
        """Make these versions the ones that count, in one commit."""
        import pyarrow as pa

        if records:
            columns = {f.name: [getattr(r, f.name) for r in records] for f in fields(FileRecord)}
            with readable(self.uri):
                merge = self._files.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(pa.table(columns).select(self._files.schema.names))

    def remove(self, paths: Iterable[str]) -> None:
        """Let files not count any more."""
        with readable(self.uri):
            for listed in sql_lists(paths):
                self._files.delete(f"path IN ({listed})")

    def optimize(self) -> None:
        """Delete what does not count, bring the indexes up to date, compact. Does nothing where nothing is to do."""
        with readable(self.uri):
            for listed in sql_lists(self.pending_versions()):
                self._chunks.delete(f"version IN ({listed})")
            train = self._wants_training()
            unindexed = any(i.num_unindexed_rows for i in self._chunks.list_indices())
            if unindexed or self._chunks.stats()["fragment_stats"]["num_small_fragments"] > _FRAGMENTS:
                self._chunks.optimize(cleanup_older_than=_KEEP)
                self._files.optimize(cleanup_older_than=_KEEP)
            if train:
                self._index_vectors()

    def _wants_training(self) -> bool:
        """Whether there are rows enough for a vector index, and none that fits most of them."""
        rows = self._chunks.count_rows()
        if rows < (_QUANTISE_FROM if self.meta.precision in _RESCORED else _IVF_FROM):
            return False
        known = [i for i in self._chunks.list_indices() if i.columns == ["vector"]]
        return not known or known[0].num_unindexed_rows > _STALE * rows

    def _index_vectors(self) -> None:
        rows, precision = self._chunks.count_rows(), self.meta.precision
        parts = 1 if rows < _IVF_FROM else round(rows**0.5 / 3)
        if precision == "int8":
            kind: IndexKind = "sq"
        elif precision == "binary" and self.meta.dimension % 8 == 0:
            kind = "rq"
        else:
            kind = "flat"
        self._chunks.create_index("vector", config=vector_index(kind, partitions=parts), replace=True)

    # Reading

    def __len__(self) -> int:
        return sum(r.chunks for r in self.files().values())

    def files(self) -> dict[str, FileRecord]:
        """The files that count, by path."""
        with readable(self.uri):
            return {row["path"]: FileRecord(**row) for row in self._files.to_arrow().to_pylist()}

    def pending_versions(self) -> dict[str, int]:
        """Versions whose chunks do not count (yet, or any more), and how many chunks of each there are."""
        with readable(self.uri):
            now = (self._chunks.version, self._files.version)
            if now != self._seen:
                counted = {r.version for r in self.files().values()}
                found: dict[str, int] = {}
                for batch in self._chunks.search().select(["version"]).to_batches(65_536):
                    for pair in batch.column("version").value_counts().to_pylist():
                        found[pair["values"]] = found.get(pair["values"], 0) + pair["counts"]
                self._hidden = {v: n for v, n in found.items() if v not in counted}
                self._seen = now
            return self._hidden

    def vector_search(self, vector_D: np.ndarray, k: int) -> list[Hit]:
        """The chunks nearest to a vector; the score is the cosine."""
        if vector_D.shape != (self.meta.dimension,):
            raise ValueError(f"expected a vector of {self.meta.dimension} numbers, got {list(vector_D.shape)}")
        with readable(self.uri):
            query = self._chunks.search(normalize(vector_D[None])[0], vector_column_name="vector").distance_type("dot")
            if candidates := _RESCORED.get(self.meta.precision):
                query = query.refine_factor(max(candidates // 100, candidates // k))
            return self._hits(query.nprobes(_PROBES), k, "_distance")

    def text_search(self, words: str, k: int) -> list[Hit]:
        """The chunks that match words best; the score is BM25."""
        with readable(self.uri):
            return self._hits(self._chunks.search(text_query(words, ["words"]), query_type="fts"), k, "_score")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every chunk that counts, with its vector, in no order."""
        hidden = self.pending_versions()
        with readable(self.uri):
            for batch in self._chunks.search().to_batches(4096):
                yield from (row for row in batch.to_pylist() if row["version"] not in hidden)

    def hits(self) -> Iterator[Hit]:
        """The same, as a search finds them, with score 0."""
        for row in self.rows():
            yield _hit(row, 0.0)

    def _hits(self, query: Any, k: int, score: str) -> list[Hit]:
        if hidden := [f"version NOT IN ({listed})" for listed in sql_lists(self.pending_versions())]:
            query = query.where(" AND ".join(hidden), prefilter=True)
        found = query.limit(k).select([*_HIT_COLUMNS, score]).to_arrow().to_pylist()
        hits = [_hit(row, 1 - row[score] if score == "_distance" else row[score]) for row in found]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))  # equal scores in one order


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(
        id=f"{row['version']}-{row['ordinal']}",
        file=row["file"],
        text=row["text"],
        title=row["title"],
        heading=row["heading"],
        location=row["place"],
        score=score,
    )


def _read_meta(metadata: dict[bytes, bytes] | None, uri: str) -> StoreMeta:
    try:
        values = json.loads((metadata or {})[_META])
        version = values["format_version"]
        if version == FORMAT_VERSION:
            return StoreMeta(**{**values, "chunk": ChunkSettings(**values["chunk"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the store {uri} does not say how it was made: delete it and index again") from error
    raise ValueError(
        f"the store {uri} has format version {version}, this gemify reads {FORMAT_VERSION}: index again, elsewhere"
    )
