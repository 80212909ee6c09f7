"""Rows of the tables of a store: files and chunks as they are written, and chunks as a search finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemify.retrieval.chunking import Chunk
from gemify.retrieval.metadata import Value


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
    meta: Mapping[str, Value] = field(default_factory=dict)
    """Its values of the columns of metadata, where it has one."""
