"""`gemify index` and `gemify search`: results on stdout, talk on stderr, one line for what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_models
from gemify.cli.main import app
from tiny_gems import save_gem

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return save_gem(tiny_models.save(root / "base"), root / "gem")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Birds\n\nOwls hunt at night.\n")
    (tmp_path / "docs" / "b.txt").write_text("Tides follow the moon.\n")
    (tmp_path / "docs" / "c.pdf").write_bytes(b"%PDF nothing")
    return tmp_path / "docs"


def run(*arguments: object) -> tuple[int, str, str]:
    done = RUNNER.invoke(app, [str(a) for a in arguments])
    error = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, done.stdout, done.stderr + error


def test_a_watched_directory_is_searchable_after_a_save(
    model: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first report is over all files, the second over what was saved; then Ctrl-C ends the command with 0."""
    store, reports = tmp_path / "store", []

    def after_a_report(record: dict[str, Any]) -> None:
        reports.append(record)
        if len(reports) == 1:
            (docs / "b.txt").write_text("Tides follow the sun too.\n")
        else:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("gemify.cli.index.print_json", after_a_report)
    code, _, err = run("index", docs, "--store", store, "--model", model, "--watch", "--json", "-q")
    assert code == 0, err
    assert [(len(r["added"]), r["changed"]) for r in reports] == [(2, ()), (0, (str(docs / "b.txt"),))]
    assert "the sun" in run("search", "sun", "--store", store, "--mode", "fts")[1]
    assert "leave one of them out" in run("index", docs, "--store", store, "--watch", "--limit", 3)[2]


def test_index_then_search(model: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    monkeypatch.chdir(model.parent)
    code, out, err = run(
        "index", docs, "--store", store, "--model", "gem", "--chunk-tokens", 64, "--chunk-overlap", 8, "-q"
    )
    assert (code, out) == (0, f"2 passages in {store}\n"), err
    assert "2 files added" in err
    assert "c.pdf: cannot be read as PDF" in err
    monkeypatch.chdir(tmp_path)  # the model's name in the store does not depend on where it was given
    code, out, _ = run("index", docs, "--store", store, "--json", "-q")
    facts = json.loads(out)
    assert (code, facts["unchanged"], facts["passages"], facts["added"]) == (0, 2, 2, [])
    assert facts["skipped"][0]["path"] == str(docs / "c.pdf")
    for mode in ("vector", "fts", "hybrid"):
        code, out, err = run("search", "owls hunt", "--store", store, "-k", 1, "--mode", mode, "--json")
        passage = json.loads(out)
        assert set(passage) == {"id", "text", "file", "place", "title", "heading", "score", "meta"}
        if mode == "fts":
            assert (passage["file"], passage["place"], passage["heading"]) == (str(docs / "a.md"), "lines 1-3", "Birds")
    code, out, _ = run("search", "owls", "--store", store, "--mode", "fts")
    assert out.startswith("[1] ")
    assert "    Owls hunt at night.\n" in out
    code, out, _ = run("index", docs, "--store", store, "-q", "--meta", "lang=de", "--meta", "year=2025")
    for where, found in (("lang = 'de' and kind = 'txt'", ["b.txt"]), ("year < 2025", [])):
        _, out, _ = run("search", "owls", "--store", store, "--where", where, "--json")
        assert [Path(json.loads(line)["file"]).name for line in out.splitlines()] == found
    assert json.loads(run("search", "owls", "-s", store, "--json", "-k", 1)[1])["meta"]["year"] == 2025.0
    code, out, err = run("search", "zebra", "--store", store, "--mode", "fts")
    assert (code, out, err) == (0, "", "nothing found\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "{docs}/none", "--store", "{tmp}/s", "--model", "{model}"], "no such file or directory"),
        (["index", "{docs}", "--store", "{docs}/b.txt", "--model", "{model}"], "it is a file"),
        (["index", "{docs}", "--store", "{tmp}/s", "--model", "{tmp}/none"], "no such GEM directory"),
        (["index", "{docs}", "--store", "{tmp}/s", "--model", "{model}", "--chunk-tokens", "8"], "at least 16"),
        (["index", "{docs}", "--store", "{tmp}/s", "--model", "{model}", "--chunk-overlap", "200"], "overlap must lie"),
        (["index", "{docs}", "--store", "{tmp}/s", "--model", "{model}", "--precision", "int3"], "unknown precision"),
        (["index", "{docs}", "--store", "{tmp}/s", "--model", "{model}", "--chunk-tokens", "2000"], "do not fit"),
        (["search", "a", "--store", "{tmp}/none"], "no store at"),
        (["search", "a", "--store", "{docs}"], "no store in"),
        (["search", "a", "--store", "{tmp}/none", "--mode", "magic"], "unknown mode"),
    ],
)
def test_what_goes_wrong_is_said(model: Path, docs: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    code, out, err = run(*(a.format(docs=docs, tmp=tmp_path, model=model) for a in arguments))
    assert (code, out) == (1, "")
    assert words in err
    assert not (tmp_path / "s" / "files.lance").exists()


def test_wrong_usage_is_code_2(docs: Path) -> None:
    assert run("index", docs)[0] == 2
    assert run("search", "a", "--store", "s", "-k", "0")[0] == 2


def test_files_are_left_out_and_forgotten(model: Path, docs: Path, tmp_path: Path) -> None:
    """What a pattern or ``.gitignore`` names is not read; a forgotten file is found no more, and stays on disk."""
    store = tmp_path / "store"
    (docs / "notes.log.txt").write_text("Rivers carry sand.\n")
    (docs / "secret.txt").write_text("Keys lie under the mat.\n")
    (docs / unicodedata.normalize("NFD", "Käuze.txt")).write_text("Owls hunt at night.\n")
    (docs / ".gitignore").write_text("secret.txt\n")
    common = ("--store", store, "--model", model, "--chunk-tokens", 64, "--chunk-overlap", 8, "-q")
    code, _, err = run("index", docs, *common, "--exclude", "*.log.txt", "--exclude", "c.pdf")
    assert code == 0, err
    assert sources(store) == {"a.md", "b.txt", unicodedata.normalize("NFD", "Käuze.txt")}
    code, _, err = run("forget", docs / "b.txt", docs / unicodedata.normalize("NFC", "Käuze.txt"), "--store", store)
    assert code == 0, err
    assert sources(store) == {"a.md"}
    assert (docs / "b.txt").is_file()


def sources(store: Path) -> set[str]:
    """Names of the files that a search over everything finds."""
    code, out, err = run("search", "the moon and the night", "-s", store, "-k", 9, "--json")
    assert code == 0, err
    return {Path(json.loads(line)["file"]).name for line in out.splitlines()}
