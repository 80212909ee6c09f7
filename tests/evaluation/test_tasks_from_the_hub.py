"""`gemify eval` without --data: mteb and lm-eval load their tasks by datasets, from a stand-in of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_data
from gemify.cli.main import app
from gemify.evaluation.results import ResultStore
from running_hub import running_hub, use_hub
from tiny_gems import save_gem

mteb = pytest.importorskip("mteb")
lm_eval = pytest.importorskip("lm_eval")
ARC = [
    {"id": str(n), "question": f"What is {n}?", "answerKey": "AB"[n % 2]}
    | {"choices": {"text": [f"{n}", f"not {n}"], "label": ["A", "B"]}}
    for n in range(6)
]
CARD = b"""---
configs:
- config_name: ARC-Easy
  data_files:
  - {split: train, path: ARC-Easy/train.jsonl}
  - {split: test, path: ARC-Easy/test.jsonl}
---
"""


def rows(values: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in values).encode()


def test_both_harnesses_load_from_the_hub(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_gem(base_dir, tmp_path / "gem")
    sts = mteb.get_task("STSBenchmark").metadata.dataset
    with running_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        hub.repos[sts["path"]] = {"main": [{}], sts["revision"]: [{"test.jsonl": rows(tiny_data.sts())}]}
        tasks = Path(lm_eval.__file__).parent / "tasks" / "arc"
        manager = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
        monkeypatch.setattr("gemify.evaluation.lm_eval_tasks.task_manager", lambda stock: manager)  # all take seconds
        parts = {f"ARC-Easy/{part}.jsonl": rows(ARC) for part in ("train", "test")}
        hub.repos["allenai/ai2_arc"] = {"main": [{"README.md": CARD, **parts}]}
        command = ["eval", "--model", str(model), "--task", "STSBenchmark", "--task", "arc_easy", "--quiet"]
        done = CliRunner().invoke(app, [*command, "--device", "cpu", "--output", str(tmp_path / "scores")])
        assert done.exit_code == 0, done.output
        lost = CliRunner().invoke(app, ["eval", "--model", str(model), "--task", "SICK-R", "--output", str(tmp_path)])
    store = ResultStore(tmp_path / "scores")
    (entry,) = [entry for entry in store.entries() if entry.facts["kind"] == "gem"]
    assert -100 <= store.scores(entry)["STSBenchmark"]["score"] <= 100
    assert store.cells("language", entry)["arc_easy"]["n"] == len(ARC)
    assert lost.exit_code == 1
    assert "cannot load SICK-R from the hub" in str(lost.exception)
