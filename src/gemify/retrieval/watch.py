"""An index that follows its files: what changes on the disk is indexed within a second or two, until told to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemify.io.extras import describe_missing
from gemify.io.signals import StopFlag
from gemify.retrieval.index import GemIndex
from gemify.retrieval.ingest import IndexReport
from gemify.retrieval.lance import StoreLockedError
from gemify.retrieval.loaders import FileListing, find_files

_DEBOUNCE_MS = 500  # changes that follow each other by less than 50 ms are collected for so long
_POLL_MS = 200


def watch_files(
    index: GemIndex, paths: Sequence[str | Path], *, stop_flag: StopFlag, exclude: Sequence[str] = (), **options: Any
) -> Iterator[IndexReport]:
    """Bring files into an index, and again whenever some of them change.

    Args:
        index: The index.
        paths: Files and directories.
        stop_flag: Ends it between two runs when set.
        exclude: Patterns of what to leave out, as `find_files` takes them.
        options: Those of `GemIndex.add`.

    Yields:
        A report of each run; the first one is over all files. The index holds what it says.

    Raises:
        ValueError: As `GemIndex.add` does; also when a directory is no longer there.
        StopRequestedError: A signal came during a run. What is committed stays.
    """
    with _Watcher(paths) as watcher:
        changed: set[Path] | None = None
        while not stop_flag.is_set:
            listing = find_files(paths, known=index.files(), exclude=exclude)
            if changed is not None:
                listing = _only_changed(listing, changed)
            if changed is None or listing.files or any(listing.is_gone(Path(path)) for path in index.files()):
                yield _add_when_free(index, listing, stop_flag, options)
            changed = set()
            while not (changed or stop_flag.is_set):
                changed = watcher.changes()


class _Watcher:
    """The paths under directories and files that have changed. It watches from the start."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        try:
            from watchfiles import watch
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(describe_missing(error), name=error.name) from error

        known = [Path(os.path.abspath(path)) for path in paths]
        directories = {path for path in known if path.is_dir()}
        parents = {path.parent for path in known if not path.is_dir()}  # a file is watched by its name, not its inode
        self._options: dict[str, Any] = {"debounce": _DEBOUNCE_MS, "rust_timeout": _POLL_MS, "yield_on_timeout": True}
        self._options |= {"watch_filter": None, "ignore_permission_denied": True, "raise_interrupt": False}
        self._watch, self._stack = watch, ExitStack()
        self._started = [
            self._stack.enter_context(closing(self._watch(*where, recursive=recursive, **self._options)))
            for where, recursive in ((directories, True), (parents, False))
            if where
        ]

    def __enter__(self) -> _Watcher:
        for started in self._started:
            next(started)  # the first changes, after which others wait to be asked for
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def changes(self) -> set[Path]:
        """Wait a moment, and return what changed since it was asked last."""
        return {Path(path) for started in self._started for _, path in next(started, ())}


def _only_changed(listing: FileListing, changed: set[Path]) -> FileListing:
    """Leave out files that lie under no changed path, unless a change may bear on any of them."""
    if any(path.name == ".gitignore" for path in changed):
        return listing
    return replace(listing, files=tuple(f for f in listing.files if not changed.isdisjoint((f, *f.parents))))


def _add_when_free(index: GemIndex, listing: FileListing, stop_flag: StopFlag, options: dict[str, Any]) -> IndexReport:
    """Index files as soon as no other process writes to the store."""
    while True:
        try:
            return index.add(listing, **options)
        except StoreLockedError:
            if stop_flag.is_set:
                raise
            time.sleep(_POLL_MS / 1000)
