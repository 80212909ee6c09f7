"""The command as a user types it: results, exit codes, one-line errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gemify import GemModel, __version__
from gemify.cli.main import main
from tiny_gems import save_gem

QUIETLY = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
"""Two threads of a tiny model wait for each other on a busy machine."""


def gemify(*arguments: object, stdin: str | None = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gemify", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**QUIETLY, **environment},
    )


def run_main(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["gemify", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command in this process and gives its error, which must be one line and leave stdout empty."""

    def run(*arguments: object, code: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", ["gemify", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        assert exit.value.code == code, err
        assert out == ""
        if code == 1:
            lines = [line for line in err.splitlines() if line.strip()]
            assert len(lines) == 1, err
            assert lines[0].startswith("gemify: error: ")
        return err

    return run


@pytest.fixture(scope="module")
def saved(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gem(base_dir, tmp_path_factory.mktemp("saved") / "gem")


def test_version_and_help() -> None:
    assert gemify("--version").stdout.strip() == __version__
    for verb in ("train", "embed", "generate", "recover", "info"):
        assert run_main(verb, "--help").returncode == 0
        assert verb in run_main("--help").stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, gemify.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_train_then_everything_else(base_dir: Path, texts_file: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = ["--base", base_dir, "--data", texts_file, "--max-steps", 4, "--ntp-steps", 2, "--batch-size", 8]
    done = gemify("train", *flags, "--contrastive-batch-size", 16, "--eval-pairs", pairs_file, "-o", tmp_path / "gem")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "gem")
    assert re.search(r"trained 14,881 parameters for 4 steps: .* tokens/s.* peak memory", done.stderr)
    assert "STS Spearman" in done.stderr
    out = run_main("embed", "one", "two", "-m", tmp_path / "gem", "--normalize")
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert [r["text"] for r in rows] == ["one", "two"]
    assert np.linalg.norm(rows[0]["embedding"]) == pytest.approx(1.0, abs=1e-5)
    assert "tokens/s" in out.stderr
    facts = json.loads(run_main("info", tmp_path / "gem", "--verify", "--json").stdout)
    assert facts["logits_equal_base"] is True
    assert facts["training"]["steps"] == 4
    assert "special_tokens" in run_main("info", tmp_path / "gem").stdout


def test_embed_reads_and_writes_every_format(saved: Path, tmp_path: Path) -> None:
    texts = ["one", "two words", "three"]
    expected = GemModel.from_pretrained(saved).encode(texts)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    (tmp_path / "in.txt").write_text("\n".join(texts))
    npy, jsonl, parquet = (tmp_path / f"out.{e}" for e in ("npy", "jsonl", "parquet"))
    assert (
        run_main("embed", "-m", saved, "-i", tmp_path / "in.jsonl", "--text-column", "body", "-o", npy).returncode == 0
    )
    assert run_main("embed", "-m", saved, "-i", tmp_path / "in.txt", "-o", jsonl).returncode == 0
    (tmp_path / "gap.txt").write_text("one\n\nthree\n")
    assert run_main("embed", "-m", saved, "-i", tmp_path / "gap.txt", "-o", npy, "-q").returncode == 0
    assert np.load(npy).shape[0] == 3  # vector i is row i
    assert (
        run_main("embed", "-m", saved, "-i", tmp_path / "in.jsonl", "--text-column", "body", "-o", npy).returncode == 0
    )
    assert run_main("embed", "-m", saved, "-o", parquet, stdin="\n".join(texts)).stdout.strip() == str(parquet)
    np.testing.assert_allclose(np.load(npy), expected, atol=1e-5)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    np.testing.assert_allclose([r["embedding"] for r in rows], expected, atol=1e-5)
    table = pq.read_table(parquet)
    assert table["text"].to_pylist() == texts
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=1e-5)
    metrics = json.loads((tmp_path / "out.npy.metrics.json").read_text())
    assert metrics["texts"] == 3
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_memory_mb"] > 0


def test_generate_and_recover(saved: Path) -> None:
    gem = GemModel.from_pretrained(saved)
    plain = run_main("generate", "abc", "-m", saved, "--raw", "--max-new-tokens", 4, "--json", "--embedding")
    got = json.loads(plain.stdout)
    assert got["text"] == gem.generate("abc", max_new_tokens=4, do_sample=False)
    np.testing.assert_allclose(got["embedding"], gem.encode("abc"), atol=1e-5)
    chat = json.loads(run_main("generate", "-m", saved, "--max-new-tokens", 4, "--json", stdin="hi").stdout)
    assert chat["text"] == gem.chat([{"role": "user", "content": "hi"}], max_new_tokens=4, do_sample=False)
    back = json.loads(run_main("recover", "abc", "-m", saved, "--max-new-tokens", 4, "--json").stdout)
    assert back == {"text": "abc", "recovered": gem.recover("abc", max_new_tokens=4)}
    assert run_main("generate", "abc", "-m", saved, "--max-new-tokens", 2).returncode == 0


def test_a_config_file_and_flags_that_win(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"base: {base_dir}\ndata: {texts_file}\nmax_steps: 9\nntp_steps: 2\nlr: 1e-3\nbatch_size: 8\n"
    )
    done = run_main("train", "--config", tmp_path / "r.yaml", "--max-steps", 2, "-o", tmp_path / "gem", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_interrupt_saves_and_resume_goes_on(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    flags = [
        "train",
        "--base",
        base_dir,
        "--data",
        texts_file,
        "--max-steps",
        200,
        "--ntp-steps",
        150,
        "--batch-size",
        8,
    ]
    command = [*flags, "--contrastive-batch-size", 8, "-o", tmp_path / "gem", "--save-steps", 1000, "-q"]
    child = subprocess.Popen(
        [sys.executable, "-m", "gemify", *map(str, command)], stderr=subprocess.PIPE, text=True, env=QUIETLY
    )
    metrics = tmp_path / "gem" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size > 1000) and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 1, errors
    assert re.search(r"gemify: error: stopped at step \d+ of 200; go on with --resume", errors)
    done = gemify(*command, "--resume")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 201))


def test_bad_input_is_one_line(fails: Fails, saved: Path, base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "rows.jsonl").write_text('{"text": 5}\n')
    ok = ["--base", base_dir, "--data", texts_file, "-o", out]
    assert "no such data file" in fails("train", "--base", base_dir, "--data", tmp_path / "none.txt", "-o", out)
    assert "is empty" in fails("train", "--base", base_dir, "--data", tmp_path / "empty.txt", "-o", out)
    assert "not UTF-8 text" in fails("train", "--base", base_dir, "--data", tmp_path / "binary.txt", "-o", out)
    assert "must be text, got int" in fails("train", "--base", base_dir, "--data", tmp_path / "rows.jsonl", "-o", out)
    assert "give --data" in fails("train", "--base", base_dir, "-o", out)
    assert "k must be at least 1" in fails("train", *ok, "-k", 0)
    assert "unknown tune 'half'" in fails("train", *ok, "--tune", "half")
    assert "contradicts tune" in fails("train", *ok, "--mix", 0.5)
    assert "template must hold {text} exactly once" in fails("train", *ok, "--template", "in a word:")
    mined = ["mine", "-m", saved, "-o", tmp_path / "mined.jsonl", "--data"]
    assert "no such data file" in fails(*mined, tmp_path / "none.jsonl")
    assert "holds no pairs" in fails(*mined, texts_file)
    aligned = ["align", "--teacher", "st:x", "-m", saved, "--pairs"]
    assert "no such data file" in fails(*aligned, tmp_path / "none.jsonl")
    trained = ["align", "--teacher", "st:x", "--base", base_dir, "--data", texts_file, "-o", out]
    assert "no such data file" in fails(*trained, "--pairs", tmp_path / "none.jsonl")  # before anything is trained
    assert "row 1: no column 'anchor'" in fails(*aligned, tmp_path / "rows.jsonl")
    assert "unknown preset" in fails("train", *ok, "--preset", "best")
    assert "cannot load the model" in fails("train", "--base", "no/such", "--data", texts_file, "-o", out)
    assert "it is no GEM" in fails("embed", "x", "-m", base_dir)
    assert "no such GEM directory" in fails("embed", "x", "-m", tmp_path / "nowhere")
    assert "must end in one of" in fails("embed", "x", "-m", saved, "-o", tmp_path / "x.csv")
    assert "no text given" in fails("embed", "-m", saved)
    assert "no prompt named" in fails("embed", "x", "-m", saved, "--prompt-name", "query")
    assert "truncate_dim" in fails("embed", "x", "-m", saved, "--truncate-dim", 9999)
    assert "no prompt given" in fails("generate", "-m", saved)
    assert not out.exists()


def test_usage_errors_exit_with_2(fails: Fails) -> None:
    assert "Missing option" in fails("train", code=2)
    assert "No such option" in fails("embed", "x", "--nonsense", code=2)
    assert "not both" in fails("embed", "x", "-i", "y.txt", "-m", saved, code=2)
    assert "--json" in fails("generate", "x", "--embedding", "-m", saved, code=2)
    assert "Missing option '--model'" in fails("embed", "x", code=2)
    assert "Missing option" in fails("mine", "--data", "x.jsonl", code=2)
    assert "give --data and --output to train" in fails("align", "--teacher", "st:x", code=2)
    assert "--model only measures" in fails("align", "--teacher", "st:x", "-m", saved, code=2)
    steps = ["--pairs", "x.jsonl", "--max-steps", 2]
    assert "--model only measures" in fails("align", "--teacher", "st:x", "-m", saved, *steps, code=2)
    assert "No such command" in fails("nonsense", code=2)


def test_a_traceback_never_reaches_the_user(tmp_path: Path) -> None:
    """The same through a real process, once."""
    done = gemify("embed", "x", "-m", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gemify: error: no such GEM directory")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_while_writing(saved: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gemify", "embed", "x", "-m", str(saved)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["embed", "generate", "recover", "ask", "search"])
def test_bytes_that_are_not_utf8_are_one_line(saved: Path, fails: Fails, tmp_path: Path, command: str) -> None:
    argument = b"\xfcber".decode("utf-8", "surrogateescape")
    where = ("-s", tmp_path) if command in ("ask", "search") else ("-m", saved)
    assert "not UTF-8 text: convert it (iconv -f latin1 -t utf-8)" in fails(command, argument, *where)


@pytest.mark.parametrize("raw", [b"gr\xfc\xdfe\n", "grüße".encode("utf-16"), b"a\0b\n"])
@pytest.mark.parametrize("command", ["embed", "generate", "recover"])
def test_stdin_that_is_not_utf8_is_one_line(
    saved: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, command: str, raw: bytes
) -> None:
    monkeypatch.setattr(io, "StringIO", lambda _: io.TextIOWrapper(io.BytesIO(raw), "utf-8", "surrogateescape"))
    assert "stdin" in (error := fails(command, "-m", saved))
    assert "UTF-" in error


def test_stdin_is_read_as_a_file_is(saved: Path, tmp_path: Path) -> None:
    raw = "\ufeffthe cat\r\n  sat \r\nüber\r\n".encode()
    (tmp_path / "texts.txt").write_bytes(raw)
    out = [tmp_path / "a.npy", tmp_path / "b.npy"]
    subprocess.run(
        [sys.executable, "-m", "gemify", "embed", "-m", saved, "-q", "-o", out[0]], input=raw, check=True, env=QUIETLY
    )
    assert run_main("embed", "-m", saved, "-q", "-i", tmp_path / "texts.txt", "-o", out[1]).returncode == 0
    np.testing.assert_array_equal(np.load(out[0]), np.load(out[1]))
    assert len(np.load(out[0])) == 3


def test_long_texts_follow_the_policy(saved: Path, fails: Fails) -> None:
    long = "x" * 600
    cut = gemify("embed", "-m", saved, "-q", long, "a cat")
    assert cut.returncode == 0
    assert "1 of 2 texts were longer than the 511 tokens that this model embeds: cut at the end" in cut.stderr
    assert "a text has 600 tokens, this model embeds up to 511" in fails(
        "embed", "-m", saved, "--truncate", "error", long
    )
    whole = gemify("embed", "-m", saved, "-q", "--max-length", 1024, long)
    assert whole.returncode == 0
    assert not whole.stderr
    assert "unknown truncate 'left'" in fails("embed", "-m", saved, "--truncate", "left", long)
    assert "max_length must lie in 2..1024, got 9999" in fails("embed", "-m", saved, "--max-length", 9999, long)
