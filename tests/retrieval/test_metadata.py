"""Metadata as typed columns, and filters over them: before the search, of expressions alone, one line if wrong."""

from __future__ import annotations

import json
import os
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bag_of_words import BagOfWords
from gemify.retrieval import document_store
from gemify.retrieval.chunking import Chunk
from gemify.retrieval.document_store import Store
from gemify.retrieval.index import GemIndex
from gemify.retrieval.metadata import FilterError, column_name, parse_metadata, to_metadata
from gemify.retrieval.store_meta import StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord

NOON = 1_735_732_800  # 2025-01-01


@pytest.fixture(scope="module")
def bag() -> BagOfWords:
    return BagOfWords()


def documents(root: Path) -> Path:
    root.mkdir()
    front = "---\nlang: de\ndate: 2025-03-01\ntags: [birds, night]\nversion: 1.5\ndraft: false\n---\n"
    (root / "owl.md").write_text(front + "# Owls\n\nOwls hunt at night.\n")
    rows = [
        {"_id": "a", "text": "Larks sing at dawn.", "lang": "en", "Year": 2024, "at": {"x": 1}, "long": "x" * 2000},
        {"_id": "b", "text": "Owls sing too.", "lang": "de", "Year": 2025.5, "date": "2024-12-31"},
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "plain.txt").write_text("Owls are plain.\n")
    (root / "page.html").write_text('<html lang="fr"><body><p>Owls in French.</p></body></html>')
    for path in root.iterdir():
        os.utime(path, (NOON, NOON))
    return root


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, bag: BagOfWords) -> GemIndex:
    root = tmp_path_factory.mktemp("metadata")
    made = GemIndex.open(root / "store", bag)
    report = made.add(documents(root / "docs"))
    assert not report.skipped
    return made


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("lang = 'de' and date > date '2025-01-01'", {"owl.md"}),
        ("LANG in ('de', 'fr') or kind = 'txt'", {"owl.md", "rows.jsonl", "plain.txt", "page.html"}),
        ("lang is null", {"plain.txt"}),
        ("year > 2025 and year < 2026", {"rows.jsonl"}),
        ("date = date '2025-01-01'", {"rows.jsonl", "plain.txt", "page.html"}),
        ("date < date '2025-01-01'", {"rows.jsonl"}),
        ("not draft and version_ = 1.5 and array_has(tags, 'night')", {"owl.md"}),
        ("file like '%.md' and heading = 'Owls' and (place = 'lines 8-10')", {"owl.md"}),
        ("lower(lang) = 'fr' and kind = 'html'", {"page.html"}),
        ("lang = 'it''s -- (no $1'", set()),
    ],
)
def test_every_search_is_of_what_fits(index: GemIndex, where: str, found: set[str]) -> None:
    everything = {f"{Path(p.file).name}{p.location}": p for p in index.passages()}
    assert len(everything) == 6
    for mode in ("vector", "fts", "hybrid"):
        got = index.search("owls larks sing french lang", mode=mode, k=10, where=where)  # type: ignore[arg-type]
        assert {Path(p.file).name for p in got} == found, mode


def test_what_is_found_carries_its_metadata(index: GemIndex) -> None:
    (owl,) = index.search("night", mode="fts", where="heading = 'Owls'")
    assert owl.meta == {
        "date": date(2025, 3, 1),
        "kind": "md",
        "lang": "de",
        "tags": ["birds", "night"],
        "version_": 1.5,
        "draft": False,
    }
    assert owl.to_json()["meta"]["date"] == "2025-03-01"
    assert index.read(owl.id)[0].meta == owl.meta
    (lark,) = index.search("larks", mode="fts")
    assert lark.meta == {"date": date(2025, 1, 1), "kind": "jsonl", "lang": "en", "year": 2024.0}


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("langauge = 'de'", "No field named langauge"),
        ("lang = ", "Expected: an expression"),
        ("lang = 1", "Utf8"),
        ("date > '2025-01-01'", "write date '2025-03-01'"),
        ("", "it is empty"),
        ("lang = 'de') or (true", "parentheses"),
        ("lang = 'de", "' is no part"),
        ("lang = 'de' -- and more", "-- is no part"),
        ("lang = 'de'; drop table chunks", "; is no part"),
        ("lang = $1", "is no part"),
        ("lang in (select file from files)", "not supported"),
        ("exists (select 1)", "exists is no function"),
        ("length(repeat('a', 1000000000)) > 1", "repeat is no function"),
        ('"repeat"(lang, 9) = lang', '"repeat" is no function'),
        ("read_csv('/etc/passwd') is null", "read_csv is no function"),
        ("lang = 'de'" + " and lang = 'de'" * 100, "1,611 characters"),
        ("cast(lang as int) > 1", "Cast error: Cannot cast string"),
        ("regexp_like(lang, lang || '(')", "did not compile"),
        ("1=1" + "*1" * 490, ""),
    ],
)
def test_other_filters_are_one_line_that_names_the_columns(index: GemIndex, where: str, reason: str) -> None:
    for mode in ("vector", "fts"):
        if not reason:  # as deep as the length allows: planned, and no stack overflows
            index.search("owls", mode=mode, where=where)  # type: ignore[arg-type]
            continue
        with pytest.raises(FilterError) as raised:
            index.search("owls", mode=mode, where=where)  # type: ignore[arg-type]
        assert reason in str(raised.value)
        assert "lang (text)" in str(raised.value)
        assert "date (date)" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert "cargo" not in str(raised.value)


def test_new_names_add_columns_and_other_types_are_reported(tmp_path: Path, bag: BagOfWords) -> None:
    (tmp_path / "a.md").write_text("---\nyear: 2024\n---\nOwls one.\n")
    index = GemIndex.open(tmp_path / "store", bag)
    reader = GemIndex.open(tmp_path / "store", bag)
    index.add([tmp_path / "a.md"])
    with pytest.raises(FilterError, match="year"):
        reader.search("owls", where="place_of = 'x'")
    (tmp_path / "b.md").write_text("---\nyear: long ago\nplace of: here\n---\nOwls two.\n")
    report = index.add([tmp_path / "a.md", tmp_path / "b.md"])
    assert [s.reason for s in report.skipped] == [
        "its year 'long ago' is of another type than the store's column: left out"
    ]
    assert [p.text for p in reader.search("owls", mode="fts", where="place_of = 'here' and year is null")] != []
    assert len(reader.search("owls", mode="fts", where="year = 2024")) == 1


def test_metadata_of_a_run_changes_without_embedding(tmp_path: Path, bag: BagOfWords) -> None:
    index = GemIndex.open(tmp_path / "store", bag)
    root = documents(tmp_path / "docs")
    index.add(root, meta={"project": "atlas"})
    before = {row["text"]: row["vector"] for row in index.store.rows()}
    bag.embedded.clear()
    report = index.add(root, meta={"project": "borealis", "lang": "no"})
    assert (len(report.changed), report.chunks, bag.embedded) == (4, 0, [])
    assert not index.search("owls", where="project = 'atlas'")
    assert len(index.search("owls larks", mode="vector", where="project = 'borealis' and lang = 'no'")) == 6
    for row in index.store.rows():
        np.testing.assert_allclose(row["vector"], before[row["text"]], atol=1e-6)
    assert index.add(root, meta={"project": "borealis", "lang": "no"}).unchanged == 4
    (root / "owl.md").rename(tmp_path / "owl.md")
    moved = index.add([root, tmp_path / "owl.md"], meta={"project": "borealis", "lang": "no"})
    assert (moved.moved, bag.embedded) == ((str(tmp_path / "owl.md"),), [])
    assert index.search("night", mode="fts", where="project = 'borealis'")


def test_a_store_without_metadata_is_searched_and_gets_it(tmp_path: Path, bag: BagOfWords) -> None:
    """As older versions made them: the tables have no such column."""
    index = GemIndex.open(tmp_path / "store", bag)
    index.store._chunks.drop_columns(["date", "kind"])  # type: ignore[union-attr]
    (tmp_path / "a.md").write_text("Owls.\n")
    chunk = ChunkRow(str(tmp_path / "a.md"), "old", Chunk(0, "Owls.", "", "", "", 1, "Owls."))
    index.store.append([chunk], bag.encode_document(["Owls."]))  # type: ignore[union-attr]
    index.store.commit([FileRecord(chunk.file, "h", "old", 1, 1.0, 1)])  # type: ignore[union-attr]
    assert [p.meta for p in index.search("owls")] == [{}]
    with pytest.raises(FilterError, match=r"columns are file \(text\)"):
        index.search("owls", where="kind = 'md'")
    index.add([tmp_path / "a.md"])
    assert [p.meta["kind"] for p in index.search("owls", where="kind = 'md'")] == ["md"]


def test_a_rare_value_is_found_in_partitions_far_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_store, "_INDEX_MIN_ROWS", 300)
    monkeypatch.setattr(document_store, "_PROBES", 1)
    store = Store.create(tmp_path / "s", StoreMeta("m", "p", 8))
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype("f4")
    meta = [to_metadata({"rare": i % 40 == 0}) for i in range(400)]
    store.append([ChunkRow("f", "v", Chunk(i, "t", "", "", "", 1, "t", meta[i])) for i in range(400)], vectors)
    store.commit([FileRecord("f", "h", "v", 1, 1.0, 400)])
    store.optimize()
    assert any(i.columns == ["vector"] for i in store._chunks.list_indices())
    assert {h.id for h in store.vector_search(vectors[1], 10, "rare")} == {f"v-{i}" for i in range(0, 400, 40)}


def test_parquet_brings_its_short_columns(tmp_path: Path, bag: BagOfWords) -> None:
    columns = {
        "text": ["Owls."],
        "n": [3],
        "picture": [b"x"],
        "vector": [[1.0, 2.0]],
        "when": [datetime(2025, 1, 2, 3)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    index = GemIndex.open(tmp_path / "store", bag)
    index.add([tmp_path / "a.parquet"], meta={"a": [1, 2], "nothing": None, "far": 10**400})
    (passage,) = index.search("owls", where="n = 3 and when < timestamp '2025-01-03 00:00:00'")
    assert {k: v for k, v in passage.meta.items() if k not in ("date", "kind")} == {
        "n": 3.0,
        "when": datetime(2025, 1, 2, 3),
        "a": ["1", "2"],
    }


def test_pairs_and_names() -> None:
    assert parse_metadata(["lang=no", "year=2024", "n=-1.5", "draft=true", "on=2025-03-01", "zip=a=b"]) == {
        "lang": "no",
        "year": 2024.0,
        "n": -1.5,
        "draft": True,
        "on": date(2025, 3, 1),
        "zip": "a=b",
    }
    for wrong in ("lang", "=de", "lang=", "--=x"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse_metadata([wrong])
    assert [column_name(k) for k in ("Published Date", "author.name", "2nd", "Text", "größe")] == [
        "published_date",
        "author_name",
        "n2nd",
        "text_",
        "größe",
    ]
