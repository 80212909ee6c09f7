"""Where a corpus is written: disks without hard links, file:// URIs, object stores that hold no table yet."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import FileLock

from gemify.io.directory import Directory
from gemify.retrieval.bulk.run import embed_corpus
from gemify.retrieval.document_store import Store
from gemify.retrieval.vector_table import Corpus, open_store, refuse_corpus
from rows_of_words import Words, read_back, write_inputs


def embed(inputs: list[Path], output: Path | str, **options: Any) -> int:
    return embed_corpus(inputs, output, Words(), model_name="words", shard_rows=20, **options).rows


@pytest.fixture(params=[errno.EPERM, errno.ENOTSUP, errno.EXDEV])
def _no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("_no_links")
def test_a_disk_without_hard_links(tmp_path: Path) -> None:
    inputs, directory = write_inputs(tmp_path / "in"), Directory(tmp_path / "out")
    assert embed(inputs, tmp_path / "out", limit=50) == 53
    assert embed(inputs, tmp_path / "out") == 150
    assert read_back(tmp_path / "out")["id"].to_pylist() == [f"d{n}" for n in range(150)]
    assert not directory.write_if_absent("done/0000000.json", b"second")
    assert b'"number": 0' in (directory.read("done/0000000.json") or b"")
    assert [p.name for p in (tmp_path / "out" / "done").glob(".*")] == []


@pytest.mark.usefixtures("_no_links")
def test_without_hard_links_two_that_write_at_once_take_turns(tmp_path: Path) -> None:
    directory, told = Directory(tmp_path), []
    second = threading.Thread(target=lambda: told.append(directory.write_if_absent("done/a.json", b"second")))
    with FileLock(tmp_path / ".first.lock"):
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it waits"
        directory.write("done/a.json", b"first")
    second.join()
    assert (told, directory.read("done/a.json")) == ([False], b"first")


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    out = tmp_path / "an out"
    assert embed(write_inputs(tmp_path / "in"), out.as_uri()) == 150
    assert len(Corpus.open(out)) == len(Corpus.open(out.as_uri())) == 150


def test_what_cannot_be_reached_is_said_in_one_line() -> None:
    for make, uri in ((Directory, "nowhere://bucket/x"), (Store.exists, "mock://bucket/x")):
        with pytest.raises(ValueError, match=f"{uri} cannot be .*: give a directory, or a URI") as said:
            make(uri)
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"skip_bad": True}, "holds nothing yet: run gemify embed-corpus again"),
        ({"format": "parquet"}, "is of Parquet files, which are not searched"),
    ],
)
def test_a_remote_corpus_without_a_table_is_known(
    options: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an object store only tables and named files are asked for, as here of a directory."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "owls"}\n' if "format" in options else '{"text": null}\n')
    embed([path], tmp_path / "out", **options)
    monkeypatch.setattr("gemify.retrieval.vector_table.is_remote", lambda uri: True)
    with pytest.raises(ValueError, match=says):
        open_store(tmp_path / "out")
    with pytest.raises(ValueError, match="is a corpus that gemify embed-corpus writes"):
        refuse_corpus(tmp_path / "out")
    with pytest.raises(ValueError, match="no store in"):
        open_store(tmp_path)
