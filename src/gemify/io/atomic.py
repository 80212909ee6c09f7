"""Writing without half-written results: everything is staged beside its target and moved into place when complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_directory(target: Path, *, last: str) -> Iterator[Path]:
    """A staging directory that becomes ``target`` when the block ends well, and vanishes when it does not.

    A target that does not exist or is empty appears in one rename. Into an existing one the files are moved one by one,
    ``last`` (the file that makes it loadable) at the end; what else lies there stays.
    """
    target = target.absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot save to {target}: it is a file, give a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        try:
            yield stage
        except SafetensorError as error:  # what a full disk looks like through safetensors
            raise OSError(f"cannot write {target}: {error}") from error
        for path in stage.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes files only the owner may read
                sync(path)
        stage.chmod(0o777 & ~_umask())
        try:
            os.replace(stage, target)
        except OSError:  # the target holds files, perhaps another process's and since a moment ago
            if not target.is_dir():
                raise
            for path in sorted(stage.iterdir(), key=lambda p: p.name == last):
                if path.is_dir() and (target / path.name).is_dir():
                    shutil.rmtree(target / path.name)
                os.replace(path, target / path.name)
        sync(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path to write to, moved to ``target`` when the block ends well, deleted when it does not."""
    target = target.absolute()
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a directory, give a file name")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield stage
        sync(stage)
        os.replace(stage, target)
    finally:
        stage.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
