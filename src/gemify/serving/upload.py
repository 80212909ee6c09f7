"""Files that clients put into a store: kept in the store's directory, embedded in the engine's batches."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import Request

from gemify.io.atomic import atomic_file
from gemify.io.directory import is_remote
from gemify.retrieval.document_store import Store
from gemify.retrieval.index import GemIndex
from gemify.retrieval.loaders import SUFFIXES, Columns, content_hash
from gemify.retrieval.store_rows import FileRecord
from gemify.serving.dispatch import ThreadCalls, run_until_disconnect
from gemify.serving.embedding import embed
from gemify.serving.errors import ApiError, bad_request, from_engine_error
from gemify.serving.state import get_state
from gemify.serving.tokenization import TextOptions

if TYPE_CHECKING:
    from gemify.model.gem import GemModel

T = TypeVar("T")
_DIRECTORY = "uploads"
_MAX_NAME_BYTES = 200
_BATCH = 32  # texts that are in the engine at a time


class EngineEmbedder:
    """A model as `GemIndex.add` asks for it in a thread (`gemify.retrieval.ingest.Embedder`); the engine embeds.

    Args:
        gem: the engine's model.
        tokenizer: a copy of its own.
        embed_texts: embeds documents, [N, D]; it blocks.
    """

    def __init__(self, gem: GemModel, tokenizer: Any, embed_texts: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._gem, self.tokenizer, self._embed_texts = gem, tokenizer, embed_texts
        self.fingerprint, self.max_seq_length = gem.fingerprint, gem.max_seq_length

    def get_embedding_dim(self) -> int:
        """Return D."""
        return self._gem.get_embedding_dim()

    def encode_query(self, inputs: Any, **_: Any) -> Any:
        """Raise NotImplementedError: files hold no queries."""
        raise NotImplementedError("documents alone are embedded here")

    def encode_document(self, inputs: Any, **_: Any) -> np.ndarray:
        """Embed texts, [N, D], some at a time."""
        return np.concatenate([self._embed_texts(inputs[at : at + _BATCH]) for at in range(0, len(inputs), _BATCH)])


class FileUploads:
    """Puts files into stores and removes them, one at a time. End it with `close`."""

    def __init__(self, gem: GemModel) -> None:
        self._gem, self._tokenizer = gem, copy.deepcopy(gem.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gemify-uploads")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def add(self, request: Request, index: GemIndex, name: str, content: bytes) -> tuple[FileRecord, list[str]]:
        """Put a file into a store, in the place of one of its name.

        The store changes in one commit, at the end. If the client goes before it, the store stays as it is.

        Args:
            request: the HTTP request, whose key is charged.
            index: the store's.
            name: of the file, as `require_file_name` gives it.
            content: its bytes.

        Returns:
            What the store has of it now, and what of it could not be read.

        Raises:
            ApiError: the file cannot be read, a limit is reached, or the store cannot be written to.
        """
        state, path = get_state(request), _directory(index) / name

        async def embed_texts(texts: Sequence[str]) -> np.ndarray:
            options = TextOptions("end", prompt=state.tokenizer.prompt_of(None, "document"))
            return (await embed(request, (await state.tokenizer.tokenize_texts(list(texts), options)).rows))[0]

        with ThreadCalls() as calls:
            embedder = EngineEmbedder(self._gem, self._tokenizer, partial(calls.run, embed_texts))
            return await self._run(request, partial(_add, GemIndex(index.store, embedder), path, content))

    async def remove(self, request: Request, index: GemIndex, name: str) -> None:
        """Remove a file that was put into a store; ApiError 404 if there is none of this name."""
        await self._run(request, partial(_remove, index, _directory(index) / name))

    async def _run(self, request: Request, work: Callable[[], T]) -> T:
        async def wait() -> T:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

        try:
            return await run_until_disconnect(request.receive, wait(), get_state(request).settings.timeout)
        except Exception as error:
            raise from_engine_error(error) from error


def require_file_name(given: str) -> str:
    """Return the last part of a path that a client gave, without what is no name of a document.

    Raises:
        ApiError: 400, there is no name, or a long one; 415, its kind is not read.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", given))[-1]
    name = "".join(character for character in last if character.isprintable()).strip().lstrip(".")
    if not name or len(name.encode()) > _MAX_NAME_BYTES:
        raise bad_request(f"the file's name must have 1 to {_MAX_NAME_BYTES} bytes, got {given[:80]!r}", "file")
    if Path(name).suffix.lower() not in SUFFIXES:
        kinds = " ".join(sorted(SUFFIXES))
        raise ApiError(
            415, f"{name[:80]!r} is of no kind that is read: give {kinds}", param="file", code="unknown_kind"
        )
    return name


def _directory(index: GemIndex) -> Path:
    if not isinstance(index.store, Store) or is_remote(index.store.uri):
        raise bad_request("this store takes no files: it is remote, or a corpus", "store", code="not_writable")
    return Path(index.store.uri) / _DIRECTORY


def _add(index: GemIndex, path: Path, content: bytes) -> tuple[FileRecord, list[str]]:
    assert isinstance(index.store, Store)
    index.require_same_store()
    before = path.read_bytes() if path.is_file() else None
    _write(path, content)
    digest = content_hash(path, Columns())
    record = None
    try:
        report = index.add(path)
    finally:
        with contextlib.suppress(ValueError):
            record = index.store.files().get(str(path))
        if record is None or record.hash != digest:
            path.unlink(missing_ok=True) if before is None else _write(path, before)
    reasons = [skipped.reason for skipped in report.skipped]
    if record is None or record.hash != digest:
        raise bad_request(f"{path.name}: {reasons[0]}", "file", code="unreadable_file")
    return record, reasons


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as stage:
        stage.write_bytes(content)


def _remove(index: GemIndex, path: Path) -> None:
    assert isinstance(index.store, Store)
    with index.store.write_lock():
        if str(path) not in index.store.files() and not path.is_file():
            raise ApiError(404, f"no file {path.name!r} was put into this store", param="name", code="file_not_found")
        index.store.remove([str(path)])
        path.unlink(missing_ok=True)
        index.store.optimize()
