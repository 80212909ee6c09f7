"""Training files as people have them: shapes, nested and list columns, unknown columns, malformed rows."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemify.training.examples import Example, Source
from gemify.training.recipe import Recipe
from gemify.training.trainer import train

PASSAGE = {"docid": "d", "title": "Owls", "text": "They hunt."}
TRIPLE = ("a", "p", "positive", ("n", "m"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "a", "positive": "p", "negative": "n"}, [("a", "p", "positive", ("n",))]),
        ({"anchor": "a", "positive": "p", "negative_1": "n", "negative_2": "m"}, [TRIPLE]),
        ({"query": "a", "positive": "p", "negative": "n"}, [("a", "p", "positive", ("n",))]),
        ({"query": "a", "positive": ["p"], "negatives": ["n", "m"]}, [TRIPLE]),
        ({"query": "a", "pos": ["p", "q"], "neg": ["n"]}, [("a", t, "positive", ("n",)) for t in "pq"]),
        ({"query": "a", "pos": ["p"], "neg": []}, [("a", "p", "positive", ())]),
        ({"query": "a", "positive": "p", "negative": None}, [("a", "p", "positive", ())]),
        (
            {"query_id": "7", "query": "a", "positive_passages": [PASSAGE], "negative_passages": [{"text": "n"}]},
            [("a", "Owls They hunt.", "positive", ("n",), "7")],
        ),
        ({"_id": 3, "anchor": "a", "positive": "p"}, [("a", "p", "positive", (), "3")]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_shapes_of_other_trainers(tmp_path: Path, row: dict[str, Any], expected: list[Any], kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if kind == "json" else row))
    assert list(Source(str(path))) == [Example(*values) for values in expected]


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.csv", "sep=;\r\ntext;id\r\nowls, larks;1\r\n", [Example("owls, larks", id="1")]),
        ("a.csv", '"sep=\t"\ntext\tid\nowls\t1\n', [Example("owls", id="1")]),
        ("a.csv", "id, text\n1,owls\n", [Example("owls", id="1")]),
        ("a.csv", 'text\nowls\nlarks, too\n"wrens, all"\n', [Example(t) for t in ("owls", "larks, too", "wrens, all")]),
        ("a.jsonl", '{"query": "q", "pos": ["p"], "neg": [null, "n"]}', [Example("q", "p", "positive", ("n",))]),
    ],
)
def test_tables_and_lists_as_programs_write_them(
    tmp_path: Path, name: str, raw: str, expected: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text(raw)
    assert list(Source(str(tmp_path / name))) == expected
    assert not caplog.messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "sentence2": "b"}, r"no column 'score' \(there are sentence1, sentence2\)"),
        ({"messages": []}, "a list of messages, got an empty one"),
        ({"Text": "a"}, r"no column 'text' \(there are Text\)"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, row: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        list(Source(str(tmp_path / "a.jsonl")))
    assert not caplog.messages


def test_triplets_of_tables(tmp_path: Path) -> None:
    for name, mark in (("a.csv", ","), ("b.tsv", "\t"), ("c.csv", ";"), ("d.csv", "\t")):
        rows = [("anchor", "positive", "negative"), ("a, x" if mark == ";" else "a", "p", "n"), ("b", "q", "")]
        (tmp_path / name).write_text("".join(mark.join(row) + "\r\n" for row in rows))
        first, second = Source(str(tmp_path / name))
        assert first == Example(rows[1][0], "p", "positive", ("n",))
        assert second == Example("b", "q", "positive")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "column", "texts"),
    [
        ({"translation": {"en": "owl", "de": "Eule"}}, "translation.de", ["Eule"]),
        ({"sentences": ["one", "two"]}, "sentences", ["one", "two"]),
        ({"turns": [{"value": "hello", "by": "x"}, {"value": "bye", "by": "y"}]}, "turns.value", ["hello", "bye"]),
        ({"a.b": "flat", "a": {"b": "deep"}}, "a.b", ["flat"]),
        ({"a": {"b": {"c": "deep"}}, "id": "7"}, "a.b.c", ["deep"]),
        ({"data": {"texts": ["x", "y"]}}, "data.texts", ["x", "y"]),
    ],
)
def test_nested_and_list_columns(tmp_path: Path, kind: str, row: dict[str, Any], column: str, texts: list[str]) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    assert [e.text for e in Source(str(path), column)] == texts


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"a": {"b": "x"}}, "a.c", r"row 1: no column 'a.c' \(there are a\): set --text-column"),
        ({"a": "x"}, "a.b", "no column 'a.b'"),
        ({"text": ["x", 7]}, "text", "'text' must hold text, got int"),
        ({"text": {"x": 1}}, "text", "'text' must be text, got dict"),
        ({"anchor": "a", "positive": "p", "negative": 7}, "text", "'negative' must hold text, got int"),
        ({"query": "a", "pos": []}, "text", "'pos' holds no text"),
        ({"query": "a", "positive_passages": [{"title": "t"}]}, "text", "must hold text, got dict"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, row: dict[str, Any], column: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        list(Source(str(path), column))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_that_are_not_used_are_named_once(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def write(row: dict[str, str]) -> Source:
        path = tmp_path / f"a.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([row, row]), path)
        elif kind == "csv":
            path.write_text(f"{','.join(row)}\n" + f"{','.join(row.values())}\n" * 2)
        else:
            path.write_text((json.dumps(row) + "\n") * 2)
        return Source(str(path))

    with caplog.at_level(logging.WARNING):
        source = write({"anchor": "a", "positive": "p", "negatve": "n", "score": "1", "task": "t", "id": "1"})
        assert len(list(source)) == len(list(source)) == 2
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "columns negatve, score are not used (anchor, positive are)"
    ]
    caplog.clear()
    list(write({"text": "a", "id": "1"}))
    list(write({"anchor": "a", "positive": "p", "negative_12": "n"}))
    assert not caplog.records


def test_malformed_rows_are_skipped_and_counted(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) for text in texts_file.read_text().splitlines()]
    bad = ["null", '{"text": null}', "{broken", '{"text": 7}', '{"body": "x"}', '{"text": "\xff"}']
    mixed = list(rows)
    for at, line in enumerate(bad):
        mixed.insert(3 + 10 * at, line)
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(mixed).encode("latin-1", "replace"))
    with pytest.raises(ValueError, match="row 4: expected a JSON object, got NoneType"):
        list(Source(str(path)))
    source = Source(str(path), skip_bad=True)
    assert [len(list(source)), len(list(source))] == [len(rows)] * 2
    assert source.skipped == 6
    options = {"batch_size": 4, "contrastive_batch_size": 4, "max_steps": 2, "ntp_steps": 1, "skip_bad": True}
    recipe = Recipe.from_dict({"base": str(base_dir), "data": str(path), **options})
    _, summary = train(recipe, tmp_path / "run", show_progress_bar=False)
    assert (summary["skipped_rows"], summary["first_skipped"].partition(" row ")[2]) == (
        6,
        "4: expected a JSON object, got NoneType",
    )
    path.write_text("null\n" * 5)
    with pytest.raises(ValueError, match=r"holds 0 texts .*5 bad rows skipped, the first: .* row 1: expected"):
        train(recipe, tmp_path / "none", show_progress_bar=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b'{"text": "half \\ud83d"}\n{"text": "\\udc00\\ud800 turned"}\n', ["half ?", "?? turned"]),
        ('\ufeff{"text": "über"}\r\n{"text": "b"}\r\n'.encode(), ["über", "b"]),
        (b'[{"text": "a"},\r\n {"text": "b"}]', ["a", "b"]),
        ('\ufeff[{"text": "ü"}]\n'.encode(), ["ü"]),
        (b'\n\n{"text": "a"}\n\n', ["a"]),
    ],
)
def test_json_as_programs_write_it(tmp_path: Path, raw: bytes, texts: list[str]) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    assert [e.text for e in Source(str(tmp_path / "a.json"))] == texts
    for name, packed in (("b.json.gz", gzip.compress(raw)), ("c.json.zst", pa.compress(raw, "zstd", asbytes=True))):
        (tmp_path / name).write_bytes(packed)
        assert [e.text for e in Source(str(tmp_path / name))] == texts


@pytest.mark.parametrize(
    "raw",
    [
        b"id,text\r\n1,owls hunt\r\n2,larks\r\n",
        b'\xef\xbb\xbfid,text\n1,"owls hunt"\n2,larks',
        b"id;text\r\n1;owls hunt\r\n2;larks\r\n",
        b'"id"\t"text"\n1\towls hunt\n2\tlarks\n',
    ],
)
def test_a_tables_header_is_no_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(raw)
    assert list(Source(str(tmp_path / "rows.csv"))) == [Example("owls hunt", id="1"), Example("larks", id="2")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize(
    ("encoding", "message"), [("latin-1", "not UTF-8"), ("cp1252", "not UTF-8"), ("utf-16", "UTF-16|UTF-8")]
)
def test_other_encodings_are_one_line_that_helps(tmp_path: Path, name: str, encoding: str, message: str) -> None:
    line = {"a.txt": "grüße", "a.csv": "text\ngrüße", "a.jsonl": '{"text": "grüße"}', "a.json": '[{"text": "grüße"}]'}
    (tmp_path / name).write_bytes(line[name].encode(encoding))
    with pytest.raises(ValueError, match=rf"\A{tmp_path / name}[^\n]*({message})[^\n]*\Z"):
        list(Source(str(tmp_path / name)))
