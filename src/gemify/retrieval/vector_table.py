"""A corpus that `gemify embed-corpus` wrote, as a store: searched like one, and only read.

It is one Lance table, a row a passage: `id`, `vector`, and, where they are kept, `title` and `text`. The table's schema
says which model wrote it. Vectors are kept at one of four precisions:

    float32, float16   of length 1; searched by dot product, which is the cosine
    binary             the signs, 8 a byte; searched by Hamming distance, the best rescored with the question's own numbers
    int8               for other engines: LanceDB does not search it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from gemify.io.directory import is_remote, resolve_uri
from gemify.io.vectors import normalize
from gemify.retrieval.document_store import Hit, Precision, Store
from gemify.retrieval.lance import (
    IndexKind,
    connect,
    open_table,
    readable,
    table_names,
    text_index,
    text_query,
    vector_index,
)

Format = Literal["lance", "parquet"]
TABLE = "corpus"
MANIFEST = "gemify-corpus.json"
FORMAT_VERSION = 1
_META = b"gemify"
_IVF_FROM = 20_000  # rows: up to here an exact scan is quick
PQ_FROM = 256
"""Rows: codes are learned from as many; of fewer, LanceDB makes an index with nothing in it."""
_PROBES = 24  # partitions that a search looks into, at least
_PROBED = 0.1  # share of the partitions
_RESCORED = {"sq": 40, "pq": 400, "rq": 200}  # candidates of a search, rescored with the vectors kept
_SIGNS = 10  # times as many candidates by their signs as are wanted


@dataclass(frozen=True)
class CorpusMeta:
    """What a corpus says of itself."""

    model: str
    """By what name the model was loaded."""
    fingerprint: str
    dimension: int
    dtype: str = "float32"
    """What the model computed in."""
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
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, uri: str) -> CorpusMeta:
        """Raises ValueError for what is none, or of another version."""
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

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """For the schema of what is written."""
        return {_META: self.to_json().encode()}


class Corpus:
    """An open corpus. Every method raises ValueError, in one line, where it is damaged."""

    def __init__(self, uri: str, table: Any, meta: CorpusMeta) -> None:
        self.uri, self.meta, self._table = uri, meta, table

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Whether embed-corpus began to write there."""
        uri = resolve_uri(uri)
        if not is_remote(uri):
            return (Path(uri) / MANIFEST).is_file() or (Path(uri) / f"{TABLE}.lance").is_dir()
        tables = table_names(connect(uri), uri)
        return TABLE in tables or (not tables and _manifest(uri) is not None)

    @classmethod
    def open(cls, uri: str | Path) -> Corpus:
        """Raises ValueError where there is no corpus, none yet, or one that cannot be searched."""
        uri = resolve_uri(uri)
        database = connect(uri) if is_remote(uri) or Path(uri).is_dir() else None
        if database is None or TABLE not in table_names(database, uri):
            begun = _manifest(uri)
            if begun is not None and CorpusMeta.from_json(begun, uri).format != "lance":
                raise ValueError(
                    f"the corpus {uri} is of Parquet files, which are not searched: embed with --format lance"
                )
            raise ValueError(f"the corpus {uri} holds nothing yet: run gemify embed-corpus again")
        table = open_table(database, TABLE, uri)
        return cls(uri, table, CorpusMeta.from_json((table.schema.metadata or {}).get(_META, b""), uri))

    # Writing

    def build_indexes(self, kind: IndexKind | None = None) -> list[str]:
        """Build what indexes are missing: of the vectors (from 20,000 rows on, or of that kind) and of the words.

        pq on fewer than `PQ_FROM` rows is not built: a search compares them all, as it does without an index.
        What was built is named.
        """
        built = []
        with readable(self.uri):
            known = {i.columns[0]: i.index_type for i in self._table.list_indices()}
            wanted = kind or ("flat" if self.meta.precision == "binary" else "sq" if self.meta.dimension % 8 else "rq")
            require_index(self.meta.precision, wanted, self.meta.dimension)
            rows = len(self)
            due = rows >= (_IVF_FROM if kind is None else PQ_FROM if kind == "pq" else 1)
            if self.meta.precision != "int8" and due and _kind(known.get("vector", "")) != wanted:
                distance = "hamming" if self.meta.precision == "binary" else "dot"
                config = vector_index(wanted, partitions=max(1, round(rows**0.5 / 3)), distance=distance)
                self._table.create_index("vector", config=config, replace=True)
                built.append(f"{wanted} vectors")
            for column in self._words:
                if column not in known:
                    self._table.create_index(column, config=text_index())
                    built.append(column)
        return built

    # Reading

    def __len__(self) -> int:
        with readable(self.uri):
            return int(self._table.count_rows())

    def vector_search(self, vector_D: np.ndarray, k: int) -> list[Hit]:
        """The passages nearest to a vector; the score is the cosine (of binary vectors: to their signs)."""
        if vector_D.shape != (self.meta.dimension,):
            raise ValueError(f"expected a vector of {self.meta.dimension} numbers, got {list(vector_D.shape)}")
        if self.meta.precision == "int8":
            raise ValueError(
                f"the corpus {self.uri} holds int8 vectors, which LanceDB does not search: embed with --precision float16"
                " (--index sq searches them in 8 bits)"
            )
        wanted_D = normalize(vector_D[None])[0]
        with readable(self.uri):
            index = next((i for i in self._table.list_indices() if i.columns == ["vector"]), None)
            kind = "" if index is None else _kind(index.index_type)
            probes = max(_PROBES, round(_PROBED * len(self) ** 0.5 / 3))
            if self.meta.precision == "binary":
                return self._search_signs(wanted_D, k, probes)
            query = self._table.search(wanted_D, vector_column_name="vector").distance_type("dot").nprobes(probes)
            if candidates := _RESCORED.get(kind):
                query = query.refine_factor(max(1, -(-candidates // k)))
            found = query.limit(k).select([*self._shown, "_distance"]).to_arrow().to_pylist()
        return self._sorted(self._hit(row, 1 - row["_distance"]) for row in found)

    def _search_signs(self, wanted_D: np.ndarray, k: int, probes: int) -> list[Hit]:
        query = self._table.search(np.packbits(wanted_D > 0), vector_column_name="vector").distance_type("hamming")
        query = query.nprobes(probes).limit(max(_SIGNS * k, 100)).select([*self._shown, "vector", "_distance"])
        found = query.to_arrow().to_pylist()
        if not found:
            return []
        packed = np.asarray([row["vector"] for row in found], dtype=np.uint8)
        signs_ND = np.unpackbits(packed, axis=1, count=self.meta.dimension).astype(np.float32) * 2 - 1
        scores = signs_ND @ wanted_D / self.meta.dimension**0.5
        return self._sorted(self._hit(row, float(s)) for row, s in zip(found, scores, strict=True))[:k]

    def text_search(self, words: str, k: int) -> list[Hit]:
        """The passages that match words best; the score is BM25."""
        if not self.meta.keep_text:
            raise ValueError(f"the corpus {self.uri} keeps no text to find words in: set the mode to vector")
        with readable(self.uri):
            indexed = {i.columns[0] for i in self._table.list_indices()}
            if not indexed.issuperset(self._words):
                raise ValueError(
                    f"the corpus {self.uri} has no index of its words: run gemify embed-corpus to its end (without"
                    " --index none), or set the mode to vector"
                )
            query = self._table.search(text_query(words, self._words), query_type="fts").limit(k)
            found = query.select([*self._shown, "_score"]).to_arrow().to_pylist()
        return self._sorted(self._hit(row, row["_score"]) for row in found)

    def hits(self) -> Iterator[Hit]:
        """Every passage, in order, with score 0."""
        with readable(self.uri):
            for batch in self._table.search().select(self._shown).to_batches(4096):
                yield from (self._hit(row, 0.0) for row in batch.to_pylist())

    @property
    def _words(self) -> list[str]:
        return [name for name in ("text", "title") if name in self._table.schema.names]

    @property
    def _shown(self) -> list[str]:
        return ["id", *self._words]

    def _hit(self, row: dict[str, Any], score: float) -> Hit:
        shown = {name: row.get(name) or "" for name in ("text", "title")}
        return Hit(row["id"], self.uri, heading="", location=f"row {row['id']}", score=score, **shown)

    @staticmethod
    def _sorted(hits: Iterator[Hit]) -> list[Hit]:
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))  # equal scores in one order


def require_index(precision: Precision, kind: str, dimension: int) -> None:
    """Refuse a kind of index that vectors of a precision do not have."""
    if precision == "binary" and kind != "flat":
        raise ValueError(f"binary vectors have one kind of index, flat, got {kind}: leave the setting out")
    if kind == "rq" and dimension % 8:
        raise ValueError(
            f"an rq index needs vectors of a multiple of 8 numbers, got {dimension}: choose sq, pq or flat"
        )


def _manifest(uri: str) -> bytes | None:
    """What embed-corpus writes first, if it began to write there; it writes where pyarrow does."""
    from pyarrow.fs import FileSystem

    try:
        files, path = FileSystem.from_uri(uri)
        with files.open_input_file(f"{path}/{MANIFEST}") as file:
            return bytes(file.read())
    except (OSError, ValueError):
        return None


def refuse_corpus(uri: str | Path) -> None:
    """Keep what writes a store out of a corpus."""
    if Corpus.exists(uri):
        raise ValueError(f"{uri} is a corpus that gemify embed-corpus writes: index files into another directory")


def _kind(index_type: str) -> str:
    return index_type.lower().replace("_", "").removeprefix("ivf")


def open_store(uri: str | Path) -> Store | Corpus:
    """What is searched at a URI. Raises ValueError where there is nothing."""
    return Corpus.open(uri) if Corpus.exists(uri) else Store.open(uri)
