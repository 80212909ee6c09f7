"""One shard: read, embed, write, and only then mark as done.

`embed_shard` may run any number of times, be killed at any point, and run in two processes at once. The first done
marker of a shard names its part. Other parts lie unused until the run's end deletes them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from gemify.io.directory import Directory
from gemify.model.encode import ThroughputMeter
from gemify.retrieval.bulk.lance_writer import table, write_part
from gemify.retrieval.bulk.plan import Shard
from gemify.retrieval.bulk.rows import ShardReader
from gemify.retrieval.corpus_format import CorpusMeta, marker_name

_ATTEMPTS = 3  # for a disk or a network that fails and comes back
_MAX_NAMED_ROWS = 20  # of a shard


class DocumentEncoder(Protocol):
    """The methods of a model that a corpus needs. `GemModel` has them."""

    meter: ThroughputMeter

    @property
    def fingerprint(self) -> str:
        """A name of the model's weights and settings: equal for equal vectors."""

    def get_embedding_dim(self) -> int:
        """Return D, the width of a vector."""

    def encode_document(self, inputs: Any, **options: Any) -> Any:
        """Embed a list of texts, [N, D]."""


@dataclass(frozen=True)
class DoneMarker:
    """A shard's done marker."""

    shard: Shard
    rows: int
    """Number of rows embedded: those of the shard but for blank and malformed ones."""
    skipped: int
    bad: list[str] = field(default_factory=list)
    """The first skipped rows, with reasons."""
    parts: list[str] = field(default_factory=list)
    """References to the part, as `write_part` gives them."""
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return the marker's text."""
        return json.dumps({**asdict(self), "shard": self.shard.to_dict()})

    @classmethod
    def from_json(cls, text: str | bytes) -> DoneMarker:
        """Read a marker that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "shard": Shard.from_dict(values["shard"])})


def embed_shard(
    shard: Shard,
    *,
    model: DocumentEncoder,
    reader: ShardReader,
    directory: Directory,
    batch_size: int = 32,
    wait: float = 1.0,
) -> DoneMarker:
    """Embed a shard's passages into the corpus, unless they are there.

    Args:
        shard: The shard.
        model: The model of the corpus.
        reader: The reader of its inputs.
        directory: The corpus.
        batch_size: Maximum passages that the model embeds at a time.
        wait: Seconds before a second attempt, when a disk or a network failed.

    Returns:
        The shard's done marker: this call's, or the earlier one.

    Raises:
        ValueError: A malformed row, an input that changed, or a vector that is not finite.
        OSError: The disk or the network failed three times.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _embed(shard, model, reader, directory, batch_size)
        except OSError:
            reader.close()  # a file that failed half-way does not go on where it was
            if attempt == _ATTEMPTS:
                raise
            time.sleep(wait * attempt)
    raise AssertionError("the last attempt returns or raises")


def _embed(
    shard: Shard, model: DocumentEncoder, reader: ShardReader, directory: Directory, batch_size: int
) -> DoneMarker:
    if (there := directory.read(marker_name(shard.name))) is not None:
        return DoneMarker.from_json(there)
    begin = time.perf_counter()
    skipped: list[str] = []
    passages = reader.passages(shard, skipped)
    meta: CorpusMeta = reader.meta
    vectors_ND, tokens = np.empty((0, meta.dimension), np.float32), 0
    if passages:
        vectors_ND = np.asarray(model.encode_document([p.embed_text for p in passages], batch_size=batch_size))
        tokens = model.meter.tokens - model.meter.padding
    if wrong := np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1)).tolist():
        raise ValueError(
            f"{shard.path}: the vector of passage {passages[wrong[0]].id!r} has numbers that are not finite: compute in"
            " another precision (--dtype float32)"
        )
    parts = write_part(directory, meta, shard, table(meta, passages, vectors_ND))
    seconds = time.perf_counter() - begin
    done = DoneMarker(shard, len(passages), len(skipped), skipped[:_MAX_NAMED_ROWS], parts, tokens, seconds)
    if directory.write_if_absent(marker_name(shard.name), done.to_json().encode()):
        return done
    return DoneMarker.from_json(directory.read(marker_name(shard.name)) or b"")
