"""`gemify eval`, `report` and `reproduce` as a user types them, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mteb")
pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")
pytest.importorskip("markdown_it")

import gemify.evaluation.suite
import tiny_data
from gemify.cli.main import main
from tiny_gems import save_gem

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failure, with nothing on stdout."""
        assert (self.code, self.out) == (1, ""), self
        lines = [line for line in self.err.splitlines() if line.startswith("gemify: error: ")]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0])
        return lines[0]


Command = Callable[..., Done]


@pytest.fixture
def gemify_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["gemify", *map(str, arguments)])
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return Done(int(exit.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.write(tmp_path_factory.mktemp("data") / "all")


@pytest.fixture
def saved(base_dir: Path, tmp_path: Path) -> Path:
    return save_gem(base_dir, tmp_path / "my-gem", special_tokens=2)


@pytest.fixture
def flags(saved: Path, data: Path, tmp_path: Path) -> list[object]:
    return ["eval", "-m", saved, "--data", data, "-o", tmp_path / "out", "--device", "cpu", "-q"]


def test_the_quick_suite_from_end_to_end(gemify_: Command, flags: list[object], tmp_path: Path) -> None:
    done = gemify_(*flags, "--limit", 4)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert done.out.splitlines() == [str(out / "report.md"), str(out / "report.html")]
    # Two vector tasks; recovery from one token and from both; cost; four language tasks twice; the gate.
    assert done.err.startswith("14 of 14 cells to run, about ")
    assert len(done.err.splitlines()) == 1
    text = (out / "report.md").read_text()
    for heading in ("Embedding", "Language kept", "Logits beside the base's", "Recovery", "Cost of encoding"):
        assert f"\n## {heading}" in text
    assert "equal bit for bit" in text
    assert text.count("| 0 (identical) |") == 4
    assert "SUBSET RUN" in text
    assert "<script" not in (out / "report.html").read_text()
    (cost,) = (out / "cost").rglob("encode.json")
    cell = json.loads(cost.read_text())
    assert cell["device"] == "cpu"
    assert cell["texts"] == 16
    assert cell["tokens_per_second"] > 0
    assert 0 < cell["milliseconds_a_query"] <= cell["milliseconds_a_query_p95"]
    again = gemify_(*flags, "--limit", 4)
    assert (again.code, again.out) == (0, done.out)
    assert again.err == "all 14 cells are finished\n"


def test_tasks_by_name_baselines_and_a_card(gemify_: Command, flags: list[object], saved: Path, tmp_path: Path) -> None:
    done = gemify_(*flags, "-t", "STSBenchmark", "-t", "lambada", "--baselines", "mean, echo", "--card")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(saved / "README.md")
    assert "5 of 5 cells to run" in done.err
    models = sorted(p.parent.name for p in (tmp_path / "out/models").rglob("*.json"))
    assert models == ["gem__my-gem", "llama__base", "llama__echo", "llama__mean"]
    card = (saved / "README.md").read_text()
    assert "STSBenchmark" in card
    assert "model-index:" in card
    again = gemify_(*flags, "-t", "STSBenchmark", "--instructions")
    assert "1 of 1 cells to run" in again.err
    report = gemify_("report", tmp_path / "out", "-o", tmp_path / "report")
    assert report.code == 0
    listed = [Path(line) for line in report.out.splitlines()]
    assert {p.name for p in listed} >= {"report.md", "report.html"}
    assert all(p.is_file() for p in listed)
    text = listed[0].read_text()
    assert "with instructions" in text
    assert "llama, Echo" in text
    assert len(list((tmp_path / "out/results").rglob("STSBenchmark.json"))) == 4


def test_a_cell_that_fails_is_an_error_with_a_report(gemify_: Command, flags: list[object], tmp_path: Path) -> None:
    mine = tiny_data.write(tmp_path / "mine")
    (mine / "mteb/sts/STS12.test.jsonl.gz").write_bytes(b"broken")
    mended = [mine if argument == flags[4] else argument for argument in flags]
    said = gemify_(*mended, "-t", "STS12", "-t", "STS13").error
    assert "1 of 2 cells failed" in said
    assert "STS12.test.jsonl.gz: a damaged .gz file" in said
    text = (tmp_path / "out/report.md").read_text()
    assert "STS13" in text
    assert "STS12 |" not in text


def test_an_interruption_leaves_a_report(
    gemify_: Command, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gemify.evaluation.suite, "run_language_task", interrupted)
        done = gemify_(*flags, "-t", "STS12", "-t", "lambada")
    assert done.code != 0
    assert "Traceback" not in done.err
    assert "STS12" in (tmp_path / "out/report.md").read_text()
    assert "2 of 3 cells to run" in gemify_(*flags, "-t", "STS12", "-t", "lambada").err


def test_wrong_names_are_one_line(gemify_: Command, flags: list[object], saved: Path, tmp_path: Path) -> None:
    assert "STSBenchmrk is not among the local tasks" in gemify_(*flags, "-t", "STSBenchmrk").error
    hub = [a for a in flags if a not in ("--data", flags[4])]
    assert "Did you mean: 'STSBenchmark'?" in gemify_(*hub, "-t", "STSBenchmrk").error
    assert "unknown suite 'quik'" in gemify_(*flags, "--suite", "quik").error
    assert "unknown baseline 'median'" in gemify_(*flags, "-t", "STS12", "--baselines", "median").error
    assert "unknown encoder 'foo': write st:PATH" in gemify_(*flags, "-t", "STS12", "--encoder", "foo").error
    assert "unknown dtype 'float8'" in gemify_(*flags, "-t", "STS12", "--dtype", "float8").error
    assert "no such GEM directory" in gemify_(*flags, "-m", tmp_path / "none").error
    assert "nothing to evaluate" in gemify_("eval", "-o", tmp_path / "out", "--suite", "lm").error
    alone = gemify_("eval", "-o", tmp_path / "out", "--base", saved, "--data", flags[4], "-t", "STS12")
    assert "nothing to measure" in alone.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "-m", "x"], "Missing option '--output'"),
        (["eval", "-o", "x", "--limit", "1"], "--limit"),
        (["eval", "-o", "x", "--batch-size", "0"], "--batch-size"),
        (["eval", "-o", "x", "--card"], "--card needs --model"),
        (["eval", "-o", "x", "--card", "-m", "org/model"], "org/model is none"),
        (["report"], "Missing argument"),
        (["reproduce", "table1", "-o", "x"], "Missing option '--training-data'"),
        (["reproduce", "table1", "--training-data", "x"], "Missing option '--output'"),
    ],
)
def test_wrong_usage(gemify_: Command, arguments: list[str], said: str) -> None:
    done = gemify_(*arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_report_of_nothing(gemify_: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no evaluated model" in gemify_("report", tmp_path / "empty", "-o", tmp_path / "r").error
    assert "does not exist" in gemify_("report", tmp_path / "none", "-o", tmp_path / "r").error
    assert not (tmp_path / "r").exists()


def test_reproduce_lists_what_it_would_run(gemify_: Command, texts_file: Path, tmp_path: Path) -> None:
    common = ["-o", tmp_path / "out", "--training-data", texts_file]
    done = gemify_("reproduce", "table3", *common, "--json", "--steps", 7)
    assert (done.code, done.err) == (0, "")
    cells = json.loads(done.out)
    assert len(cells) > 1
    assert all(set(cell) == {"name", "label", "steps"} for cell in cells)
    assert len({cell["name"] for cell in cells}) == len(cells)
    assert {cell["steps"] for cell in cells} <= {0, 7}
    assert 7 in {cell["steps"] for cell in cells}
    assert not (tmp_path / "out").exists()
    said = gemify_("reproduce", "table9", *common).error
    assert "table9" in said
    assert "table1" in said
    assert "galaxy" in gemify_("reproduce", "table3", *common, "--scale", "galaxy").error
