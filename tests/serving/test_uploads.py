"""Files that clients put into a store: found at once, as `gemify index` has them, or the store stays as it was."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from filelock import FileLock

import tiny_models
from children import killed_at, upload_in_child
from gemify import GemModel
from gemify.retrieval.index import GemIndex
from gemify.serving import server as server_module
from gemify.serving import upload
from gemify.serving.auth import KeyRing
from gemify.serving.settings import ServerSettings
from running_server import Served, indexed, serving
from tiny_gems import make_gem

KEYS = {"ann": "secret-of-ann", "bob": "secret-of-bob"}
ANN, BOB = ({"authorization": f"Bearer {key}"} for key in KEYS.values())
NOTES = "# Whales\n\n" + "Whales sing in the deep sea. " * 30
ROUTE = "/v1/stores/store/files"


@pytest.fixture
def index(tmp_path: Path, one_thread: None) -> GemIndex:
    return indexed(tmp_path, {"owls.txt": "Owls hunt at night.\n" * 9}, tokens=64)


@pytest.fixture
def served(index: GemIndex) -> Iterator[Served]:
    with serving(index.model, index=index, keys=KEYS, upload_key=("ann",), max_body_bytes=1 << 16) as running:  # type: ignore[arg-type]
        yield running


def put(
    served: Served, name: str, content: str | bytes = NOTES, *, headers: Any = ANN, route: str = ROUTE
) -> httpx.Response:
    with served.http(headers=headers) as http:
        return http.post(route, files={"file": (name, content)})


def content_of(index: GemIndex) -> tuple[Any, ...]:
    """What a store has, and what is on the disk beside it."""
    uploads = Path(index.store.uri) / "uploads"
    on_disk = {path.name: path.read_bytes() for path in uploads.iterdir()} if uploads.is_dir() else {}
    return sorted((p.id, p.text) for p in index.passages()), sorted(index.files().items()), on_disk


def require_refusal(response: httpx.Response, status: int, code: str | None, words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert "/tmp" not in response.text


def test_a_file_is_found_at_once_as_the_library_would_have_it(served: Served, index: GemIndex, tmp_path: Path) -> None:
    def found() -> list[str]:
        body = {"query": "whales sing", "k": 1, "mode": "fts"}
        return [p["text"] for p in served.post("/v1/search", body, **ANN).json()["data"]]

    assert found() == []
    got = put(served, "notes.md").json()
    (tmp_path / "notes.md").write_text(NOTES)
    alone = GemIndex.open(tmp_path / "alone", index.model, tokens=64, overlap=8)
    alone.add(tmp_path / "notes.md")
    assert got == {
        "id": "notes.md",
        "store": "store",
        "bytes": len(NOTES),
        "num_passages": len(alone),
        "skipped": [],
    }
    path = str(Path(index.store.uri) / "uploads" / "notes.md")
    ours = {row["ordinal"]: row for row in index.store.rows() if row["file"].endswith("notes.md")}  # type: ignore[union-attr]
    theirs = {row["ordinal"]: row for row in alone.store.rows()}  # type: ignore[union-attr]
    assert len(ours) == len(theirs) > 2
    for number, row in theirs.items():
        assert {n: ours[number][n] for n in ("text", "title", "heading", "place")} == {
            n: row[n] for n in ("text", "title", "heading", "place")
        }
        np.testing.assert_allclose(ours[number]["vector"], row["vector"], atol=1e-5)
    assert "Whales sing" in found()[0]
    assert GemIndex.open(index.store.uri, index.model).add(path).unchanged == 1, "`gemify index` knows it"

    before = content_of(index)
    assert put(served, "notes.md").json() == got
    assert content_of(index) == before
    changed = put(served, "notes.md", "Bees dance.").json()
    assert (changed["num_passages"], found()) == (1, [])
    with served.http(headers=ANN) as http:
        assert http.delete(f"{ROUTE}/notes.md").status_code == 204
        require_refusal(http.delete(f"{ROUTE}/notes.md"), 404, "file_not_found", "no file 'notes.md'")
        require_refusal(http.delete(f"{ROUTE}/owls.txt"), 404, "file_not_found", "was put into this store")
    assert [Path(name).name for name in index.files()] == ["owls.txt"]


def test_parts_that_cannot_be_read_are_told(served: Served) -> None:
    rows = [json.dumps({"text": "Bees dance."}), "{", json.dumps({"text": "Whales sing."})]
    got = put(served, "rows.jsonl", "\n".join(rows)).json()
    assert (got["num_passages"], len(got["skipped"])) == (2, 1)
    assert "row 2" in got["skipped"][0]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../../evil.md", "evil.md"),
        ("C:\\docs\\Über uns.md", "Über uns.md"),
        (".hidden.md", "hidden.md"),
        ("a\x7f\u202eb.md", "ab.md"),
        ("🐋.TXT", "🐋.TXT"),
    ],
)
def test_names_are_of_a_file_in_the_store(served: Served, index: GemIndex, name: str, kept: str) -> None:
    assert put(served, name).json()["id"] == kept
    assert [path.name for path in (Path(index.store.uri) / "uploads").iterdir()] == [kept]
    with served.http(headers=ANN) as http:
        assert http.delete(f"{ROUTE}/{kept}").status_code == 204


def test_only_a_key_that_may_uploads(served: Served, index: GemIndex) -> None:
    before = content_of(index)
    require_refusal(put(served, "a.md", headers={}), 401, "invalid_api_key", "no API key")
    require_refusal(put(served, "a.md", headers=BOB), 403, "no_upload", "--upload-key names the keys that may")
    with served.http() as http:
        assert http.get("/v1/stats", headers=ANN).json()["can_upload"] is True
        assert http.get("/v1/stats", headers=BOB).json()["can_upload"] is False
        require_refusal(http.delete(f"{ROUTE}/owls.txt", headers=BOB), 403, "no_upload", "this key")
    with serving(served.gem, index=index, upload_key=("anonymous",)) as open_to_all:
        require_refusal(put(open_to_all, "a.md", headers={}), 403, "no_upload", "--upload-key")
    assert content_of(index) == before
    with pytest.raises(ValueError, match=r"--upload-key eve: there is no API key of this name"):
        server_module.require_keys(ServerSettings(upload_key=("ann", "eve")), KeyRing(KEYS.items()))


def test_what_is_no_file_is_refused_and_changes_nothing(served: Served, index: GemIndex) -> None:
    assert put(served, "notes.md").status_code == 200
    before = content_of(index)
    require_refusal(put(served, "a.md", route="/v1/stores/sky/files"), 404, "store_not_found", "has 'store'")
    require_refusal(put(served, "a.exe"), 415, "unknown_kind", "'a.exe' is of no kind that is read: give ")
    require_refusal(put(served, "a.txt.gz"), 415, "unknown_kind", ".pdf")
    require_refusal(put(served, "..", "a"), 400, "invalid_value", "name")
    require_refusal(put(served, "a" * 300 + ".md"), 400, "invalid_value", "1 to 200 bytes")
    for name, content in {"notes.md": b"\0\xff", "notes.txt": b"\xff\xfe", "a.pdf": b"no PDF", "b.docx": b"PK"}.items():
        require_refusal(put(served, name, content), 400, "unreadable_file", f"{name}: ")
    require_refusal(put(served, "large.txt", "a" * (1 << 16)), 413, None, "larger than")
    with served.http(headers=ANN) as http:
        for given, status, words in (
            ({"json": {"file": "a"}}, 415, "multipart/form-data"),
            ({"data": {"file": "a"}, "files": {"other": ("a.md", "a")}}, 400, "one field, file"),
            ({"files": [("file", ("a.md", "a")), ("file", ("b.md", "b"))]}, 400, "Too many files"),
            ({"data": {"purpose": "a"}, "files": {"file": ("a.md", "a")}}, 400, "one field, file"),
            ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
            ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "send a form"),
        ):
            refused = http.post(ROUTE, **given)  # type: ignore[arg-type]
            require_refusal(refused, status, refused.json()["error"]["code"], words)
    with FileLock(Path(index.store.uri) / ".lock"):
        busy = put(served, "notes.md", "Bees dance.")
        require_refusal(busy, 503, "store_busy", "written by another process")
        assert int(busy.headers["retry-after"]) > 0
    assert content_of(index) == before


def test_the_limits_of_the_key_hold(index: GemIndex) -> None:
    limits = {"tokens_per_minute": 1000, "requests_per_minute": 4}
    with serving(index.model, index=index, keys=KEYS, upload_key=("ann",), **limits) as served:  # type: ignore[arg-type]
        before = content_of(index)
        assert put(served, "a.md", "a. " * 300).status_code == 200
        require_refusal(put(served, "notes.md"), 429, "rate_limit_exceeded", "tokens a minute")
        with served.http(headers=ANN) as http:
            assert http.delete(f"{ROUTE}/a.md").status_code == 204
            assert http.delete(f"{ROUTE}/a.md").status_code == 404
            require_refusal(http.delete(f"{ROUTE}/a.md"), 429, "rate_limit_exceeded", "requests a minute")
        assert content_of(index) == before


def test_a_client_that_goes_leaves_the_store_as_it_was(served: Served, index: GemIndex) -> None:
    assert put(served, "notes.md", "Bees dance.").status_code == 200
    before = content_of(index)
    form = httpx.Request("POST", served.url + ROUTE, headers=ANN, files={"file": ("notes.md", NOTES)})
    head = [f"{name}: {value}" for name, value in form.headers.items()]
    raw = "\r\n".join([f"POST {ROUTE} HTTP/1.1", *head, "", ""]).encode() + form.read()
    with served.engine.paused(), served.connect() as peer:
        peer.sendall(raw)
        served.wait_until(lambda: served.engine.stats().num_waiting_texts)
    served.wait_until(lambda: not served.app.state.gemify.metrics.in_flight_now)
    assert put(served, "last.md", "Bees dance.").status_code == 200, "one at a time: the other has ended"
    with served.http(headers=ANN) as http:
        assert http.delete(f"{ROUTE}/last.md").status_code == 204
    assert content_of(index) == before
    assert served.engine.stats().num_waiting_texts == 0


def test_a_store_that_is_gone_or_another_models_takes_no_files(served: Served, index: GemIndex, tmp_path: Path) -> None:
    shutil.rmtree(index.store.uri)
    require_refusal(put(served, "notes.md"), 503, "store_unavailable", "the index cannot be read now")
    assert not Path(index.store.uri).exists()
    other = make_gem(tiny_models.save(tmp_path / "other"), seed=9)
    foreign = GemIndex.open(index.store.uri, other, tokens=64, overlap=8)
    foreign.add(tmp_path / "owls.txt")
    before = content_of(foreign)
    require_refusal(put(served, "notes.md"), 503, "store_unavailable", "the index cannot be read now")
    assert content_of(foreign) == before


@pytest.mark.long
def test_an_upload_killed_at_any_step_is_whole_or_nothing(
    index: GemIndex, tmp_path: Path, server: ForkServerContext
) -> None:
    assert isinstance(index.model, GemModel)
    index.model.save_pretrained(tmp_path / "gem")
    gem = GemModel.from_pretrained(tmp_path / "gem")

    def passages(store: Path) -> dict[str, str]:
        return {p.text: Path(p.file).name for p in GemIndex.open(store, gem).passages()}

    def upload_here(store: Path) -> None:
        upload._add(GemIndex.open(store, gem), store / "uploads" / "notes.md", NOTES.encode())

    shutil.copytree(index.store.uri, tmp_path / "whole")
    nothing = passages(tmp_path / "whole")
    upload_here(tmp_path / "whole")
    whole = passages(tmp_path / "whole")
    assert len(whole) > len(nothing) + 2
    for step, expected in {
        1: nothing,
        4: nothing,
        6: whole,
        8: whole,
    }.items():  # of remove, append, ...
        store = tmp_path / f"store{step}"
        shutil.copytree(index.store.uri, store)
        given = str(tmp_path / "gem"), str(store), "notes.md", NOTES
        assert killed_at(server, upload_in_child, *given, kill_after=step) == (step, -signal.SIGKILL)
        assert passages(store) == expected, step
        upload_here(store)
        assert passages(store) == whole
