"""The store behind the server: its map, and its passages by their ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gemify.retrieval.index import GemIndex
from gemify.retrieval.store_map import draw_map
from running_server import Served, indexed, serving

KEY = {"authorization": "Bearer secret-of-ann"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> GemIndex:
    root = tmp_path_factory.mktemp("stores")
    return indexed(root, {"sea.txt": "Tides follow the moon. " * 9, "stone.txt": "Granite is hard.\n"}, tokens=48)


@pytest.fixture(scope="module")
def served(index: GemIndex) -> Iterator[Served]:
    with serving(index.model, index=index, keys={"ann": "secret-of-ann"}) as running:  # type: ignore[arg-type]
        yield running


def test_the_map_is_the_librarys_and_follows_the_store(served: Served, index: GemIndex) -> None:
    with served.http(headers=KEY) as http:
        for _ in range(2):
            got = http.get("/v1/stores/map").json()
            drawn = draw_map(index.store)
            assert got["ids"] == list(drawn.ids)
            assert got["files"] == list(drawn.files)
            assert got["num_passages"] == len(index) == len(got["points"])
            np.testing.assert_allclose(got["points"], drawn.points_N2, atol=1e-4)
            names = [got["files"][number] for number in got["file_indices"]]
            assert names == [index.read(name)[0].file for name in got["ids"]]
            added = index.store.uri.removesuffix("store") + "more.txt"
            with open(added, "w") as file:
                file.write("Bees dance.\n")
            index.add(added)
        assert added in got["files"]


def test_a_passage_is_read_with_its_neighbours(served: Served, index: GemIndex) -> None:
    found = index.search("tides", k=1, mode="fts")[0]
    with served.http(headers=KEY) as http:
        for before, after in ((0, 0), (1, 2)):
            got = http.get(f"/v1/passages/{found.id}", params={"before": before, "after": after}).json()
            assert got["data"] == [p.to_json() for p in index.read(found.id, before=before, after=after)]
        for path, status in {
            "/v1/passages/none-1": 404,
            "/v1/passages/..%2f..%2fetc": 404,
            "/v1/passages/'%20OR%201=1%20--1": 404,
            f"/v1/passages/{found.id}?after=21": 400,
            f"/v1/passages/{found.id}?before=-1": 400,
        }.items():
            refused = http.get(path)
            assert "store" not in refused.text, "no path of the server's machine"
            assert (refused.status_code, "\n" in refused.json()["error"]["message"]) == (status, False), path


def test_keys_and_a_store_are_needed(served: Served, index: GemIndex) -> None:
    with served.http() as http:
        assert http.get("/v1/stores/map").status_code == http.get("/v1/passages/x-1").status_code == 401
    with serving(served.gem) as bare, bare.http() as http:
        for path in ("/v1/stores/map", "/v1/passages/x-1"):
            assert http.get(path).json()["error"]["code"] == "no_index"
        assert http.get("/v1/stats").json()["has_store"] is False
