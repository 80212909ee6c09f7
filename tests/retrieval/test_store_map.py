"""The map of a store: principal components of the committed vectors, files counted, large stores sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemify.retrieval.chunking import Chunk
from gemify.retrieval.document_store import Store
from gemify.retrieval.store_map import draw_map, project
from gemify.retrieval.store_meta import Precision, StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord


def make_store(
    directory: Path, vectors_ND: np.ndarray, sizes: dict[str, int], precision: Precision = "float32"
) -> Store:
    """A store of files with so many chunks each, the last one pending."""
    store = Store.create(str(directory), StoreMeta("tiny", "f", vectors_ND.shape[1], precision))
    rows = [
        ChunkRow(name, f"v-{name}", Chunk(n, f"{name} {n}", "", "", "", 3, f"{name} {n}"))
        for name, size in sizes.items()
        for n in range(size)
    ]
    store.append(rows, vectors_ND[: len(rows)])
    store.commit([FileRecord(name, "h", f"v-{name}", 1, 0.0, size) for name, size in list(sizes.items())[:-1]])
    return store


def test_components_are_those_of_the_singular_vectors() -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(300, 16)) * np.linspace(3, 0.1, 16)
    points_N2, explained = project(vectors_ND)
    units_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    u, s, axes = np.linalg.svd(units_ND - units_ND.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points_N2), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    assert explained == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-5)
    for axis in range(2):
        sign = np.sign(axes[axis][np.abs(axes[axis]).argmax()])
        np.testing.assert_allclose(points_N2[:, axis], sign * u[:, axis] * s[axis], atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_or_equal_vectors_are_one_place(rows: int) -> None:
    points_N2, explained = project(np.ones((rows, 4)))
    np.testing.assert_allclose(points_N2, np.zeros((rows, 2)), atol=1e-6)
    assert explained == 1.0


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_map_shows_what_is_committed(tmp_path: Path, precision: Precision) -> None:
    vectors_ND = np.random.default_rng(1).normal(size=(70, 8)).astype(np.float32)
    store = make_store(tmp_path, vectors_ND, {"a": 10, "b": 40, "pending": 20}, precision)
    drawn = draw_map(store)
    names = [Path(file).name for file in drawn.files]
    assert names == ["b", "a"]
    assert [names[number] for number in drawn.file_of_N] == [name.split("-")[1] for name in drawn.ids]
    assert drawn.num_passages == len(drawn.ids) == len(set(drawn.ids)) == 50
    points = dict(zip(drawn.ids, drawn.points_N2, strict=True))
    expected_N2, explained = project(vectors_ND[:50])
    ids = [*(f"v-a-{n}" for n in range(10)), *(f"v-b-{n}" for n in range(40))]
    np.testing.assert_allclose(
        [points[name] for name in ids], expected_N2, atol=2e-2 if precision == "float16" else 1e-5
    )
    assert drawn.explained_variance == pytest.approx(explained, abs=1e-2)
    assert store.read(drawn.ids[7])[0].file == drawn.files[drawn.file_of_N[7]]


def test_a_large_store_is_sampled_evenly(tmp_path: Path) -> None:
    vectors_ND = np.random.default_rng(2).normal(size=(901, 8)).astype(np.float32)
    store = make_store(tmp_path, vectors_ND, {"a": 300, "b": 600, "pending": 1})
    drawn = draw_map(store, max_points=90)
    assert (len(drawn.ids), drawn.num_passages) == (90, 900)
    assert np.bincount(drawn.file_of_N).tolist() == [60, 30]
    assert draw_map(store, max_points=90).ids == drawn.ids
    before = store.version
    store.remove(["a"])
    assert store.version != before
    assert [Path(file).name for file in draw_map(store).files] == ["b"]
