"""`embed_shard` run twice, at once, over a failing disk or beside another's marker: a shard is in the corpus once."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemify.io.directory import Directory
from gemify.io.vectors import normalize
from gemify.retrieval.bulk.executors import embed_shard
from gemify.retrieval.bulk.lance_writer import at_precision, commit
from gemify.retrieval.bulk.plan import Shard, plan
from gemify.retrieval.bulk.rows import ShardReader, _Table
from gemify.retrieval.vector_table import CorpusMeta, marker_name
from rows_of_words import Words, read_back, row, vectors_of, write_inputs, write_jsonl


@pytest.fixture
def meta() -> CorpusMeta:
    return CorpusMeta("words", "words", 16, shard_rows=20, precision="float32")


@pytest.fixture
def shards(tmp_path: Path, meta: CorpusMeta) -> list[Shard]:
    return list(plan(write_inputs(tmp_path / "in"), shard_rows=20, columns=ShardReader(meta).columns))


def test_shards_together_are_the_inputs(shards: list[Shard], meta: CorpusMeta) -> None:
    """Whatever the order they are read in, by one reader or by many."""
    wanted = [row(n) for n in range(150)]
    assert sum(s.rows for s in shards) == 150
    assert max(s.rows for s in shards) == 20
    reader = ShardReader(meta)
    backwards = [reader.passages(s, []) for s in reversed(shards)][::-1]
    apart = [ShardReader(meta).passages(s, []) for s in shards]
    jumping = [reader.passages(shards[n], []) for n in (*range(0, len(shards), 2), *range(1, len(shards), 2))]
    for found in (backwards, apart):
        assert [(p.id, p.title, p.text) for part in found for p in part] == [
            (r["_id"], r["title"], r["text"]) for r in wanted
        ]
    assert sorted(p.id for part in jumping for p in part) == sorted(r["_id"] for r in wanted)


def test_a_shard_that_is_done_is_not_done_again(shards: list[Shard], meta: CorpusMeta, tmp_path: Path) -> None:
    model, directory = Words(), Directory(tmp_path / "out")
    first = embed_shard(shards[1], model=model, reader=ShardReader(meta), directory=directory)
    files = sorted(p.name for p in (tmp_path / "out").rglob("*.lance") if p.is_file())
    assert embed_shard(shards[1], model=model, reader=ShardReader(meta), directory=directory) == first
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.lance") if p.is_file()) == files
    assert len(model.embedded) == first.rows == 20


def test_the_first_marker_counts(shards: list[Shard], meta: CorpusMeta, tmp_path: Path) -> None:
    """Two workers on one shard: what the slower one wrote is not in the corpus."""
    directory = Directory(tmp_path / "out")

    class Slow(Words):
        def encode_document(self, inputs: object, **options: object) -> np.ndarray:
            if self.failures:  # another worker is done in the meantime
                self.failures.pop()
                embed_shard(shards[0], model=Words(), reader=ShardReader(meta), directory=directory)
            return super().encode_document(inputs)

    slow = Slow()
    slow.failures.append(RuntimeError())
    done = embed_shard(shards[0], model=slow, reader=ShardReader(meta), directory=directory)
    assert len([p for p in (tmp_path / "out").rglob("*.lance") if p.is_file()]) == 2
    commit(directory, meta, done.parts, name="x")
    assert read_back(tmp_path / "out")["id"].to_pylist() == [f"d{n}" for n in range(20)]
    assert not directory.write_if_absent(marker_name(shards[0].name), b"other")
    assert directory.read(marker_name(shards[0].name)) == done.to_json().encode()


def test_a_failing_disk_is_tried_again(shards: list[Shard], meta: CorpusMeta, tmp_path: Path) -> None:
    model, directory = Words(), Directory(tmp_path / "out")
    model.failures = [OSError("gone"), OSError("gone")]
    assert embed_shard(shards[0], model=model, reader=ShardReader(meta), directory=directory, wait=0).rows == 20
    model.failures = [OSError("gone for good")] * 3
    with pytest.raises(OSError, match="gone for good"):
        embed_shard(shards[1], model=model, reader=ShardReader(meta), directory=directory, wait=0)
    assert directory.read(marker_name(shards[1].name)) is None


def test_a_file_that_fails_half_way_is_opened_again(shards: list[Shard], meta: CorpusMeta, tmp_path: Path) -> None:
    """What reads a Parquet file is at its end once it raised: the rest of the rows would seem to be missing."""
    reader, directory = ShardReader(meta), Directory(tmp_path / "out")
    embed_shard(shards[-2], model=Words(), reader=reader, directory=directory)
    file = reader._file
    assert isinstance(file, _Table)
    whole = file._rest

    def failing() -> Iterator[dict[str, Any]]:
        yield next(whole)
        raise OSError(errno.EIO, "gone")

    file._rest = failing()
    assert embed_shard(shards[-1], model=Words(), reader=reader, directory=directory, wait=0).rows == shards[-1].rows


def test_numbers_that_are_none_are_refused(shards: list[Shard], meta: CorpusMeta, tmp_path: Path) -> None:
    class Broken(Words):
        def encode_document(self, inputs: object, **options: object) -> np.ndarray:
            found = super().encode_document(inputs)
            found[3, 1] = np.nan
            return found

    with pytest.raises(ValueError, match=r"a\.jsonl: the vector of passage 'd3' has numbers that are not finite"):
        embed_shard(shards[0], model=Broken(), reader=ShardReader(meta), directory=Directory(tmp_path / "out"))
    assert Directory(tmp_path / "out").list_names("done") == []


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_precisions(precision: str, shards: list[Shard], meta: CorpusMeta, tmp_path: Path) -> None:
    """What is kept is what the model gave, up to the precision's step."""
    kept = replace(meta, precision=precision)  # type: ignore[arg-type]
    directory, model = Directory(tmp_path / "out"), Words()
    done = embed_shard(shards[0], model=model, reader=ShardReader(kept), directory=directory)
    commit(directory, kept, done.parts, name="x")
    found = vectors_of(read_back(tmp_path / "out"))
    exact = normalize(model.encode_document(model.embedded[:20]))
    if precision == "binary":
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(np.unpackbits(found, axis=1).astype(bool), exact > 0)
        return
    steps = {"float32": 1e-6, "float16": 1e-3, "int8": 1 / 254}
    back = found.astype(np.float32) * (np.abs(exact).max(axis=1, keepdims=True) / 127 if precision == "int8" else 1)
    assert np.abs(back - exact).max() <= steps[precision] * 1.01
    assert found.dtype == precision


def test_a_zero_vector_stays_one() -> None:
    for precision in ("float16", "int8", "binary"):
        assert not at_precision(np.zeros((2, 8), np.float32), precision).any()  # type: ignore[arg-type]


def test_an_input_that_changes_under_way_is_noticed(tmp_path: Path, meta: CorpusMeta) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(n) for n in range(30)])
    shards = list(plan([path], shard_rows=20, columns=ShardReader(meta).columns))
    path.write_bytes(path.read_bytes().replace(b"d25", b"e25"))
    ShardReader(meta).passages(shards[0], [])
    with pytest.raises(ValueError, match="changed while it was read"):
        ShardReader(meta).passages(shards[1], [])
