"""What a store was made with: its model and settings, kept in the schema of its table of files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from gemify.retrieval.chunking import ChunkSettings

Precision = Literal["float32", "float16", "int8", "binary"]
FORMAT_VERSION = 1
_KEY = b"gemify"


@dataclass(frozen=True)
class StoreMeta:
    """Model and settings of a store. Raises ValueError for an unknown precision."""

    model: str
    """The name that loads the model."""
    fingerprint: str
    dimension: int
    precision: Precision = "float32"
    """int8 and binary search quantized vectors and rescore the best with full ones."""
    chunk: ChunkSettings = field(default_factory=ChunkSettings)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"unknown precision {self.precision!r}: choose one of {', '.join(get_args(Precision))}")

    def to_schema(self) -> dict[bytes, bytes]:
        """Return what the schema of a table says of the store."""
        return {_KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def from_schema(cls, schema: Any, uri: str) -> StoreMeta:
        """Read what the schema of a table says of a store. Raises ValueError if that cannot be read."""
        try:
            values = json.loads((schema.metadata or {})[_KEY])
            version = values["format_version"]
            if version == FORMAT_VERSION:
                return cls(**{**values, "chunk": ChunkSettings(**values["chunk"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the store {uri} does not say how it was made: delete it and index again") from error
        raise ValueError(f"the store {uri} has format version {version}, not {FORMAT_VERSION}: index again, elsewhere")
