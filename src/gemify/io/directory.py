"""A directory on a disk or in an object store, for the small files of a run. A file is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gemify.io.atomic import atomic_file


class Directory:
    """A directory at a path or at a URI that pyarrow takes (``s3://bucket/path``)."""

    def __init__(self, uri: str | Path) -> None:
        from pyarrow.fs import FileSystem

        self.uri = resolve_uri(uri)
        self.local = not is_remote(self.uri)
        try:
            self.files, self.path = FileSystem.from_uri(self.uri)
        except ValueError as error:
            raise ValueError(
                f"{self.uri} cannot be written to ({error_reason(error)}): give a directory, or a URI such as s3://bucket/path"
            ) from error

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if there is none."""
        try:
            with self.files.open_input_file(f"{self.path}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file in one step."""
        with self.stage(name) as stage, self.files.open_output_stream(stage) as file:
            file.write(content)

    def write_if_absent(self, name: str, content: bytes) -> bool:
        """Write a file in one step, unless there is one.

        A disk without hard links does it under a lock, which is as good as the disk's locks are between machines. An
        object store has no lock: two writers in the same instant may both get True, and the last one's content stays.

        Args:
            name: The file's name.
            content: Its bytes.

        Returns:
            Whether this call wrote the file.
        """
        if not self.local:
            return self._write_after_check(name, content)
        try:
            self._link(Path(self.path, name), content)
            return True
        except FileExistsError:
            return False
        except OSError:  # each such disk has its own word for it
            from filelock import FileLock

            with FileLock(Path(self.path, ".first.lock")):
                return self._write_after_check(name, content)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[str]:
        """Yield a path to write to, which becomes the file when the block ends well."""
        if not self.local:  # object stores show a file when it is whole
            yield f"{self.path}/{name}"
            return
        with atomic_file(Path(self.path, name)) as stage:
            yield str(stage)

    def list_names(self, directory: str) -> list[str]:
        """Return the sorted names of the files in a directory, without hidden ones, which are unfinished."""
        from pyarrow.fs import FileSelector

        wanted = FileSelector(f"{self.path}/{directory}".rstrip("/"), allow_not_found=True)
        found: list[Any] = [f for f in self.files.get_file_info(wanted) if f.is_file]
        return sorted(f.base_name for f in found if not f.base_name.startswith("."))

    def _write_after_check(self, name: str, content: bytes) -> bool:
        if self.read(name) is not None:
            return False
        self.write(name, content)
        return True

    @staticmethod
    def _link(target: Path, content: bytes) -> None:
        whole = target.with_name(f".{target.name}.{os.getpid()}.whole")
        try:
            with atomic_file(whole) as stage:
                stage.write_bytes(content)
            os.link(whole, target)  # other than a rename, refused where there is a file
        finally:
            whole.unlink(missing_ok=True)


def is_remote(uri: str) -> bool:
    """Return whether a URI names an object store."""
    return "://" in uri


def resolve_uri(uri: str | Path) -> str:
    """Return a URI as it is, and a path or a file:// URI as an absolute path."""
    if str(uri).startswith("file://"):
        return url2pathname(urlsplit(str(uri)).path)
    return str(uri) if is_remote(str(uri)) else os.path.abspath(uri)


def relative_to(path: str, root: str) -> str:
    """Return the path below a directory of what lies in it, and any other path as it is.

    Args:
        path: An absolute path.
        root: The directory; "" for none.
    """
    inner = path.removeprefix(root.rstrip(os.sep) + os.sep) if root else ""
    return inner if inner and not os.path.isabs(inner) else path


def error_reason(error: BaseException) -> str:
    """Return an error's reason in one line, without positions in Lance's sources."""
    if message := re.search("<Message>(.+?)</Message>", str(error)):  # an object store's XML
        return message[1]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.removeprefix("lance error: ").removeprefix("LanceError(IO): ").split(", /")[0][:200]


def is_disk_full(error: BaseException) -> bool:
    """Return whether a full disk caused an error. Lance's errors have no number, so the text decides."""
    return os.strerror(errno.ENOSPC) in str(error)
