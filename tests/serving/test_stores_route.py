"""The store behind the server: its map, and its passages by their ids."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        assert http.get("/v1/stores").json()["data"] == []


@pytest.fixture
def two(index: GemIndex, tmp_path: Path) -> dict[str, GemIndex]:
    """Two stores of one model."""
    (tmp_path / "birds.txt").write_text("Owls hunt at night.\n")
    birds = GemIndex.open(tmp_path / "store", index.model, tokens=48, overlap=8)
    birds.add(tmp_path / "birds.txt")
    return {"rocks": index, "birds": birds}


def test_every_route_takes_the_name_of_a_store(two: dict[str, GemIndex]) -> None:
    with serving(two["birds"].model, index=two) as served, served.http() as http:  # type: ignore[arg-type]
        listed = http.get("/v1/stores").json()["data"]
        assert [(s["id"], s["status"], s["num_passages"]) for s in listed] == [
            (name, "ready", len(index)) for name, index in two.items()
        ]
        assert http.get("/v1/stats").json()["stores"] == ["rocks", "birds"]
        for name, store in {"birds": two["birds"], "rocks": two["rocks"], None: two["rocks"]}.items():
            given = {} if name is None else {"store": name}
            found = http.post("/v1/search", json={"query": "owls", "k": 1, **given}).json()["data"]
            assert [p["id"] for p in found] == [p.id for p in store.search("owls", k=1)]
            search = {"k": 1, **given}
            chat = {"messages": [{"role": "user", "content": "owls"}], "max_tokens": 1, "gemify": {"search": search}}
            assert http.post("/v1/chat/completions", json=chat).json()["gemify"]["sources"] == found
            assert http.get("/v1/stores/map", params=given).json()["num_passages"] == len(store)
            read = http.get(f"/v1/passages/{found[0]['id']}", params=given).json()["data"]
            assert read == [{**found[0], "score": 0.0}]
        unknown: dict[str, Any] = {"store": "fish"}
        for answer in (
            http.post("/v1/search", json={"query": "owls", **unknown}),
            http.post("/v1/chat/completions", json=chat | {"gemify": {"search": unknown}}),
            http.get("/v1/stores/map", params=unknown),
            http.get("/v1/passages/x-1", params=unknown),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "store_not_found")
            assert "no store 'fish': this server has 'rocks', 'birds'" in answer.json()["error"]["message"]


def test_a_store_that_is_gone_leaves_the_others(two: dict[str, GemIndex]) -> None:
    with serving(two["birds"].model, index=two) as served, served.http() as http:  # type: ignore[arg-type]
        shutil.rmtree(two["birds"].store.uri)
        for path in ("/v1/stores/map?store=birds", "/v1/passages/x-1?store=birds"):
            assert http.get(path).status_code == 503
        gone = http.post("/v1/search", json={"query": "owls", "store": "birds"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "store_unavailable")
        assert two["birds"].store.uri not in gone.text
        listed = http.get("/v1/stores").json()["data"]
        assert [(s["status"], s["num_passages"]) for s in listed] == [
            ("ready", len(two["rocks"])),
            ("unavailable", None),
        ]
        assert http.post("/v1/search", json={"query": "owls", "store": "rocks"}).status_code == 200
        assert http.get("/ready").status_code == 200


def test_each_store_keeps_its_own_kv(two: dict[str, GemIndex]) -> None:
    uris = {name: store.store.uri for name, store in two.items()}
    given = tuple(f"{name}={uri}" for name, uri in uris.items())
    with serving(two["birds"].model, index=two, keep_kv=True, store=given) as served:  # type: ignore[arg-type]
        search = {"k": 1, "store": "birds"}
        chat = {"messages": [{"role": "user", "content": "owls"}], "max_tokens": 1, "gemify": {"search": search}}
        assert served.post("/v1/chat/completions", chat).status_code == 200
    kept = {name: len(list(Path(uri).glob("kv/*.safetensors"))) for name, uri in uris.items()}
    assert kept == {"rocks": 0, "birds": 1}
