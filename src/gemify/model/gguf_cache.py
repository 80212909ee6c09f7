"""GGUF files as plain Hugging Face directories in a cache: reading a GGUF's metadata takes seconds, a directory's none.

    $GEMIFY_HOME, or $XDG_CACHE_HOME/gemify, or ~/.cache/gemify
        gguf/<hash of the file>-<version of transformers>/    config.json, model.safetensors (float32), ...

An entry appears in one rename, so any number of processes may make the same one, and a killed one leaves only a part
that is removed later. The most recently used `MAX_ENTRIES` of at most `MAX_BYTES` in all are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemify.io.atomic import atomic_directory

MAX_ENTRIES = 3
MAX_BYTES = 5_000_000_000
MAX_GGUF_BYTES = 400_000_000
"""Larger files are not converted: in float32 they take a multiple of that."""
_STALE_SECONDS = 3600.0
_HASH_LENGTH = 24


@dataclass(frozen=True)
class CacheEntry:
    """A converted GGUF file."""

    path: Path
    size_bytes: int
    used: float
    """When it was last used, in seconds since the epoch."""


def cache_directory() -> Path:
    """Where converted models are kept, by the environment."""
    if home := os.environ.get("GEMIFY_HOME"):
        return Path(home) / "gguf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemify" / "gguf"


def entry_path(gguf: Path) -> Path:
    """Where the conversion of a GGUF file is kept. Reads the whole file for its hash."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:_HASH_LENGTH]
    return cache_directory() / f"{digest}-{importlib.metadata.version('transformers')}"


def open_entry(path: Path) -> bool:
    """Whether a conversion is there; marks it as used."""
    if not (path / "config.json").is_file():
        return False
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(path)
    return True


def store_entry(path: Path, save: Callable[[Path], None]) -> bool:
    """Write a conversion and remove the least recently used ones.

    Args:
        path: Of `entry_path`.
        save: Writes the model and the tokenizer into a directory.

    Returns:
        Whether it is there; False if the cache cannot be written.
    """
    try:
        with atomic_directory(path, last="config.json") as stage:
            save(stage)
    except OSError:
        return False
    evict(keep=path)
    return path.is_dir()


def list_entries() -> list[CacheEntry]:
    """All conversions, the most recently used first."""
    entries = []
    for path in _directories():
        with contextlib.suppress(OSError):  # removed by another process
            size = sum(file.stat().st_size for file in path.iterdir())
            entries.append(CacheEntry(path, size, path.stat().st_mtime))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def evict(keep: Path | None = None) -> None:
    """Remove conversions beyond the limits, and what killed processes left."""
    total = 0
    for number, entry in enumerate(entry for entry in list_entries() if not _is_part(entry.path)):
        total += entry.size_bytes
        if (number >= MAX_ENTRIES or total > MAX_BYTES) and entry.path != keep:
            _remove(entry.path)
    for path in _directories():
        with contextlib.suppress(OSError):
            if _is_part(path) and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                _remove(path)


def clear() -> int:
    """Remove all conversions. Gives the bytes that this freed."""
    entries = list_entries()
    for entry in entries:
        _remove(entry.path)
    return sum(entry.size_bytes for entry in entries)


def _directories() -> list[Path]:
    try:
        return [path for path in cache_directory().iterdir() if path.is_dir()]
    except OSError:
        return []


def _is_part(path: Path) -> bool:
    return path.name.startswith(".")


def _remove(path: Path) -> None:
    """In one rename and then file by file, so that no process finds half an entry."""
    part = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        os.replace(path, part)
        shutil.rmtree(part, ignore_errors=True)
