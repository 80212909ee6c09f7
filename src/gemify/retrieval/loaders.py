"""Files -> sections of text with their headings and places. Which files there are, and which reader each kind gets.

The formats with a structure of their own are read in `documents.py`.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

from gemify.io.rows import (
    COMPRESSIONS,
    Row,
    decompress,
    has_column,
    optional_text,
    read_rows,
    readable,
    readable_parquet,
    require_text,
    row_id,
)
from gemify.retrieval import office
from gemify.retrieval.documents import Section, Skipped, decode_utf8, read_docx, read_html, read_markdown
from gemify.retrieval.metadata import Value, to_metadata
from gemify.retrieval.pdf import read_pdf

READING_VERSION = 5
"""Counted up when a reader changes what it yields: files read by an older one are then read again."""

_SOURCE = (
    ".py .pyi .js .jsx .mjs .ts .tsx .java .kt .scala .c .h .cc .cpp .hpp .cs .go .rs .rb .php .pl .lua .r .jl .swift"
    " .m .sh .bash .ps1 .sql .yaml .yml .toml .json .ini .cfg .conf .xml .css .scss .tex .proto .csv .tsv"
)
_PLAIN = frozenset([".txt", ".text", ".log", ".rst", ".org", *_SOURCE.split()])
_NAMES = frozenset(["README", "LICENSE", "NOTICE", "AUTHORS", "CHANGELOG", "CONTRIBUTING", "Makefile", "Dockerfile"])
_WHOLE: dict[str, Callable[[Path], Iterator[Section | Skipped]]] = {
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
    **office.READERS,
}
_ROWS = frozenset([".jsonl", ".ndjson", ".parquet"])
_MAYBE_ROWS = frozenset([".csv", ".tsv", ".json"])
SUFFIXES = _PLAIN | _ROWS | _WHOLE.keys()
"""Of the kinds of files that are read."""
_PIECE = 1 << 20
"""Bytes of a plain text after which a section ends, at the next line if it is near: memory stays flat."""
_PACKAGES = frozenset(["node_modules", "__pycache__", "site-packages", "bower_components"])
"""Directories that hold what others wrote."""
_TABLE_ROWS = 25  # in a section
_BROKEN_ROWS = 10  # of a file that are named one by one


@dataclass(frozen=True)
class Columns:
    """The columns of a file of rows that hold text and title."""

    text: str = "text"
    title: str = "title"


@dataclass(frozen=True)
class FileListing:
    """Files to index, and what could not be listed."""

    files: tuple[Path, ...]
    """Every file to read: absolute, sorted, each once."""
    directories: tuple[Path, ...]
    """Those that were asked for, and files that are no more: what is known from one of them and not found is gone."""
    skipped: tuple[Skipped, ...]
    """Directories that could not be listed: nothing is known about what lies in them."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """How many files were passed by, by what they are: a suffix, ``excluded`` or ``linked directories``."""

    @functools.cached_property
    def _known(self) -> frozenset[Path]:
        return frozenset(self.files)

    def is_gone(self, path: Path) -> bool:
        """Whether a file seen in an earlier search is no longer there."""
        if path in self._known or not any(path.is_relative_to(d) for d in self.directories):
            return False
        if os.path.isfile(path):  # of no known kind, or hidden: it was named itself
            return False
        return not any(path.is_relative_to(s.path) for s in self.skipped)


def find_files(paths: Sequence[str | Path], *, known: Container[str] = (), exclude: Sequence[str] = ()) -> FileListing:
    """The files behind paths: a file as it is, a directory with all it holds of known kinds, hidden ones left out.

    What matches a pattern of ``exclude`` (of names, or of paths from the directory that was given), what .gitignore
    files name, and directories that packages fill (node_modules) are left out and counted, as are kinds that are not
    read and links to directories. The tables of a store that lies among the documents are left out too. Raises
    ValueError for a path that does not exist, unless it is one of the files ``known`` from an earlier search: that one
    is gone. (A directory may be missing because its disk is.)
    """
    if not paths:
        raise ValueError("no path given: give files or directories to index")
    files: set[Path] = set()
    directories: list[Path] = []
    skipped: list[Skipped] = []
    unread: Counter[str] = Counter()
    for given in paths:
        path = Path(os.path.abspath(given))
        if path.is_dir():
            directories.append(path)
            files.update(_walk(path, skipped, unread, exclude))
        elif path.is_file():
            files.add(path)
        elif str(path) in known:
            directories.append(path)
        else:
            raise ValueError(f"no such file or directory: {given}")
    return FileListing(tuple(sorted(files)), tuple(directories), tuple(skipped), dict(unread.most_common()))


def _walk(root: Path, skipped: list[Skipped], unread: Counter[str], exclude: Sequence[str]) -> Iterator[Path]:
    ignored = [(root, pattern) for pattern in exclude]

    def refuse(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot list the directory ({error.strerror}): allow it"))

    for directory, inner, names in os.walk(root, onerror=refuse):
        here = Path(directory)
        if ".gitignore" in names:
            ignored += [(here, pattern) for pattern in _gitignore(here / ".gitignore")]
        seen = sorted(n for n in inner if not n.startswith(".") and not n.endswith(".lance"))
        inner[:] = [n for n in seen if n not in _PACKAGES and not _is_excluded(here / n, ignored, is_dir=True)]
        unread["excluded"] += len(seen) - len(inner)
        unread["linked directories"] += sum((here / n).is_symlink() for n in inner)
        for name in sorted(n for n in names if not n.startswith(".")):
            path = here / name
            if _is_excluded(path, ignored, is_dir=False):
                unread["excluded"] += 1
            elif _kind(path) is None:
                unread[path.suffix.lower() or "no suffix"] += 1
            elif path.is_file() or path.is_symlink():
                yield path
    for name in [name for name, count in unread.items() if not count]:
        del unread[name]


def _gitignore(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _is_excluded(path: Path, ignored: Sequence[tuple[Path, str]], *, is_dir: bool) -> bool:
    """Whether a pattern names a file or directory: by its name, or with a slash by its path from where it was given.

    The last pattern that fits decides; ``!`` takes a file back.
    """
    excluded = False
    for root, given in ignored:
        pattern = normalize("NFC", given.removeprefix("!").rstrip("/"))
        if (given.endswith("/") and not is_dir) or not path.is_relative_to(root):
            continue
        parts = normalize("NFC", path.relative_to(root).as_posix()).split("/")
        wanted = pattern.lstrip("/").split("/") if "/" in pattern else ["**", pattern]
        if _fits(parts, wanted):
            excluded = not given.startswith("!")
    return excluded


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a path's names fit those of a pattern, in which ``**`` stands for any number of names."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return _fits(parts, wanted[1:]) or (bool(parts) and _fits(parts[1:], wanted))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def file_kind(path: Path) -> str:
    """The suffix that says what a file is, without that of a compression; "" if it has none."""
    return _kind(path) or path.suffix.lower()


def _kind(path: Path) -> str | None:
    """The suffix that decides on a file's reader, or None: a kind that is not read."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
    suffix = Path(name).suffix.lower()
    if suffix in _PLAIN or suffix in _ROWS:
        return suffix
    if path.suffix.lower() in _WHOLE:
        return path.suffix.lower()
    return ".txt" if path.name in _NAMES else None


def content_hash(path: Path, columns: Columns, meta: Mapping[str, Value] | None = None) -> str:
    """SHA-256 of a file's bytes, of how they are read, and of the metadata they are given. Raises OSError."""
    how: list[Any] = [READING_VERSION]
    how += (columns.text, columns.title) if _kind(path) in _ROWS | _MAYBE_ROWS else ()
    how += [sorted(meta.items())] if meta else []
    digest = hashlib.sha256(json.dumps(how, default=str).encode())
    with path.open("rb") as file:
        while block := file.read(_PIECE):
            digest.update(block)
    return digest.hexdigest()


def read_file(path: Path, columns: Columns, *, ocr: bool = False) -> Iterator[Section | Skipped]:
    """Read the sections of a file, in order.

    Args:
        path: A file of any kind; one of no known kind is read as text.
        columns: Columns of files of rows.
        ocr: Whether pages of PDF files without text are recognized.

    Yields:
        Sections, and parts of the file that cannot be read.

    Raises:
        ValueError: The file as a whole cannot be read. One line, without the path.
    """
    reader = _WHOLE.get(_kind(path) or "")
    try:
        with readable(path):
            if reader is not None:
                yield from read_pdf(path, ocr=ocr) if reader is read_pdf else reader(path)
            elif _holds_rows(path, columns):
                yield from _read_rows(path, columns)
            elif _kind(path) in (".csv", ".tsv") and _has_column_names(path):
                yield from _read_table(path)
            else:  # a file of no known kind was named by the user: it may be text
                yield from _read_plain(path)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")) from error
    except OSError as error:
        raise ValueError(
            f"cannot be read ({error.strerror or type(error).__name__}): allow it or restore it"
        ) from error


def _read_plain(path: Path) -> Iterator[Section]:
    first_line = 1
    with path.open("rb") as compressed:
        file = decompress(compressed, path)
        while raw := file.read(_PIECE):
            raw += file.readline(_PIECE)
            for _ in range(3):  # a line that goes on is cut between characters
                if (ahead := file.peek(1)[:1]) and 0x80 <= ahead[0] < 0xC0:
                    raw += file.read(1)
            yield Section(decode_utf8(raw, first_line), unit="line", first=first_line)
            first_line += raw.count(b"\n")


def _holds_rows(path: Path, columns: Columns) -> bool:
    """Whether a table or array has the text column; others of these kinds are indexed as plain text."""
    kind = _kind(path)
    if kind in _ROWS:
        return True
    if kind not in _MAYBE_ROWS:
        return False
    try:
        first = next(read_rows(path), None)
        return first is not None and has_column(first.parse(), columns.text)
    except ValueError:
        return False


def _has_column_names(path: Path) -> bool:
    """Whether the first line of a table names its columns: several, and none is empty or a number."""
    try:
        first = next(read_rows(path), None)
        names = [] if first is None else list(first.parse())
    except ValueError:
        return False
    return len(names) > 1 and not any(re.fullmatch(r"[\d\s.,%+-]*", name) for name in names)


def _read_table(path: Path) -> Iterator[Section | Skipped]:
    """A table without the text column: a line a row, with its columns' names; some rows are a section."""
    lines: list[str] = []
    last = 0
    for item in _read_each(path, (), _named_values):
        if isinstance(item, Skipped):
            yield item
            continue
        number, line = item
        if lines and (number != last + 1 or len(lines) == _TABLE_ROWS):
            yield Section("\n".join(lines), unit="row", first=last - len(lines) + 1)
            lines = []
        lines.append(line)
        last = number
    yield Section("\n".join(lines), unit="row", first=last - len(lines) + 1)


def _named_values(row: Row) -> tuple[int, str]:
    try:
        values = row.parse()
    except ValueError:  # too many or too few fields: the record as it stands behind the header
        text = decode_utf8(row.raw, 2).partition("\n")[2]
        return row.number, " ".join(text.split())
    said = ((name, " ".join(value.split())) for name, value in values.items())
    return row.number, " | ".join(f"{name}: {value}" for name, value in said if value)


def _read_rows(path: Path, columns: Columns) -> Iterator[Section | Skipped]:
    wanted = _columns_to_read(path, columns)
    return _read_each(path, wanted, lambda row: _section(row.parse(), row.number, columns))


def _read_each(path: Path, columns: Sequence[str], read: Callable[[Row], Any]) -> Iterator[Any]:
    """What is read of each row; those that cannot be read are named, up to some."""
    broken = 0
    for row in read_rows(path, columns=columns):
        try:
            yield read(row)
        except ValueError as error:
            broken += 1
            if broken <= _BROKEN_ROWS:
                yield Skipped(str(path), f"row {row.number}: {error}")
    if broken > _BROKEN_ROWS:
        yield Skipped(str(path), f"{broken - _BROKEN_ROWS:,} more rows cannot be read")


def _columns_to_read(path: Path, columns: Columns) -> tuple[str, ...]:
    """Columns of a Parquet file that are text, title, id, or can be metadata: no vectors, no pictures."""
    if _kind(path) != ".parquet":
        return ()
    import pyarrow.parquet as pq
    from pyarrow import types

    with readable_parquet(str(path)):
        schema = pq.read_schema(path)
    short = [f.name for f in schema if not (types.is_nested(f.type) or types.is_binary(f.type))]
    return (columns.text, columns.title, "_id", "id", *short)


def _section(row: dict[str, Any], number: int, columns: Columns) -> Section:
    text, title = require_text(row, columns.text), optional_text(row, columns.title)
    rest = {name: value for name, value in row.items() if name not in (columns.text, columns.title, "_id", "id")}
    return Section(text, title=title, unit="row", name=row_id(row) or str(number), meta=to_metadata(rest))
