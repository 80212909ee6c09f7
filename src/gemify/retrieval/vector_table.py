"""A corpus that `gemify embed-corpus` wrote: its files in a directory or object store, and its table for search.

    gemify-corpus.json     the manifest: `CorpusMeta`, written first
    done/0000003.json      a shard's done marker: its rows, and the parts it wrote
    corpus.lance/          the Lance table: a row a passage; `CorpusMeta` and the name of the last commit in its schema
    part-0000003.parquet   with format parquet, a file a shard in place of the table

A row has `id`, `vector` and, where texts are kept, `title` and `text`. Vectors have one of four precisions:

    float32, float16   length 1; searched by dot product, which is the cosine
    binary             the signs, 8 in a byte; searched by Hamming distance, the best rescored with the query's numbers
    int8               for other engines: LanceDB does not search it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gemify.io.directory import Directory, is_remote, resolve_uri
from gemify.io.vectors import normalize
from gemify.retrieval.document_store import Store
from gemify.retrieval.lance import (
    IndexKind,
    connect,
    is_old_text_index,
    open_table,
    readable,
    sample_rows,
    sql_lists,
    table_names,
    text_index,
    text_query,
    to_matrix,
    vector_index,
    word_forms,
)
from gemify.retrieval.metadata import filtering
from gemify.retrieval.store_meta import Precision
from gemify.retrieval.store_rows import Hit

Format = Literal["lance", "parquet"]
FORMAT_VERSION = 1
MANIFEST = "gemify-corpus.json"
MARKERS = "done"
TABLE = "corpus"
COMMIT_KEY = b"parts"
"""Key of the last commit's name in the schema of the table."""
_META_KEY = b"gemify"


@dataclass(frozen=True)
class CorpusMeta:
    """Model and settings of a corpus. Raises ValueError for values that are not allowed."""

    model: str
    """The name that loads the model."""
    fingerprint: str
    dimension: int
    dtype: str = "float32"
    """The type the model computed in."""
    precision: Precision = "float16"
    format: Format = "lance"
    text_column: str = "text"
    title_column: str = "title"
    id_column: str | None = None
    """None: `_id` or `id`, else the file's name and the row's number."""
    keep_text: bool = True
    shard_rows: int = 1024
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, allowed in (("precision", get_args(Precision)), ("format", get_args(Format))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.shard_rows < 1:
            raise ValueError(f"shard rows must be at least 1, got {self.shard_rows}")
        if self.precision == "binary" and self.dimension % 8:
            raise ValueError(f"binary vectors need a multiple of 8 numbers, this model gives {self.dimension}")

    def to_json(self) -> str:
        """Return the manifest's text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, uri: str) -> CorpusMeta:
        """Read a manifest.

        Args:
            text: What `to_json` gave.
            uri: The corpus, for error messages.

        Raises:
            ValueError: The text is no manifest, or one of another format version.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the corpus {uri} does not say how it was made: delete it and embed again") from error
        raise ValueError(
            f"the corpus {uri} has format version {version}, this gemify reads {FORMAT_VERSION}: embed again, elsewhere"
        )

    @classmethod
    def from_schema(cls, schema: Any, uri: str) -> CorpusMeta:
        """Read what the schema of a table says of the corpus. Raises ValueError as `from_json` does."""
        return cls.from_json((schema.metadata or {}).get(_META_KEY, b""), uri)

    def schema(self, *, commit: str | None = None) -> Any:
        """Return the Arrow schema of the corpus' rows, with this and a commit's name as its metadata."""
        import pyarrow as pa

        width = self.dimension // 8 if self.precision == "binary" else self.dimension
        kinds = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
        texts = [pa.field(n, pa.string()) for n in ("id", *(("title", "text") if self.keep_text else ()))]
        metadata = {_META_KEY: self.to_json().encode()} | ({} if commit is None else {COMMIT_KEY: commit.encode()})
        vector = pa.field("vector", pa.list_(kinds[self.precision], width))
        return pa.schema([*texts, vector], metadata=metadata)


def read_manifest(uri: str | Path) -> CorpusMeta | None:
    """Read the manifest of a corpus, whatever it holds so far.

    Args:
        uri: A directory, or a URI that pyarrow takes.

    Returns:
        What the manifest says, or None where there is none.

    Raises:
        ValueError: The manifest is damaged, or of another format version.
    """
    text = Directory(uri).read(MANIFEST)
    return None if text is None else CorpusMeta.from_json(text, str(uri))


def marker_name(shard_name: str) -> str:
    """Return the name of a shard's done marker."""
    return f"{MARKERS}/{shard_name}.json"


def part_name(shard_name: str) -> str:
    """Return the name of a shard's Parquet file."""
    return f"part-{shard_name}.parquet"


def table_uri(uri: str) -> str:
    """Return the URI of a corpus' Lance table."""
    return f"{uri}/{TABLE}.lance"


PQ_MIN_ROWS = 256
"""Rows that the codes of a pq index are learned from: LanceDB makes an index of fewer with nothing in it."""
_INDEX_MIN_ROWS = 20_000  # up to here an exact scan is quick
_MIN_PROBES = 24  # partitions that a search looks into
_PROBED_SHARE = 0.1  # of the partitions
_RESCORED = {"sq": 40, "pq": 400, "rq": 200}  # candidates of a search, rescored with the stored vectors
_SIGN_CANDIDATES = 10  # per wanted hit of binary vectors


class Corpus:
    """An open corpus, read-only but for its indexes. Every method raises ValueError, in one line, if it is damaged."""

    def __init__(self, uri: str, table: Any, meta: CorpusMeta) -> None:
        self.uri, self.meta, self._table = uri, meta, table

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Return whether `gemify embed-corpus` began to write at a URI."""
        uri = resolve_uri(uri)
        if not is_remote(uri):
            return (Path(uri) / MANIFEST).is_file() or Path(table_uri(uri)).is_dir()
        tables = table_names(connect(uri), uri)
        return TABLE in tables or (not tables and _read_manifest(uri) is not None)

    @classmethod
    def open(cls, uri: str | Path) -> Corpus:
        """Open a corpus.

        Args:
            uri: A directory, or a URI that LanceDB takes.

        Raises:
            ValueError: There is no corpus, none yet, or one that cannot be searched.
        """
        uri = resolve_uri(uri)
        database = connect(uri) if is_remote(uri) or Path(uri).is_dir() else None
        if database is None or TABLE not in table_names(database, uri):
            manifest = _read_manifest(uri)
            if manifest is not None and CorpusMeta.from_json(manifest, uri).format != "lance":
                raise ValueError(
                    f"the corpus {uri} is of Parquet files, which are not searched: embed with --format lance"
                )
            raise ValueError(f"the corpus {uri} holds nothing yet: run gemify embed-corpus again")
        table = open_table(database, TABLE, uri)
        return cls(uri, table, CorpusMeta.from_schema(table.schema, uri))

    # Writing

    def build_indexes(self, kind: IndexKind | None = None) -> list[str]:
        """Build the indexes that are missing: of the vectors, and of titles and texts.

        Args:
            kind: The kind of vector index. By default one that fits the precision, from 20,000 rows on. A pq index of
                fewer than `PQ_MIN_ROWS` rows is not built: a search compares them all, as without an index.

        Returns:
            Names of the indexes built.
        """
        built = []
        with readable(self.uri):
            known = {i.columns[0]: i.index_type for i in self._table.list_indices() if not is_old_text_index(i)}
            wanted = kind or ("flat" if self.meta.precision == "binary" else "sq" if self.meta.dimension % 8 else "rq")
            require_index(self.meta.precision, wanted, self.meta.dimension)
            rows = len(self)
            due = rows >= (_INDEX_MIN_ROWS if kind is None else PQ_MIN_ROWS if kind == "pq" else 1)
            if self.meta.precision != "int8" and due and _kind(known.get("vector", "")) != wanted:
                distance = "hamming" if self.meta.precision == "binary" else "dot"
                config = vector_index(wanted, partitions=max(1, round(rows**0.5 / 3)), distance=distance)
                self._table.create_index("vector", config=config, replace=True)
                built.append(f"{wanted} vectors")
            for column in self._text_columns:
                if column not in known:
                    self._table.create_index(column, config=text_index(), replace=True)
                    built.append(column)
        return built

    # Reading

    def __len__(self) -> int:
        with readable(self.uri):
            return int(self._table.count_rows())

    def vector_search(self, vector_D: np.ndarray, k: int, where: str | None = None) -> list[Hit]:
        """Find the passages nearest to a vector.

        Args:
            vector_D: The query's embedding, [D].
            k: How many passages to find.
            where: A filter of the columns, in SQL. None: all.

        Returns:
            Hits, best first. The score is the cosine; of binary vectors, the cosine to their signs.

        Raises:
            ValueError: The vector has another dimension, or the corpus holds int8 vectors.
        """
        if vector_D.shape != (self.meta.dimension,):
            raise ValueError(f"expected a vector of {self.meta.dimension} numbers, got {list(vector_D.shape)}")
        if self.meta.precision == "int8":
            raise ValueError(
                f"the corpus {self.uri} holds int8 vectors, which LanceDB does not search: embed with --precision"
                " float16 (--index sq searches them in 8 bits)"
            )
        query_D = normalize(vector_D[None])[0]
        with readable(self.uri), filtering(self._table, where):
            index = next((i for i in self._table.list_indices() if i.columns == ["vector"]), None)
            kind = "" if index is None else _kind(index.index_type)
            probes = max(_MIN_PROBES, round(_PROBED_SHARE * len(self) ** 0.5 / 3))
            if self.meta.precision == "binary":
                return self._search_signs(query_D, k, probes, where)
            query = self._table.search(query_D, vector_column_name="vector").distance_type("dot")
            query = self._filtered(query.minimum_nprobes(probes).maximum_nprobes(0 if where else probes), where)
            if candidates := _RESCORED.get(kind):
                query = query.refine_factor(max(1, -(-candidates // k)))
            found = query.limit(k).select([*self._hit_columns, "_distance"]).to_arrow().to_pylist()
        return self._sorted(self._hit(row, 1 - row["_distance"]) for row in found)

    def _search_signs(self, query_D: np.ndarray, k: int, probes: int, where: str | None) -> list[Hit]:
        query = self._table.search(np.packbits(query_D > 0), vector_column_name="vector").distance_type("hamming")
        query = self._filtered(query.minimum_nprobes(probes).maximum_nprobes(0 if where else probes), where)
        query = query.limit(max(_SIGN_CANDIDATES * k, 100)).select([*self._hit_columns, "vector", "_distance"])
        found = query.to_arrow().to_pylist()
        if not found:
            return []
        packed = np.asarray([row["vector"] for row in found], dtype=np.uint8)
        signs_ND = np.unpackbits(packed, axis=1, count=self.meta.dimension).astype(np.float32) * 2 - 1
        scores = signs_ND @ query_D / self.meta.dimension**0.5
        return self._sorted(self._hit(row, float(s)) for row, s in zip(found, scores, strict=True))[:k]

    def text_search(self, query: str, k: int, where: str | None = None) -> list[Hit]:
        """Find the passages whose words match a query best.

        Args:
            query: The words to find.
            k: How many passages to find.
            where: A filter of the columns, in SQL. None: all.

        Returns:
            Hits, best first. The score is BM25.

        Raises:
            ValueError: The corpus keeps no text, or has no index of it.
        """
        if not self.meta.keep_text:
            raise ValueError(f"the corpus {self.uri} keeps no text to find words in: set the mode to vector")
        with readable(self.uri), filtering(self._table, where):
            indexed = {i.columns[0] for i in self._table.list_indices()}
            if not indexed.issuperset(self._text_columns):
                raise ValueError(
                    f"the corpus {self.uri} has no index of its words: run gemify embed-corpus to its end (without"
                    " --index none), or set the mode to vector"
                )
            search = self._table.search(text_query(word_forms(query), self._text_columns), query_type="fts").limit(k)
            found = self._filtered(search, where).select([*self._hit_columns, "_score"]).to_arrow().to_pylist()
        return self._sorted(self._hit(row, row["_score"]) for row in found)

    def hits(self) -> Iterator[Hit]:
        """Yield every passage, in the order of the inputs, with score 0."""
        with readable(self.uri):
            for batch in self._table.search().select(self._hit_columns).to_batches(4096):
                yield from (self._hit(row, 0.0) for row in batch.to_pylist())

    @property
    def version(self) -> tuple[int, ...]:
        """What changes with every commit."""
        with readable(self.uri):
            return (int(self._table.version),)

    def sample_vectors(self, limit: int) -> tuple[list[str], list[str], np.ndarray]:
        """Return ids, files (the corpus) and vectors, [N, D], of at most ``limit`` passages, evenly spread.

        Binary vectors are of signs, -1 and 1.
        """
        with readable(self.uri):
            rows = sample_rows(self._table, ["id", "vector"], limit)
        vectors_ND = to_matrix(rows["vector"])
        if self.meta.precision == "binary":
            bits_ND = np.unpackbits(vectors_ND.astype(np.uint8), axis=1, count=self.meta.dimension)
            vectors_ND = bits_ND.astype(np.float32) * 2 - 1
        return rows["id"].to_pylist(), [self.uri] * len(rows), vectors_ND

    def read(self, passage_id: str, before: int = 0, after: int = 0) -> list[Hit]:
        """Return the passages of an id, with score 0. Rows have no neighbours."""
        (listed,) = sql_lists([passage_id])
        with readable(self.uri):
            found = self._table.search().where(f"id = {listed}").select(self._hit_columns).to_arrow().to_pylist()
        return [self._hit(row, 0.0) for row in found]

    @property
    def _text_columns(self) -> list[str]:
        return [name for name in ("text", "title") if name in self._table.schema.names]

    @property
    def _hit_columns(self) -> list[str]:
        return ["id", *self._text_columns]

    @staticmethod
    def _filtered(query: Any, where: str | None) -> Any:
        return query if where is None else query.where(f"({where})", prefilter=True)

    def _hit(self, row: dict[str, Any], score: float) -> Hit:
        text, title = (row.get(name) or "" for name in ("text", "title"))
        return Hit(row["id"], self.uri, text, title, "", f"row {row['id']}", score)

    @staticmethod
    def _sorted(hits: Iterator[Hit]) -> list[Hit]:
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))  # equal scores in one order


def require_index(precision: Precision, kind: str, dimension: int) -> None:
    """Raise ValueError for a kind of index that vectors of this precision and dimension cannot have."""
    if precision == "binary" and kind != "flat":
        raise ValueError(f"binary vectors have one kind of index, flat, got {kind}: leave the setting out")
    if kind == "rq" and dimension % 8:
        raise ValueError(
            f"an rq index needs vectors of a multiple of 8 numbers, got {dimension}: choose sq, pq or flat"
        )


def _read_manifest(uri: str) -> bytes | None:
    """The manifest's text if pyarrow, which embed-corpus writes it with, can read one."""
    try:
        return Directory(uri).read(MANIFEST)
    except (OSError, ValueError):
        return None


def refuse_corpus(uri: str | Path) -> None:
    """Raise ValueError if there is a corpus at a URI that is to be written to as a store."""
    if Corpus.exists(uri):
        raise ValueError(f"{uri} is a corpus that gemify embed-corpus writes: index files into another directory")


def _kind(index_type: str) -> str:
    return index_type.lower().replace("_", "").removeprefix("ivf")


def find_store(uri: str | Path) -> Store | Corpus | None:
    """Open the store or the corpus at a URI, or return None where there is neither.

    Raises:
        ValueError: What is there is damaged.
    """
    if Corpus.exists(uri):
        return Corpus.open(uri)
    return Store.open(uri) if Store.exists(uri) else None


def open_store(uri: str | Path) -> Store | Corpus:
    """Open the store or the corpus at a URI.

    Raises:
        ValueError: There is neither, or it is damaged.
    """
    return Corpus.open(uri) if Corpus.exists(uri) else Store.open(uri)
