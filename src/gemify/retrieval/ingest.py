"""One run over files: it reads, cuts, embeds and commits what is new, and removes what is gone.

Chunks of several files wait until there are enough to embed in length-sorted batches. One commit then holds them, and
the next one the files that are complete. Memory holds one such portion, and one piece of one file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from gemify.io.rows import replace_surrogates
from gemify.io.signals import StopFlag
from gemify.retrieval.chunking import Chunk, split_section
from gemify.retrieval.document_store import Store
from gemify.retrieval.documents import Skipped
from gemify.retrieval.loaders import Columns, FileListing, content_hash, file_kind, read_file
from gemify.retrieval.metadata import Value, file_metadata
from gemify.retrieval.store_rows import ChunkRow, FileRecord


class Embedder(Protocol):
    """What the index asks of a model; `GemModel` is one."""

    tokenizer: Any

    @property
    def fingerprint(self) -> str:
        """A name of the model's weights and settings: equal for equal vectors."""

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens of a text."""

    def get_embedding_dim(self) -> int:
        """Return D, the width of a vector."""

    def encode_query(self, inputs: Any, **options: Any) -> Any:
        """Embed a query, [D], or a list of them, [N, D]."""

    def encode_document(self, inputs: Any, **options: Any) -> Any:
        """Embed a list of texts, [N, D]."""


@dataclass(frozen=True)
class IndexOptions:
    """How a run reads and embeds."""

    columns: Columns = field(default_factory=Columns)
    ocr: bool = False
    meta: Mapping[str, Value] = field(default_factory=dict)
    """Given to all files, over what they say themselves."""
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
    """Number of chunks embedded in this run."""
    tokens: int
    seconds: float
    """Time spent embedding."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """How many files were passed by, by their kind (`FileListing.unread`)."""
    moved: tuple[str, ...] = ()
    """Files that lay elsewhere before: nothing of them was embedded again."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of embedding; 0 if nothing was embedded."""
        return self.tokens / self.seconds if self.seconds else 0.0


_MAX_REUSED_CHUNKS = 50_000  # of a changed file, whose vectors are held


@dataclass
class IndexRun:
    """A run under way. The caller holds the store's write lock."""

    store: Store
    model: Embedder
    options: IndexOptions
    stop_flag: StopFlag
    bar: tqdm[Any]
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unchanged: int = 0
    chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _rows: list[ChunkRow] = field(default_factory=list)
    _vectors: dict[str, dict[tuple[str, str, str], np.ndarray]] = field(default_factory=dict)
    """Of the old chunks of files that are read again, by the new versions: equal ones are not embedded again."""
    _misfits: set[tuple[str, str]] = field(default_factory=set)
    _complete: list[FileRecord] = field(default_factory=list)
    _pending_tokens: int = 0

    def run(self, listing: FileListing) -> IndexReport:
        """Bring the store up to date with files.

        Args:
            listing: The files as `find_files` found them.

        Returns:
            What was added, changed, removed and skipped.

        Raises:
            StopRequestedError: A signal came. What is committed stays.
        """
        moved = self._follow_moves(listing.files)
        before, pending = self.store.files(), dict(self.store.pending_versions())
        self.skipped.extend(listing.skipped)
        removed = tuple(path for path in before if listing.is_gone(Path(path)))
        self.store.remove(removed)
        for number, path in enumerate(listing.files, start=1):
            self.bar.set_postfix_str(f"file {number:,} of {len(listing.files):,}", refresh=False)
            self._add_file(path, before.get(str(path)), pending)
        self._commit()
        self.store.optimize()
        return IndexReport(
            added=tuple(self.added),
            changed=tuple(self.changed),
            removed=removed,
            unchanged=self.unchanged - len(moved),
            skipped=tuple(self.skipped),
            chunks=self.chunks,
            tokens=self.tokens,
            seconds=self.seconds,
            unread=listing.unread,
            moved=moved,
        )

    def _follow_moves(self, files: Sequence[Path]) -> tuple[str, ...]:
        """Give new files the passages of equal ones that are no longer there. Return their paths."""
        before = self.store.files()
        gone: dict[tuple[str, str], list[FileRecord]] = {}
        for record in before.values():
            if not os.path.exists(record.path):
                gone.setdefault((record.hash, Path(record.path).suffix), []).append(record)
        moves = []
        for path in (p for p in files if gone and str(p) not in before and replace_surrogates(str(p)) == str(p)):
            try:
                digest = content_hash(path, self.options.columns, self.options.meta)
            except OSError:
                continue
            if known := gone.get((digest, path.suffix)):
                old = known.pop()
                ocr = old.version == self._version(Path(old.path), digest, ocr=True)
                version = self._version(path, digest, ocr=ocr)
                new = replace(old, path=str(path), version=version, mtime=path.stat().st_mtime)
                moves.append((old, new))
        self.store.move(moves)
        return tuple(new.path for _, new in moves)

    def _version(self, path: Path, digest: str, *, ocr: bool) -> str:
        how = "\0ocr" if ocr and path.suffix.lower() == ".pdf" else ""
        return sha256(f"{self.store.relative(str(path))}\0{digest}{how}".encode()).hexdigest()[:16]

    def _add_file(self, path: Path, old: FileRecord | None, pending: dict[str, int]) -> None:
        limit, version = self.options.limit, ""
        if (printable := replace_surrogates(str(path))) != str(path):
            self.skipped.append(Skipped(printable, "its name is not UTF-8: rename it"))
            return
        try:
            stat = path.stat()
            digest = content_hash(path, self.options.columns, self.options.meta)
            version = self._version(path, digest, ocr=self.options.ocr)
            if old is not None and old.version in (version, self._version(path, digest, ocr=True)):
                self.unchanged += 1
                return
            if limit is not None and len(self.added) + len(self.changed) >= limit:
                return
            if old is not None and old.chunks <= _MAX_REUSED_CHUNKS:
                self._vectors[version] = self.store.vectors(old.version)
            meta = file_metadata(file_kind(path), stat.st_mtime)
            count = self._read_chunks(path, version, meta, skip=pending.get(version, 0))
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise ValueError("changed while it was read: run the same command again")
        except (ValueError, OSError) as error:
            self._discard(version)
            reason = str(error) if isinstance(error, ValueError) else f"cannot be read ({error.strerror}): allow it"
            kept = "; what was indexed of it before stays" if old is not None else ""
            self.skipped.append(Skipped(str(path), reason + kept))
            return
        self._complete.append(FileRecord(str(path), digest, version, stat.st_size, stat.st_mtime, count))
        (self.added if old is None else self.changed).append(str(path))

    def _read_chunks(self, path: Path, version: str, meta: Mapping[str, Value], *, skip: int) -> int:
        """Queue a file's chunks for a commit, but for the first ``skip``, which the store has. Returns their number."""
        count = 0
        for item in read_file(path, self.options.columns, ocr=self.options.ocr):
            if isinstance(item, Skipped):
                self.skipped.append(item)
                continue
            for chunk in split_section(item, self.model.tokenizer, self.store.meta.chunk, ordinal=count):
                count += 1
                if chunk.ordinal >= skip:
                    chunk = replace(chunk, meta={**meta, **chunk.meta, **self.options.meta})
                    self._rows.append(ChunkRow(str(path), version, chunk))
                    self._pending_tokens += chunk.tokens
                if self._pending_tokens >= self.options.commit_tokens:
                    self._commit()
                self.stop_flag.raise_if_set()
        return count

    def _discard(self, version: str) -> None:
        """Take queued chunks of a file back that turned out not to be readable."""
        self._vectors.pop(version, None)
        self._rows = [r for r in self._rows if r.version != version]
        self._pending_tokens = sum(r.chunk.tokens for r in self._rows)

    def _commit(self) -> None:
        if self._rows:
            for file, column, value in self.store.append(self._rows, self._embed()):
                if (file, column) not in self._misfits:
                    self._misfits.add((file, column))
                    said = f"its {column} {str(value)[:50]!r} is of another type than the store's column: left out"
                    self.skipped.append(Skipped(file, said))
        self.store.commit(self._complete)
        for record in self._complete:
            self._vectors.pop(record.version, None)
        self.bar.update(len(self._rows))
        self._rows, self._complete, self._pending_tokens = [], [], 0
        self.stop_flag.raise_if_set()

    def _embed(self) -> np.ndarray:
        """Vectors [N, D] of the queued chunks. Those that a file had before it changed are not computed again."""
        vectors = [self._vectors.get(r.version, {}).get(_key(r.chunk)) for r in self._rows]
        new = [r.chunk for r, vector in zip(self._rows, vectors, strict=True) if vector is None]
        begin = time.perf_counter()
        texts = [chunk.embed_text for chunk in new]
        made = iter(np.asarray(self.model.encode_document(texts, batch_size=self.options.batch_size)) if new else ())
        self.seconds += time.perf_counter() - begin if new else 0.0
        self.chunks += len(new)
        self.tokens += sum(chunk.tokens for chunk in new)
        return np.stack([next(made) if vector is None else vector for vector in vectors])


def _key(chunk: Chunk) -> tuple[str, str, str]:
    return chunk.text, chunk.title, chunk.heading
