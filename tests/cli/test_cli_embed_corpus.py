"""`gemify embed-corpus` and `gemify bench vectors`: results on stdout, talk on stderr, one line for what goes wrong."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_models
from gemify.cli.main import app, main
from tiny_gems import save_gem

RUNNER = CliRunner()


def run(*arguments: object) -> tuple[int, str, str]:
    done = RUNNER.invoke(app, [str(a) for a in arguments])
    error = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, done.stdout, done.stderr + error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return save_gem(tiny_models.save(root / "base"), root / "gem")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [{"_id": f"q{n}", "text": f"number {n} of the owls {'x' * n}"} for n in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return path


@pytest.mark.usefixtures("one_thread")
def test_embed_then_search(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(model.parent)
    code, _, err = run("embed-corpus", rows, "-o", out, "-m", "gem", "--shard-rows", 8, "-q")
    assert (code, err) == (
        1,
        f"{rows} row 31: not JSON: give one JSON object a line (--skip-bad leaves such rows out)",
    )
    monkeypatch.chdir(tmp_path)  # the model's name in the corpus does not depend on where it was given
    code, shown, err = run("embed-corpus", rows, "-o", out, "--skip-bad", "--limit", 1, "--json", "-q")
    facts = json.loads(shown)
    assert (code, facts["embedded"], facts["rows"], facts["skipped"]) == (0, 6, 30, 1), err
    assert "row 31: not JSON" in err
    code, shown, err = run("embed-corpus", rows, "-o", out, "--skip-bad", "-q")
    assert (code, shown) == (0, f"30 rows in {out}\n")
    assert "0 rows embedded" in err
    code, shown, _ = run("search", "number 7 of the owls", "--store", out, "--mode", "fts", "-k", 1, "--json")
    assert json.loads(shown)["id"] == "q7"
    code, shown, err = run("search", "number 7 of the owls xxxxxxx", "--store", out, "--mode", "vector", "-k", 1)
    assert (code, f"{out}, row q7" in shown) == (0, True), err
    code, _, err = run("index", rows, "--store", out)
    assert (code, "is a corpus that gemify embed-corpus writes" in err) == (1, True)
    code, _, err = run("embed-corpus", tmp_path / "none.parquet", "-o", out)
    assert (code, err) == (1, f"no such file or directory: {tmp_path / 'none.parquet'}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("LanceError(IO): No space left on device (os error 28), /somewhere/in/lance/structural.rs:254:9"),
    ],
)
def test_a_full_disk(
    full: OSError,
    model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was done stays, and once there is room the same command ends with the table of a run left alone."""
    import lance

    def command(out: Path) -> list[str]:
        return ["embed-corpus", str(rows), "-o", str(out), "-m", str(model), "--shard-rows", "8", "--skip-bad", "-q"]

    write = lance.fragment.write_fragments
    written: list[Any] = []

    def write_until_full(*given: Any, **options: Any) -> Any:
        if len(written) == 2:
            raise full
        written.append(write(*given, **options))
        return written[-1]

    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(lance.fragment, "write_fragments", write_until_full)
        broken.setattr("gemify.retrieval.bulk.executors.time.sleep", lambda seconds: None)
        broken.setattr(sys, "argv", ["gemify", *command(out)])
        with pytest.raises(SystemExit) as ended:
            main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1
    assert "No space left on device" in said
    assert "what is done stays, make room and run the same command again" in said
    assert ".rs:" not in said
    assert sorted(p.name for p in (out / "done").iterdir()) == ["0000000.json", "0000001.json"]
    code, shown, _ = run(*command(out), "--json")
    assert (code, json.loads(shown)["embedded"]) == (0, 14)
    assert run(*command(tmp_path / "whole"))[0] == 0
    there = [lance.dataset(str(at / "corpus.lance")).to_table() for at in (out, tmp_path / "whole")]
    assert there[0].equals(there[1])


@pytest.mark.usefixtures("one_thread")
def test_a_pq_index_on_few_rows_is_said_not_to_be(model: Path, rows: Path, tmp_path: Path) -> None:
    command = ("embed-corpus", rows, "-o", tmp_path / "out", "-m", model, "--skip-bad", "-q", "--index", "pq")
    code, _, err = run(*command)
    assert (code, "no pq index on 30 rows (it needs 256)" in err, "indexed: text" in err) == (0, True, True)


def test_bench_vectors(tmp_path: Path) -> None:
    """Exact search finds what numpy finds, and nothing of the vectors is left on the disk."""
    code, shown, err = run(
        *("bench", "vectors", "--num-vectors", 2000, "--dim", 32, "--num-queries", 10),
        *("--only", "exact", "--only", "binary"),
        *("--directory", tmp_path, "--output", tmp_path / "record.json", "-q"),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "record.json").read_text())
    recall = {row["name"]: row["recall_at_10"] for row in record["rows"]}
    assert recall["exact"] >= 0.99
    assert 0.2 < recall["binary"] < 1
    assert record["write"]["float16"]["disk_bytes"] >= 2000 * 32 * 2
    assert "| exact |" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    code, _, err = run("bench", "vectors", "--dim", 30)
    assert (code, "dim must be a multiple of 8" in err) == (1, True)
