"""The store against independent oracles, and damaged."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gemify.io.vectors import normalize
from gemify.retrieval.chunking import Chunk, ChunkSettings
from gemify.retrieval.document_store import Store
from gemify.retrieval.index import fuse
from gemify.retrieval.store_meta import Precision, StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord

DIMENSION = 64
WORDS = [f"word{i}" for i in range(60)]


def texts(count: int, seed: int = 0) -> list[str]:
    chance = 1 / np.arange(1, len(WORDS) + 1)
    picks = np.random.default_rng(seed).choice(len(WORDS), (count, 12), p=chance / chance.sum())
    return [" ".join(WORDS[i] for i in row[: 4 + n % 9]) for n, row in enumerate(picks)]


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype("f4")


def rows(version: str, listed: list[str], first: int = 0) -> list[ChunkRow]:
    return [ChunkRow("f.txt", version, Chunk(first + i, t, "", "", "", 1, t)) for i, t in enumerate(listed)]


def record(version: str, chunks: int) -> FileRecord:
    return FileRecord("f.txt", "hash", version, 1, 1.0, chunks)


def filled(path: Path, count: int, precision: Precision = "float32") -> Store:
    store = Store.create(path, StoreMeta("m", "p", DIMENSION, precision))
    store.append(rows("v1", texts(count)), vectors(count))
    store.commit([record("v1", count)])
    store.optimize()
    return store


def bm25(query: str, listed: list[str], k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    counts = [Counter(re.findall(r"\w+", t)) for t in listed]
    lengths = np.array([sum(c.values()) for c in counts])
    scores = np.zeros(len(listed))
    for word in query.split():
        frequency = np.array([c[word] for c in counts])
        n = np.count_nonzero(frequency)
        idf = math.log(1 + (len(listed) - n + 0.5) / (n + 0.5))
        scores += idf * frequency * (k1 + 1) / (frequency + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_vector_search_is_cosine_order(tmp_path: Path, precision: Precision) -> None:
    store = filled(tmp_path / "s", 1000, precision)
    for seed in range(5):
        query = vectors(1, seed + 100)[0]
        cosines = normalize(vectors(1000)) @ normalize(query[None])[0]
        best = np.argsort(-cosines)[:10]
        hits = store.vector_search(query * 3, 10)
        assert [h.id for h in hits] == [f"v1-{i}" for i in best]
        np.testing.assert_allclose(
            [h.score for h in hits], cosines[best], atol=2e-3 if precision == "float16" else 1e-5
        )


def test_quantised_searches_have_an_index_and_full_ones_do_not_yet(tmp_path: Path) -> None:
    for precision, kind in (("float32", None), ("int8", "IvfSq"), ("binary", "IvfRq")):
        store = filled(tmp_path / precision, 400, precision)  # type: ignore[arg-type]
        kinds = {i.columns[0]: i.index_type for i in store._chunks.list_indices()}
        assert kinds.get("vector") == kind


def test_words_are_ranked_by_bm25(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", 500)
    for query in ("word3", "word40 word7", "word55 word2 word30"):
        oracle = bm25(query, texts(500))
        hits = store.text_search(query, 20)
        got = np.array([h.score for h in hits])
        # LanceDB keeps a text's length in one byte, so scores differ a little; who is found, and about how high, do not
        theirs = np.array([oracle[int(h.id.removeprefix("v1-"))] for h in hits])
        assert np.corrcoef(got, theirs)[0, 1] > 0.99
        np.testing.assert_allclose(theirs, np.sort(oracle)[::-1][:20], rtol=0.05)


def test_fusion_adds_reciprocal_ranks() -> None:
    assert fuse([["a", "b", "c"], ["c", "d"]]) == [
        ("c", 1 / 63 + 1 / 61),
        ("a", 1 / 61),
        ("b", 1 / 62),
        ("d", 1 / 62),
    ]


def test_chunks_count_once_their_files_row_names_their_version(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", 50)
    query = vectors(1, 7)[0]
    before = [h.id for h in store.vector_search(query, 50)]
    store.append(rows("v2", texts(30, 1)), vectors(30, 1))
    other = Store.open(tmp_path / "s")
    for reader in (store, other):
        assert reader.pending_versions() == {"v2": 30}
        assert [h.id for h in reader.vector_search(query, 50)] == before
        assert {h.id[:2] for h in reader.text_search("word0 word1", 100)} == {"v1"}
    store.commit([record("v2", 30)])
    for reader in (store, other):
        assert reader.pending_versions() == {"v1": 50}
        assert {h.id[:2] for h in reader.vector_search(query, 100)} == {"v2"}
        assert len(reader) == 30
    store.optimize()
    assert other.pending_versions() == {}
    assert len(list(other.rows())) == 30
    store.remove(["f.txt"])
    assert other.vector_search(query, 5) == other.text_search("word0", 5) == []
    store.optimize()
    assert (len(store), list(store.rows())) == (0, [])


def test_a_live_chunk_is_read_with_its_neighbours(tmp_path: Path) -> None:
    store, listed = filled(tmp_path / "s", 50), texts(50)
    store.append(rows("v2", texts(30, 1)), vectors(30, 1))
    assert [hit.text for hit in store.read("v1-20")] == [listed[20]]
    assert [hit.text for hit in store.read("v1-20", before=2, after=1)] == listed[18:22]
    assert [hit.id for hit in store.read("v1-49", before=1, after=9)] == ["v1-48", "v1-49"]
    for wrong in ("v2-0", "v1-50", "v1", "v1--1", "v1-²", "' OR '1'='1-0", ""):
        assert store.read(wrong, before=60) == []
    store.commit([record("v2", 30)])
    assert (store.read("v1-20"), len(store.read("v2-0", after=29))) == ([], 30)


def test_paths_with_quotes_are_only_paths(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", 3)
    odd = "it's; DROP -- \".txt"
    store.commit([FileRecord(odd, "h", "v9", 1, 1.0, 0)])
    store.remove([odd])
    assert set(store.files()) == {str(tmp_path / "f.txt")}


def test_a_store_knows_how_it_was_made(tmp_path: Path) -> None:
    meta = StoreMeta("some/model", "abc", DIMENSION, "int8", ChunkSettings(100, 10, context=False))
    Store.create(tmp_path / "s", meta)
    filled(tmp_path / "t", 20)
    assert Store.open(tmp_path / "s").meta == meta
    assert Store.exists(tmp_path / "s")
    assert not Store.exists(tmp_path / "none")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        StoreMeta("m", "p", 3, "int4")  # type: ignore[arg-type]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", 3)
    with (
        store.write_lock(),
        pytest.raises(ValueError, match="written by another process"),
        Store.open(tmp_path / "s").write_lock(),
    ):
        pass
    with store.write_lock():
        pass


@pytest.mark.parametrize("damage", ["data", "_versions", "_indices", "chunks", "files"])
@pytest.mark.parametrize("how", ["truncate", "remove"])
def test_a_damaged_store_says_so_in_a_line(tmp_path: Path, damage: str, how: str) -> None:
    filled(tmp_path / "s", 300)
    if damage in ("chunks", "files"):
        spoilt = (tmp_path / "s" / f"{damage}.lance").rglob("*")
    else:
        spoilt = (tmp_path / "s" / "chunks.lance" / damage).rglob("*")
    for path in list(spoilt):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2) if how == "truncate" else path.unlink()

    def use() -> None:
        store = Store.open(tmp_path / "s")
        store.vector_search(vectors(1)[0], 3)
        store.text_search("word3", 3)

    with pytest.raises(ValueError, match="store") as caught:
        use()
    assert "\n" not in str(caught.value)
    assert ".rs:" not in str(caught.value)


def test_wrong_shapes_and_places(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", 3)
    with pytest.raises(ValueError, match="expected a vector of 64 numbers, got \\[3\\]"):
        store.vector_search(np.zeros(3), 1)
    with pytest.raises(ValueError, match="expected vectors \\[1, 64\\], got \\[1, 3\\]"):
        store.append(rows("v", ["a"]), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="no store at"):
        Store.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="it is a file"):
        Store.create(tmp_path / "file", store.meta)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no store in"):
        Store.open(tmp_path / "empty")
    assert store.vector_search(np.zeros(DIMENSION), 1)[0].score == 0
