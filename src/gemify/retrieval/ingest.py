"""One run over files: what is new is read, cut, embedded and committed; what is gone is forgotten.

Chunks of several files wait until there are enough to embed in length-sorted batches; then they are committed, and with
them the files that are complete. No more than one such portion, and one piece of one file, is ever in memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from gemify.io.rows import replace_surrogates
from gemify.io.signals import StopFlag
from gemify.retrieval.chunking import chunks
from gemify.retrieval.document_store import FileRecord, Row, Store
from gemify.retrieval.loaders import Columns, Found, content_hash, read_file
from gemify.retrieval.section import Skipped


class Embedder(Protocol):
    """What the index asks of a model; `GemModel` is one."""

    tokenizer: Any

    @property
    def fingerprint(self) -> str: ...
    @property
    def max_seq_length(self) -> int: ...
    def get_embedding_dim(self) -> int: ...
    def encode_query(self, inputs: Any, **options: Any) -> Any: ...
    def encode_document(self, inputs: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Options:
    """How a run reads and embeds."""

    columns: Columns = field(default_factory=Columns)
    limit: int | None = None
    batch_size: int = 32
    commit_tokens: int = 65_536


@dataclass(frozen=True)
class IndexReport:
    """What a run did."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: int
    skipped: tuple[Skipped, ...]
    chunks: int
    """Embedded in this run."""
    tokens: int
    seconds: float
    """Of embedding alone."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Run:
    """A run under way. The caller holds the store's lock."""

    store: Store
    model: Embedder
    options: Options
    stop_flag: StopFlag
    bar: tqdm[Any]
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unchanged: int = 0
    chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _rows: list[Row] = field(default_factory=list)
    _complete: list[FileRecord] = field(default_factory=list)
    _waiting: int = 0

    def over(self, found: Found) -> IndexReport:
        """Bring the files found, as they are, into the store."""
        before, begun = self.store.files(), dict(self.store.pending_versions())
        self.skipped.extend(found.skipped)
        removed = tuple(path for path in before if found.is_gone(Path(path)))
        self.store.forget(removed)
        for number, path in enumerate(found.files, start=1):
            self.bar.set_postfix_str(f"file {number:,} of {len(found.files):,}", refresh=False)
            self._file(path, before.get(str(path)), begun)
        self._commit()
        self.store.finish()
        return IndexReport(
            added=tuple(self.added),
            changed=tuple(self.changed),
            removed=removed,
            unchanged=self.unchanged,
            skipped=tuple(self.skipped),
            chunks=self.chunks,
            tokens=self.tokens,
            seconds=self.seconds,
        )

    def _file(self, path: Path, old: FileRecord | None, begun: dict[str, int]) -> None:
        columns, limit = self.options.columns, self.options.limit
        version = ""
        if (shown := replace_surrogates(str(path))) != str(path):
            self.skipped.append(Skipped(shown, "its name is not UTF-8: rename it"))
            return
        try:
            stat = path.stat()
            digest = content_hash(path, columns)
            version = sha256(f"{path}\0{digest}".encode()).hexdigest()[:16]
            if old is not None and old.version == version:
                self.unchanged += 1
                return
            if limit is not None and len(self.added) + len(self.changed) >= limit:
                return
            count = self._read(path, version, skip=begun.get(version, 0))
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise ValueError("changed while it was read: run the same command again")
        except (ValueError, OSError) as error:
            self._drop(version)
            reason = str(error) if isinstance(error, ValueError) else f"cannot be read ({error.strerror}): allow it"
            kept = "; what was indexed of it before stays" if old is not None else ""
            self.skipped.append(Skipped(str(path), reason + kept))
            return
        self._complete.append(FileRecord(str(path), digest, version, stat.st_size, stat.st_mtime, count))
        (self.added if old is None else self.changed).append(str(path))

    def _read(self, path: Path, version: str, *, skip: int) -> int:
        """Let a file's chunks wait for their commit, all but the first ``skip``, which are there; returns their number."""
        count = 0
        for item in read_file(path, self.options.columns):
            if isinstance(item, Skipped):
                self.skipped.append(item)
                continue
            for chunk in chunks(item, self.model.tokenizer, self.store.meta.chunk, ordinal=count):
                count += 1
                if chunk.ordinal >= skip:
                    self._rows.append(Row(str(path), version, chunk))
                    self._waiting += chunk.tokens
                if self._waiting >= self.options.commit_tokens:
                    self._commit()
                self.stop_flag.raise_if_set()
        return count

    def _drop(self, version: str) -> None:
        """Take back what waits of a file that turned out not to be readable."""
        self._rows = [r for r in self._rows if r.version != version]
        self._waiting = sum(r.chunk.tokens for r in self._rows)

    def _commit(self) -> None:
        if self._rows:
            begin = time.perf_counter()
            words = [r.chunk.embed_text for r in self._rows]
            vectors_ND = np.asarray(self.model.encode_document(words, batch_size=self.options.batch_size))
            self.seconds += time.perf_counter() - begin
            self.store.append(self._rows, vectors_ND)
        self.store.record(self._complete)
        self.chunks += len(self._rows)
        self.tokens += self._waiting
        self.bar.update(len(self._rows))
        self._rows, self._complete, self._waiting = [], [], 0
        self.stop_flag.raise_if_set()
