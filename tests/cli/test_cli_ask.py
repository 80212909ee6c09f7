"""`gemify ask`, `chat` and `bench`: answers and sources on stdout, talk on stderr, one line for what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_models
from gemify.cli.ask import clean_text
from gemify.cli.main import app
from gemify.io.tables import parse_bytes
from tiny_gems import make_gem

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ask")
    gem = make_gem(tiny_models.save(root / "base"))
    gem.save_pretrained(root / "gem")
    (root / "docs").mkdir()
    (root / "docs" / "a.md").write_text("# Birds\n\nOwls hunt at night.\n")
    (root / "docs" / "b.txt").write_text("Tides follow the moon.\n")
    code, _, err = run("index", root / "docs", "-s", root / "store", "-m", root / "gem", "-q")
    assert code == 0, err
    return root / "store"


def run(*arguments: object, input: str | None = None) -> tuple[int, str, str]:
    done = RUNNER.invoke(app, [str(a) for a in arguments], input=input)
    error = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, done.stdout, done.stderr + error


def test_ask_answers_with_sources(store: Path) -> None:
    code, out, err = run("ask", "When do owls hunt?", "-s", store, "--max-new-tokens", 8, "-k", 1, "--mode", "fts")
    assert code == 0, err
    assert out.rstrip().splitlines()[-1].startswith("[1] ")
    assert "a.md" in out
    assert "prompt tokens run" in err
    code, asked, _ = run(
        "ask", "-s", store, "--max-new-tokens", 8, "-k", 1, "--mode", "fts", "--json", input="When do owls hunt?\n"
    )
    record = json.loads(asked)
    assert code == 0
    where = ["--where", "kind = 'txt'", "--max-new-tokens", 1, "--json"]
    asked = run("ask", "When do owls hunt?", "-s", store, *where)[1]
    assert [Path(s["file"]).name for s in json.loads(asked)["sources"]] == ["b.txt"]
    assert "the columns are file (text)" in run("ask", "owls?", "-s", store, "--where", "year = 1")[2]
    assert out.startswith(record["answer"])
    assert "Owls hunt at night." in record["sources"][0]["text"]
    assert record["timing"]["computed"] > 0


def test_reranking_changes_which_passages_are_given(store: Path) -> None:
    options = ["-s", store, "--max-new-tokens", 2, "-k", 1, "--mode", "fts", "--json"]
    question = "Owls hunt and tides follow the moon."
    sources = {
        name: json.loads(run("ask", question, *options, "--rerank", name)[1])["sources"] for name in ("none", "lm")
    }
    code, out, err = run("search", question, "-s", store, "-k", 2, "--mode", "fts", "--rerank", "lm", "--json")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 2
    assert found[0]["score"] > found[1]["score"]
    assert sources["lm"][0]["text"] == found[0]["text"]
    assert sources["lm"][0]["score"] == pytest.approx(found[0]["score"], abs=1e-4)
    assert sources["lm"][0]["text"] != sources["none"][0]["text"]
    for verb in ("ask", "search"):
        code, _, err = run(verb, question, "-s", store, "--rerank", "cross")
        assert code == 1
        assert "unknown rerank 'cross': choose one of none, bi, lm" in err


def test_kept_caches_serve_the_next_question(store: Path, tmp_path: Path) -> None:
    options = ["-s", store, "--keep-kv", "--kv-bits", 32, "--kv-store", tmp_path / "kv", "--max-new-tokens", 6, "-k", 1]
    plain = run("ask", "owls?", "-s", store, "--order", "passages-first", "--max-new-tokens", 6, "-k", 1, "--json")[1]
    first, second = (json.loads(run("ask", "owls?", *options, "--json")[1]) for _ in range(2))
    assert json.loads(plain)["answer"] == first["answer"] == second["answer"]
    assert second["timing"]["computed"] < first["timing"]["computed"]
    assert len(list((tmp_path / "kv").iterdir())) == 1


def test_caches_of_another_precision_or_base_are_not_used(store: Path, tmp_path: Path) -> None:
    docs, kv = store.parent / "docs", ["--kv-bits", 32, "--kv-store", tmp_path / "kv", "--keep-kv"]
    other = tiny_models.build("llama", seed=1)
    other.save_pretrained(tmp_path / "other")
    tiny_models.tokenizer().save_pretrained(tmp_path / "other")
    assert run("index", docs, "-s", store, "-q", "--dtype", "bfloat16", *kv)[0] == 0
    assert run("index", docs, "-s", store, "-q", "--base", tmp_path / "other", *kv)[0] == 0
    answers = [
        json.loads(run("ask", "owls?", "-s", store, "--max-new-tokens", 6, "-k", 1, "--json", *more)[1])
        for more in (["--order", "passages-first"], kv)
    ]
    assert answers[0]["answer"] == answers[1]["answer"]
    assert answers[0]["timing"]["computed"] == answers[1]["timing"]["computed"]


def test_caches_may_be_kept_ahead(store: Path, tmp_path: Path) -> None:
    docs, kv = store.parent / "docs", ["--kv-bits", 8, "--kv-store", tmp_path / "kv"]
    code, out, err = run("index", docs, "-s", store, "-q", "--keep-kv", *kv, "--json")
    assert code == 0, err
    assert json.loads(out)["kv_added"] == 2
    again = json.loads(run("index", docs, "-s", store, "-q", "--keep-kv", *kv, "--json")[1])
    assert (again["kv_added"], again["kv_files"]) == (0, 2)
    options = ["-s", store, "--max-new-tokens", 6, "-k", 1, "--json"]
    with_kept = json.loads(run("ask", "owls?", *options, "--keep-kv", *kv)[1])
    without = json.loads(run("ask", "owls?", *options, "--order", "passages-first")[1])
    assert with_kept["timing"]["computed"] < without["timing"]["computed"]
    small = json.loads(
        run("index", docs, "-s", store, "-q", "--keep-kv", "--kv-store", tmp_path / "s", "--kv-budget", "9k", "--json")[
            1
        ]
    )
    assert small["kv_bytes"] <= 9000


def test_chat_keeps_its_conversation(store: Path) -> None:
    code, out, err = run(
        "chat", "-s", store, "--max-new-tokens", 6, "--json", input="owls?\n\ntides?\n/quit\nnever read\n"
    )
    assert code == 0, err
    turns = [json.loads(line) for line in out.splitlines()]
    assert len(turns) == 2
    assert len(turns[0]["sources"]) == 2
    code, out, _ = run("chat", "-s", store, "--max-new-tokens", 6, input="owls?")
    assert code == 0
    assert "[1] " in out


def test_searches_are_timed(store: Path, tmp_path: Path) -> None:
    code, out, err = run("bench", "search", "-s", store, "--num-queries", 3, "-q", "-o", tmp_path / "record.json")
    assert code == 0, err
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["settings"]["passages"] == record["settings"]["queries"] == 2
    assert [row["name"] for row in record["rows"]] == ["vector", "fts", "hybrid"]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in record["rows"])
    assert out.count("\n| ") == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", " ", "-s", "STORE"], "no question given"),
        (["ask", "owls?", "-s", "missing"], "no store at"),
        (["ask", "owls?", "-s", "STORE", "--mode", "magic"], "unknown mode 'magic'"),
        (["ask", "owls?", "-s", "STORE", "--order", "sideways"], "unknown order 'sideways'"),
        (["ask", "owls?", "-s", "STORE", "--keep-kv", "--order", "question-first"], "need order 'passages-first'"),
        (["ask", "owls?", "-s", "STORE", "--keep-kv", "--kv-budget", "lots"], "a number of bytes such as 500MB"),
        (["ask", "owls?", "-s", "STORE", "--kv-budget", "1GB"], "they need --keep-kv"),
        (["ask", "owls?", "-s", "STORE", "--keep-kv", "--kv-bits", "5"], "bits must be one of"),
        (["ask", "owls?", "-s", "STORE", "--max-new-tokens", "5000"], "this model takes 1024 in all"),
        (["ask", "owls?", "-s", "STORE", "-m", "starterr"], "starterr"),
        (["bench", "rag", "--data", "missing", "--lengths", "a"], "whole numbers"),
        (["bench", "rag", "--data", "missing"], "has no corpus.jsonl"),
    ],
)
def test_wrong_use_is_one_line(store: Path, arguments: list[str], words: str) -> None:
    code, out, err = run(*[str(store) if a == "STORE" else a for a in arguments])
    assert code != 0
    assert words in err.replace("\n", " ").replace("  ", " ")
    assert out == ""


def test_a_question_of_odd_bytes_is_one_line(store: Path) -> None:
    """As every text in arguments: Latin-1 bytes would else give another vector than the text."""
    for verb in ("ask", "search"):
        code, _, err = run(verb, "owls\udcff?", "-s", store, "-k", 1)
        assert (code, err.strip().count("\n")) == (1, 0)
        assert "not UTF-8 text: convert it (iconv" in err
    assert clean_text(" owls\udcff?\n") == "owls??"


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(t) for t in (None, "500", "2GB", "1.5 mb", "3k")] == [None, 500, 2 * 10**9, 1_500_000, 3000]
    for wrong in ("", "GB", "-1", "0", "1 XB"):
        with pytest.raises(ValueError, match="such as 500MB"):
            parse_bytes(wrong)
