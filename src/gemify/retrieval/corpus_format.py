"""What `gemify embed-corpus` leaves in a directory or object store, and what it calls it.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gemify.io.directory import Directory
from gemify.retrieval.document_store import Precision

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
