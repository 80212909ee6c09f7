"""Several stores on the page, and files put into them, in a real browser over a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, browsing

from gemify.retrieval.index import GemIndex
from running_server import Served, indexed, serving

KEYS = {"ann": "secret-of-ann", "bob": "secret-of-bob"}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as opened:
        yield opened


@pytest.fixture
def served(browser: Any, tmp_path: Path, one_thread: None) -> Iterator[Served]:
    birds = indexed(tmp_path, {"owls.txt": "Owls hunt at night.\n"}, tokens=64)
    rocks = GemIndex.open(tmp_path / "rocks", birds.model, tokens=64, overlap=8)
    (tmp_path / "stone.txt").write_text("Granite is hard.\n")
    rocks.add(tmp_path / "stone.txt")
    with serving(birds.model, index={"birds": birds, "rocks": rocks}, keys=KEYS, upload_key=("ann",)) as running:  # type: ignore[arg-type]
        yield running


def enter(browser: Any, served: Served, name: str, **options: Any) -> Visit:
    seen = Visit(browser, f"{served.url}/", **options)
    seen.page.fill("#key", KEYS[name])
    seen.page.press("#key", "Enter")
    seen.page.locator("#model", has_text="tiny").wait_for()
    seen.troubles.clear()  # what was asked without the key
    return seen


def search(seen: Visit, query: str) -> None:
    seen.page.fill("#query", query)
    seen.page.press("#query", "Enter")
    seen.page.locator("#search-status", has_text="ms").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_a_store_is_chosen_and_gets_files(
    browser: Any, served: Served, tmp_path: Path, width: int, scheme: str
) -> None:
    seen = enter(browser, served, "ann", width=width, scheme=scheme)
    page = seen.page
    page.click("#tab-search")
    chosen = page.locator("#search-form select.store")
    assert chosen.locator("option").all_text_contents() == ["birds", "rocks"]
    search(seen, "hard")
    assert "Owls" in seen.text("#found")
    chosen.select_option("rocks")
    assert page.locator("#found li").count() == 0
    search(seen, "hard")
    assert "Granite" in seen.text("#found")
    if width == 360:
        page.click("summary:text('Map of the index')")
    page.locator("#store-map-files", has_text="stone.txt").wait_for()

    files = []
    for name, text in {f"{HOSTILE.replace('/', '')}.md": "Whales sing.", "bees.txt": "Bees dance."}.items():
        files.append(tmp_path / name)
        files[-1].write_text(text)
    page.set_input_files("#upload-files", files)
    with served.engine.paused():
        page.click("#upload-form button")
        page.locator("#upload-status", has_text="1 of 2").wait_for()
        page.locator("#upload-progress").wait_for()
        seen.check()
    page.locator("#upload-status", has_text="2 files: 2 passages in the index").wait_for()
    assert page.locator("#upload-progress").is_hidden()
    page.locator("#store-map-files", has_text="bees.txt").wait_for()
    search(seen, "bees dance")
    assert "Bees dance." in page.locator("#found").text_content()  # type: ignore[operator]
    page.set_input_files("#upload-files", files[1])
    page.click("#upload-form button")
    page.locator("#upload-status", has_text="bees.txt: 1 passages in the index").wait_for()
    seen.check()

    page.click("#tab-chat")
    page.click("summary:text('Settings')")
    assert page.locator("#chat-form select.store").input_value() == "rocks"
    page.fill("#max-tokens", "4")
    page.fill("#message", "whales")
    page.press("#message", "Control+Enter")
    page.locator(".sources .passage", has_text="Whales sing.").wait_for(state="attached")  # on a phone: folded
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#chat-form select.store").select_option("birds")
    assert chosen.input_value() == "birds"
    seen.check()

    page.click("#tab-search")
    (tmp_path / "odd.exe").write_bytes(b"MZ")
    page.set_input_files("#upload-files", tmp_path / "odd.exe")
    page.click("#upload-form button")
    page.locator("#upload-error", has_text="odd.exe: 'odd.exe' is of no kind that is read").wait_for()
    assert seen.text("#upload-status") == ""
    seen.context.close()


def test_who_may_not_upload_sees_no_control(browser: Any, served: Served) -> None:
    seen = enter(browser, served, "bob")
    seen.page.click("#tab-search")
    seen.page.locator("#search-form select.store").wait_for()
    assert seen.page.locator("#upload-form").is_hidden()
    seen.check()
    seen.context.close()
