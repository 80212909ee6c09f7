"""The map of a store of thousands of passages, in a real browser over a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from browser import Visit, browsing

from gemify.retrieval.chunking import Chunk
from gemify.retrieval.document_store import Store
from gemify.retrieval.index import GemIndex
from gemify.retrieval.store_meta import StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord
from running_server import Served, serving, tiny_gem

FILES, PASSAGES = 10, 500
EDGE = 18  # of store_map.js
PIXEL = """([x, y]) => {
  const canvas = document.getElementById("store-map");
  const scale = canvas.width / canvas.clientWidth;
  const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, -x * scale, -y * scale);
  return [...copy.getImageData(0, 0, 1, 1).data];
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("map")
    gem = tiny_gem(root / "model")
    draw = np.random.default_rng(0)
    centres_FD = draw.normal(size=(FILES, gem.get_embedding_dim()))
    store = Store.create(str(root / "store"), StoreMeta("tiny", gem.fingerprint, gem.get_embedding_dim()))
    for number in range(FILES):
        texts = [f"Passage {n} of topic{number}." for n in range(PASSAGES)]
        rows = [
            ChunkRow(f"/docs/topic{number}.md", f"v{number}", Chunk(n, t, "", "", f"line {n}", 3, t))
            for n, t in enumerate(texts)
        ]
        store.append(rows, centres_FD[number] + 0.5 * draw.normal(size=(PASSAGES, gem.get_embedding_dim())))
        store.commit([FileRecord(f"/docs/topic{number}.md", "h", f"v{number}", 1, 0.0, PASSAGES)])
    store.optimize()
    with serving(gem, index=GemIndex.open(store, gem)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as opened:
        yield opened


def places(seen: Visit, drawn: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Where the passages are on the canvas, in pixels."""
    size = seen.page.locator("#store-map").evaluate("canvas => [canvas.clientWidth, canvas.clientHeight]")
    points_N2 = np.array(drawn["points"])
    low, high = points_N2.min(0), points_N2.max(0)
    scale = min((side - 2 * EDGE) / extent for side, extent in zip(size, high - low, strict=True))
    pixels_N2 = np.array(size) / 2 + (points_N2 - (low + high) / 2) * scale * [1, -1]
    return {name: (x, y) for name, (x, y) in zip(drawn["ids"], pixels_N2.tolist(), strict=True)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_thousands_of_passages_are_drawn_found_and_read(browser: Any, served: Served, width: int, scheme: str) -> None:
    seen = Visit(browser, f"{served.url}/", width=width, scheme=scheme)
    page = seen.page
    page.click("#tab-search")
    if width == 360:
        page.click("summary:text('Map of the index')")
    page.locator("#store-map-note", has_text="5,000 passages").wait_for()
    drawn = served.http().get("/v1/stores/map").json()
    assert len(drawn["ids"]) == FILES * PASSAGES
    assert f"{round(100 * drawn['explained_variance'])} %" in seen.text("#store-map-note")
    files = page.locator("#store-map-files li").all_text_contents()
    assert len(files) == 9
    assert files[-1] == "and 2 more files, in grey"
    assert "(500)" in files[0]

    page.check("label:text('the words') input")
    page.fill("#query", "topic3")
    page.press("#query", "Enter")
    page.locator("#found .passage").nth(4).wait_for()
    found = served.post("/v1/search", {"query": "topic3", "k": 5, "mode": "fts"}).json()["data"]
    at = places(seen, drawn)
    box = page.locator("#store-map")
    box.scroll_into_view_if_needed()
    corner = page.evaluate(PIXEL, [1, 1])
    for passage in reversed(found):
        x, y = at[passage["id"]]
        assert page.evaluate(PIXEL, [x + 7.5, y])[3] > 150  # its ring
    assert corner[3] == 0
    box.hover(position={"x": at[found[0]["id"]][0], "y": at[found[0]["id"]][1]})
    page.locator("#store-map-passage .passage").wait_for()
    shown = seen.text("#store-map-passage .passage-text")
    assert shown in {passage["text"] for passage in found}
    assert seen.text("#store-map-passage .number").strip("[]").isdigit()

    lonely = min((name for name in at if name not in {p["id"] for p in found}), key=lambda name: at[name][0])
    box.hover(position={"x": at[lonely][0], "y": at[lonely][1]})  # the leftmost
    text = served.http().get(f"/v1/passages/{lonely}").json()["data"][0]["text"]
    page.locator("#store-map-passage", has_text=text).wait_for()
    box.focus()
    page.keyboard.press("ArrowRight")
    page.locator("#store-map-passage .passage-text", has_not_text=text).wait_for()
    page.keyboard.press("Home")
    page.locator("#store-map-passage", has_text=found[0]["text"]).wait_for()

    page.locator("#store-map-files button").nth(1).click()
    assert page.locator("#store-map-files [aria-pressed=true]").count() == 1
    first = drawn["file_indices"].index(0)
    x, y = at[drawn["ids"][first]]
    lone = [name for name, file in zip(drawn["ids"], drawn["file_indices"], strict=True) if file == 1]
    far = min(np.hypot(at[name][0] - x, at[name][1] - y) for name in lone)
    assert far < 12 or page.evaluate(PIXEL, [x, y])[3] == 0  # files that are not shown leave no point
    seen.check()
    seen.context.close()


def test_a_store_that_changes_is_drawn_anew(browser: Any, served: Served) -> None:
    """A search that finds what the map has not fetches it again; a map that fails says so."""
    seen = Visit(browser, f"{served.url}/")
    seen.page.click("#tab-search")
    seen.page.locator("#store-map-note", has_text="5,000 passages").wait_for()
    found = [{"id": "v0-1x", "text": "new", "file": "new.md", "place": "", "title": "", "heading": "", "score": 1.0}]
    body = json.dumps({"data": found})
    seen.page.route("**/v1/search", lambda route: route.fulfill(body=body, content_type="application/json"))
    seen.page.fill("#query", "new")
    with seen.page.expect_response("**/v1/stores/map"):
        seen.page.press("#query", "Enter")
    seen.page.route("**/v1/stores/map", lambda route: route.abort())
    seen.page.press("#query", "Enter")
    seen.page.locator("#store-map-error", has_text="does not answer").wait_for()
    seen.context.close()
