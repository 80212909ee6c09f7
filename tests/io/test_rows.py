"""One reader of rows: every format, compression and byte-order mark gives the same rows; each error is one line."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemify.io.rows import (
    NOT_UTF8,
    ROW_SUFFIXES,
    find_row_file,
    has_row_suffix,
    load_lines,
    load_rows,
    read_rows,
    read_values,
    require_text,
    row_format,
    row_id,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
ROWS = st.lists(st.fixed_dictionaries({"_id": TEXTS, "text": TEXTS}), min_size=1, max_size=12)
FORMATS = ("jsonl", "ndjson", "json", "lines.json", "csv", "tsv")


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return bytes(pa.compress(content, codec="zstd", asbytes=True)) if suffix == ".zst" else content


def encode(rows: list[dict[str, Any]], kind: str, newline: str) -> bytes:
    """Rows as other writers write them."""
    if kind in ("csv", "tsv"):
        out = io.StringIO()
        writer = csv.DictWriter(
            out,
            rows[0],
            delimiter="\t" if kind == "tsv" else ",",
            lineterminator=newline,
            quoting=csv.QUOTE_ALL,  # Python before 3.13 writes a lone \r bare
        )
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    if kind == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False).replace("\n", newline).encode()
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode()


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, newline=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_every_format_gives_its_rows_back(
    tmp_path: Path, kind: str, packed: str, rows: list[dict[str, Any]], newline: str, mark: bool
) -> None:
    path = tmp_path / f"a.{kind}{packed}"
    path.write_bytes(pack((codecs.BOM_UTF8 if mark else b"") + encode(rows, kind, newline), packed))
    found = list(read_rows(path))
    assert [row.parse() for row in found] == rows
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    assert [where for where, _ in read_values(path)] == [f"{path} row {n}" for n in range(1, len(rows) + 1)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_parquet_gives_its_rows_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=5)
    assert [values for _, values in read_values(tmp_path / "a.parquet")] == rows
    texts = [values for _, values in read_values(tmp_path / "a.parquet", columns=["text", "none"])]
    assert texts == [{"text": row["text"]} for row in rows]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=1), newline=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_text_is_a_row_a_line(tmp_path: Path, packed: str, texts: list[str], newline: str, mark: bool) -> None:
    lines = [text.replace("\n", " ").replace("\ufeff", " ").strip() for text in texts]
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(pack((codecs.BOM_UTF8 if mark else b"") + "".join(t + newline for t in lines).encode(), packed))
    assert [values for _, values in read_values(path, text_column="body")] == [{"body": line} for line in lines]
    assert load_lines(path) == [(number, line) for number, line in enumerate(lines, 1) if line]


def test_rows_of_differing_kinds_of_values(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"a": 1, "b": "é\\n"}\n\n  \n{"a": 2, "b": "\u2028", "c": []}')
    assert load_rows(good, {"a": int, "b": str}) == [{"a": 1, "b": "é\n"}, {"a": 2, "b": "\u2028", "c": []}]
    assert load_rows(good, {"a": (str, int)}) == load_rows(good, {})
    (tmp_path / "a.csv").write_text("a,b,c\n1,2.5,x\n")
    assert load_rows(tmp_path / "a.csv", {"a": int, "b": (int, float), "c": str}) == [{"a": 1, "b": 2.5, "c": "x"}]
    (tmp_path / "l.txt").write_bytes(" one \n\n two\u2028three\r\n\t\nlast".encode())
    assert load_lines(tmp_path / "l.txt") == [(1, "one"), (3, "two\u2028three"), (5, "last")]
    assert row_id({"_id": True, "id": 7}) == "7"
    assert row_id({"_id": "\ud800"}) == "?"
    assert row_id({}) is None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 1', " row 2: not JSON: give one JSON object a line"),
        ("a.jsonl", b'\n\n{"a": 1}\n[1]\n', " row 4: expected a JSON object, got list"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xe9"}',
            f" row 2: {NOT_UTF8}",
        ),
        ("a.jsonl", b'{"a": 1}\n{"b": 1, "c": 2}\n', " row 2: no column 'a' (there are b, c)"),
        ("a.jsonl", b'{"a": 1.5}\n', " row 1: 'a' must be a whole number, got float"),
        ("a.jsonl", b'{"a": true}\n', " row 1: 'a' must be a whole number, got bool"),
        ("a.jsonl", "[]".encode("utf-16"), ": UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)"),
        ("a.json", "[]".encode("utf-16"), ": UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)"),
        ("a.csv", "a\n1\n".encode("utf-16"), ": UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)"),
        ("a.jsonl", b" \n", " holds no row"),
        ("a.json", b"[]", " holds no row"),
        ("a.json", b'[{"a": 1}, 2]', " row 2: expected a JSON object, got int"),
        ("a.json", b'[{"a": 1}, {"a": 1', " row 2: not JSON: mend the array of objects"),
        ("a.json", b'[{"a": 1} {"a": 2}]', " row 1: not JSON: mend the array of objects"),
        ("a.json", b'[{"a": 1}] x', " row 2: not JSON: mend the array of objects"),
        (
            "a.json",
            b'[{"a": 1}, {"a": "\xe9"}]',
            f" row 1: {NOT_UTF8}",
        ),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", " row 2: expected 2 fields as in the header, got 3"),
        ("a.csv", b'a,b\n1,"2" x\n', " row 1: not CSV (',' expected after '\"'): mend its quotes"),
        ("a.tsv", b'a\tb\n1\t"2\n', " row 1: not TSV (unexpected end of data): mend its quotes"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", f" row 2: {NOT_UTF8}"),
        ("a.csv", b"a,b\n1,2\n3,\0\n", " row 2: not UTF-8 text (a binary file?): give text"),
        ("a.csv", b"a,a\n1,2\n", " header: two columns of one name in a, a: rename one"),
        ("a.parquet", b"PAR1 nonsense", ": not readable as Parquet: "),
        ("a.jsonl.gz", b"nonsense", ": a damaged .gz file (Not a gzipped file (b'no')): restore it"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], ": a damaged .gz file ("),
        (
            "a.jsonl.zst",
            b"nonsense",
            ": a damaged .zst file (ZSTD decompress failed: Unknown frame descriptor): restore",
        ),
        ("a.jsonl.zst", pack(b'{"a": 1}\n' * 99, ".zst")[:-5], ": a damaged .zst file (Truncated compressed stream)"),
    ],
)
def test_each_error_names_file_and_row(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = complaint(lambda: load_rows(tmp_path / name, {"a": int}))
    assert said.startswith(f"{tmp_path / name}{reason}")


def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    for content, reason in (
        (b"caf\xe9", "row 1: not UTF-8 text: convert"),
        (b"a\n\0", "row 2: not UTF-8 text (a binary"),
    ):
        (tmp_path / "a.txt").write_bytes(content)
        assert complaint(lambda: load_lines(tmp_path / "a.txt")).startswith(f"{tmp_path / 'a.txt'} {reason}")
    assert complaint(lambda: load_lines(tmp_path / "no.txt")) == f"no such data file: {tmp_path / 'no.txt'}"
    assert complaint(lambda: load_rows(tmp_path, {})) == f"no such data file: {tmp_path}"
    assert complaint(lambda: require_text({"b": 1}, "a")) == "no column 'a' (there are b): set --text-column"
    assert complaint(lambda: require_text({"a": None}, "a")) == "'a' must be text, got NoneType"


def test_zst_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(pack(b'{"a": 1}\n', ".zst"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'gemify[rag]'" in complaint(lambda: load_rows(tmp_path / "a.jsonl.zst", {}))


def test_names_tell_formats(tmp_path: Path) -> None:
    for name, wanted in (
        ("a.JSONL.gz", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.tsv.zst", "tsv"),
        ("a.md", "text"),
        ("a", "text"),
    ):
        assert row_format(name) == wanted
    assert has_row_suffix("x/a.csv.gz")
    assert not has_row_suffix("x/a.csv.bz2")
    assert find_row_file(tmp_path, "corpus") is None
    for suffix in ROW_SUFFIXES[::-1]:
        (tmp_path / f"corpus{suffix}.zst").touch()
        assert find_row_file(tmp_path, "corpus") == tmp_path / f"corpus{suffix}.zst"


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "csv", "txt"])
def test_large_files_are_read_in_flat_memory(tmp_path: Path, kind: str) -> None:
    rows = [{"_id": str(n), "text": f"row {n} " * 40} for n in range(30_000)]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(pack(encode(rows, kind.partition(".")[0], "\n"), path.suffix))
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_values(path)) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6, f"{peak:,} bytes"


def test_progress_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 99_999))
    told: list[int] = []
    assert sum(1 for _ in read_rows(path, on_progress=told.append)) == 99_999
    assert 0.9 * path.stat().st_size < sum(told) <= path.stat().st_size


def complaint(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
