"""Rows of files, read as a stream: the one reader that training, indexing, evaluation and the command share.

    .jsonl .ndjson   a JSON object a line
    .json            an array of JSON objects, or an object a line
    .csv .tsv        a header, then a record a row; a quoted field may hold line ends, and quotes written twice; a .csv
                     file may have semicolons or tabs in place of commas
    .parquet         a table
    .txt and others  text, a row a line

All but Parquet may be compressed (``.gz``, ``.zst``) and begin with a UTF-8 byte-order mark. Rows are numbered from 1,
those of JSON and text by their line, others by their order. Errors are ``FILE: reason`` or ``FILE row 7: reason``.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

from gemify.io.json_array import array_elements
from gemify.io.tables import first_line

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "text"]
COMPRESSIONS = (".gz", ".zst")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_UTF8 = "not UTF-8 text: convert the file (such as iconv -f cp1252 -t utf-8)"
_MAX_FIELD_CHARACTERS = 1 << 26  # of CSV: a quote that is never closed must not read the whole file into memory
PARQUET_BATCH_ROWS = 512
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", list: "a list"}


class Row(NamedTuple):
    """A row as it stands in its file."""

    number: int
    """Counted from 1."""
    raw: bytes
    """The row's bytes, those of a CSV record with its header. Empty for Parquet."""
    parse: Callable[[], dict[str, Any]]
    """The row's values by column. Raises ValueError, without file and row, for a row that is malformed."""


def row_format(path: str | Path) -> Format:
    """The format of a file by its name; ``json`` for every ``.json`` file."""
    suffix = Path(_uncompressed(str(path))).suffix.lower().removeprefix(".")
    name = "jsonl" if suffix == "ndjson" else suffix
    return name if name in get_args(Format) else "text"  # type: ignore[return-value]


def has_row_suffix(path: str | Path, suffixes: Sequence[str] = ROW_SUFFIXES) -> bool:
    """Whether a file's name ends in one of the suffixes, but for that of a compression."""
    return _uncompressed(str(path)).lower().endswith(tuple(suffixes))


def find_row_file(directory: Path, stem: str) -> Path | None:
    """The file of rows with this name but for its suffixes, such as ``corpus.jsonl.gz``, or None."""
    names = (f"{stem}{suffix}{packed}" for suffix in ROW_SUFFIXES for packed in ("", *COMPRESSIONS))
    return next((directory / name for name in names if (directory / name).is_file()), None)


def read_rows(
    path: str | Path,
    *,
    text_column: str = "text",
    columns: Sequence[str] = (),
    format: Format | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Iterator[Row]:
    """Read the rows of a file as a stream. Blank lines are rows of text alone.

    Args:
        path: A file in one of the formats of this module.
        text_column: The column of a text file's lines.
        columns: Columns to decode of a Parquet file that has any of them. All if none is given.
        format: The format. By default the name's.
        on_progress: A function called with the number of bytes (compressed, not of Parquet) read since its last call.

    Yields:
        Rows in the order of the file.

    Raises:
        ValueError: There is no such file, or it is damaged, or not of its format. One line that begins with the path.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such data file: {path}")
    if (format or row_format(path)) == "parquet":
        yield from _parquet_rows(str(path), columns)
        return
    with open(path, "rb") as raw, readable(path):
        stream, reported = decompress(raw, path), 0
        for row in _stream_rows(stream, path, format or detect_format(path), text_column):
            yield row
            if on_progress is not None and (position := raw.tell()) > reported:
                on_progress(position - reported)
                reported = position


def read_values(path: str | Path, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a file's rows as values, each with where it stands (``FILE row 7``).

    Takes the options of `read_rows`. Raises ValueError at the first row that is malformed.
    """
    for row in read_rows(path, **options):
        with _named(path, row):
            values = row.parse()
        yield f"{path} row {row.number}", values


@contextlib.contextmanager
def _named(path: str | Path, row: Row) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} row {row.number}: {error}") from error


def load_rows(path: Path, columns: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """All rows of a file, each with the given columns of the given types.

    Raises:
        ValueError: No such file, no row in it, or a row that lacks a column or has another type.
    """
    numeric = row_format(path) in ("csv", "tsv")
    rows = []
    for row in read_rows(path):
        with _named(path, row):
            values = row.parse()
            for name, kinds in columns.items():
                values[name] = _typed(values, name, kinds if isinstance(kinds, tuple) else (kinds,), numeric)
        rows.append(values)
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows


def load_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of a text file with their numbers, without surrounding white space; empty ones are left out."""
    lines = []
    for row in read_rows(path, format="text"):
        with _named(path, row):
            lines.append((row.number, row.parse()["text"]))
    return [(number, line) for number, line in lines if line]


def find_column(values: Mapping[str, Any], column: str) -> Any:
    """The value in a column, or at a dotted path (``translation.en``); through a list, the list of all its values.

    Raises ValueError where there is none.
    """
    if column in values:
        return values[column]
    head, _, rest = column.partition(".")
    inner = values.get(head) if rest else None
    with contextlib.suppress(ValueError):
        if isinstance(inner, Mapping):
            return find_column(inner, rest)
        if isinstance(inner, list) and inner and all(isinstance(item, Mapping) for item in inner):
            return [find_column(item, rest) for item in inner]
    raise ValueError(f"{missing_column(column, values)}: set --text-column")


def has_column(values: Mapping[str, Any], column: str) -> bool:
    """Whether a row has a column, or a value at a dotted path."""
    with contextlib.suppress(ValueError):
        find_column(values, column)
        return True
    return False


def require_text(values: Mapping[str, Any], column: str) -> str:
    """The text in a column, its lone surrogates replaced. Raises ValueError where there is none."""
    if not isinstance(text := find_column(values, column), str):
        raise ValueError(f"{column!r} must be text, got {type(text).__name__}")
    return replace_surrogates(text)


def optional_text(values: Mapping[str, Any], column: str) -> str:
    """The text in a column, or nothing."""
    found = find_column(values, column) if has_column(values, column) else None
    return replace_surrogates(found) if isinstance(found, str) else ""


def missing_column(column: str, there: Mapping[str, Any] | Sequence[str]) -> str:
    """The beginning of an error for a column that is not there."""
    return f"no column {column!r} (there are {on_one_line(sorted(there))})"


def on_one_line(names: Iterable[str]) -> str:
    """Names from a file as a part of an error."""
    return " ".join(replace_surrogates(", ".join(names)).split())


def row_id(values: Mapping[str, Any], columns: Sequence[str] = ("_id", "id")) -> str | None:
    """The text or whole number in the first of the columns that holds one, as text, or None."""
    for column in columns:
        value = values.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return replace_surrogates(str(value))
    return None


def replace_surrogates(text: str) -> str:
    """A text without lone surrogates (from JSON escapes or odd bytes), which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def detect_format(path: str | Path) -> Format:
    """The format of a file by its name and, for ``.json``, by its first character."""
    if (name := row_format(path)) != "json":
        return name
    with open(path, "rb") as raw, readable(path):
        stream = decompress(raw, path)
        start = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        while not start and (piece := stream.read(4096)):
            start = piece.lstrip()
    return "json" if start.startswith(b"[") else "jsonl"


def decompress(raw: BinaryIO, path: str | Path) -> io.BufferedReader:
    """The bytes of an open file, decompressed as its name says."""
    name = str(path).lower()
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if not name.endswith(".zst"):
        return raw  # type: ignore[return-value]
    try:
        import pyarrow as pa
    except ModuleNotFoundError:
        raise ValueError("reading .zst needs pyarrow: pip install 'gemify[rag]', or decompress it (zstd -d)") from None
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Say in one line that a file is damaged."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: a damaged .gz file ({error}): restore it") from error
    except OSError as error:
        if error.errno is not None or not str(path).lower().endswith(".zst"):
            raise
        raise ValueError(f"{path}: a damaged .zst file ({first_line(error)}): restore it") from error


@contextlib.contextmanager
def readable_parquet(path: str | Path) -> Iterator[None]:
    """Say in one line that a Parquet file is damaged."""
    from pyarrow.lib import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, not of the file
            raise
        raise ValueError(f"{path}: not readable as Parquet: {first_line(error)}") from error


def _uncompressed(name: str) -> str:
    return next((name[: -len(packed)] for packed in COMPRESSIONS if name.lower().endswith(packed)), name)


def _typed(values: Mapping[str, Any], name: str, kinds: tuple[type, ...], numeric: bool) -> Any:
    """A value of one of the types; in a file that holds text alone, a number may stand as text."""
    if name not in values:
        raise ValueError(missing_column(name, values))
    value = values[name]
    if numeric and str not in kinds:
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(value)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(_TYPE_NAMES[k] for k in kinds if not (k is int and float in kinds))
        raise ValueError(f"{name!r} must be {wanted}, got {type(value).__name__}")
    return value


def _stream_rows(stream: io.BufferedReader, path: str | Path, format: Format, text_column: str) -> Iterator[Row]:
    if format == "json":
        return _array_rows(stream, path)
    if format in ("csv", "tsv"):
        return _table_rows(stream, path, "\t" if format == "tsv" else ",")
    rows = (line_row(number, line, path, text_column, format) for number, line in enumerate(stream, start=1))
    return (row for row in rows if row is not None)


def line_row(number: int, line: bytes, path: str | Path, text_column: str, format: Format) -> Row | None:
    """The row that a line of JSON or text is, or None for a blank line of JSON."""
    if number == 1:
        line = _without_mark(line, path)
    if format == "text":
        return Row(number, line, lambda: {text_column: _decode(line).strip()})
    return Row(number, line, partial(_parse_json, line)) if line.strip() else None


def _without_mark(line: bytes, path: str | Path) -> bytes:
    """A file's first line without its byte-order mark."""
    if line.startswith(_UTF16):
        raise ValueError(f"{path}: UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)")
    return line.removeprefix(codecs.BOM_UTF8)


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8) from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON: give one JSON object a line") from None
    return _require_object(value)


def _require_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise ValueError("not UTF-8 text (a binary file?): give text")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8) from None


def _table_rows(stream: io.BufferedReader, path: str | Path, delimiter: str) -> Iterator[Row]:
    """Records of a CSV or TSV file. The reader takes as many lines as a record has."""
    read: list[bytes] = []

    def texts() -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            read.append(line if number > 1 else _without_mark(line, path))
            yield read[-1].decode("utf-8", "surrogateescape")

    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    lines = texts()
    first, delimiter = _first_line(lines, delimiter)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header, begin, number = list[str](), b"", 0
    while True:
        try:
            fields, reason = next(reader), ""
        except StopIteration:
            return
        except csv.Error as error:
            fields, reason = [""], f"not {'TSV' if delimiter == chr(9) else 'CSV'} ({error}): mend its quotes"
        raw = b"".join(read)
        read.clear()
        if not header:
            if reason or fields:
                header, begin = [name.strip() for name in fields], raw
                _check_header(path, raw, header, reason)
        elif fields:
            number += 1
            fields = [delimiter.join(fields)] if len(header) == 1 else fields
            yield Row(number, begin + raw, partial(_parse_record, raw, header, fields, reason))


def _first_line(lines: Iterator[str], delimiter: str) -> tuple[str, str]:
    """The header, and the delimiter that it, or Excel's line above it, shows."""
    first = next(lines, "")
    if first.startswith(("sep=", '"sep=')):
        return next(lines, ""), first.strip('"\r\n')[4:5] or delimiter
    others = (other for other in ";\t" if other in first)  # Excel's where a comma stands in numbers
    return first, delimiter if delimiter in first else next(others, delimiter)


def _check_header(path: str | Path, raw: bytes, header: list[str], reason: str) -> None:
    try:
        _decode(raw)
        if reason:
            raise ValueError(reason)
        if len(set(header)) < len(header):
            raise ValueError(f"two columns of one name in {on_one_line(header)}: rename one")
    except ValueError as error:
        raise ValueError(f"{path} header: {error}") from None


def _parse_record(raw: bytes, header: list[str], fields: list[str], reason: str) -> dict[str, str]:
    _decode(raw)
    if reason:
        raise ValueError(reason)
    if len(fields) != len(header):
        raise ValueError(f"expected {len(header)} fields as in the header, got {len(fields)}")
    return dict(zip(header, fields, strict=True))


def _array_rows(stream: io.BufferedReader, path: str | Path) -> Iterator[Row]:
    """Elements of a JSON array, with one piece of the text in memory."""
    number = 0
    try:
        for number, (text, value) in enumerate(array_elements(io.TextIOWrapper(stream, "utf-8-sig", newline="")), 1):
            yield Row(number, text.encode(), partial(_require_object, value))
    except UnicodeDecodeError:
        raise ValueError(f"{path} row {number + 1}: {NOT_UTF8}") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path} row {number + 1}: not JSON: mend the array of objects") from None


def parquet_columns(path: str | Path) -> list[str]:
    """The names of a Parquet file's columns. Raises ValueError if it is damaged."""
    import pyarrow.parquet as pq

    with readable_parquet(path):
        return list(pq.read_schema(path).names)


def known_columns(there: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of the columns that are there, of a dotted one the column that it begins in."""
    found = (next((n for n in (column, column.partition(".")[0]) if n in there), None) for column in columns)
    return list(dict.fromkeys(name for name in found if name is not None))


def _parquet_rows(path: str, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with readable_parquet(path), pq.ParquetFile(path, pre_buffer=False) as file:
        known = known_columns(file.schema_arrow.names, columns)
        batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=known or None)
        for number, row in enumerate((row for batch in batches for row in parquet_batch_rows(batch)), start=1):
            yield row._replace(number=number)


def parquet_batch_rows(batch: Any) -> Iterator[Row]:
    """Rows of an Arrow batch, numbered 0; where one of them is not UTF-8, each is decoded by itself."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        yield from (Row(0, b"", partial(_parse_batch_row, batch.slice(at, 1))) for at in range(batch.num_rows))
        return
    yield from (Row(0, b"", partial(dict, row)) for row in values)


def _parse_batch_row(batch: Any) -> dict[str, Any]:
    try:
        return dict(batch.to_pylist()[0])
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8) from None
