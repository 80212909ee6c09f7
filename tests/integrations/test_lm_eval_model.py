"""lm-eval's model ``gemify``: found by its entry point, and with the figures of lm-eval's own model of the base."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from tiny_gems import save_gem

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: opposites
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{word}}}} is not"
doc_to_choice: choices
doc_to_target: 0
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = [("cold", "hot"), ("low", "high"), ("wet", "dry"), ("old", "young")]
    rows = [{"word": a, "choices": [f" {b}", f" {a}", " a stone"]} for a, b in words]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "opposites.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    return tmp_path / "tasks"


def answers(model: Any, options: dict[str, Any], tasks: Path) -> list[Any]:
    manager = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, options, tasks=["opposites"], task_manager=manager, bootstrap_iters=0, device="cpu"
    )
    return [[answer for (answer,) in sample["resps"]] for sample in found["samples"]["opposites"]]


def test_a_gated_gem_answers_as_its_base(base_dir: Path, tmp_path: Path, tasks: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, target),) = project["entry-points"]["lm_eval.models"].items()
    model = EntryPoint(name, target, "lm_eval.models").load()
    assert lm_eval.api.registry.get_model("gemify") is model
    ours = answers("gemify", {"pretrained": str(save_gem(base_dir, tmp_path / "gem"))}, tasks)
    stock = answers("hf", {"pretrained": str(base_dir), "dtype": "float32"}, tasks)
    assert len(ours) == 4
    for one, other in zip(ours, stock, strict=True):
        assert [s for s, _ in one] == pytest.approx([s for s, _ in other], abs=1e-4)
        assert [greedy for _, greedy in one] == [greedy for _, greedy in other]


@pytest.mark.long  # the command reads all of lm-eval's own tasks
def test_the_command(
    base_dir: Path, tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_gem(base_dir, tmp_path / "gem")
    command = ["lm_eval", "run", "--model", "gemify", "--model_args", f"pretrained={model}"]
    monkeypatch.setattr(sys, "argv", [*command, "--tasks", "opposites", "--include_path", str(tasks)])
    monkeypatch.setattr(lm_eval.api.registry.model_registry, "_objs", dict(lm_eval.api.registry.model_registry._objs))
    lm_eval.api.registry.model_registry._objs.pop("gemify", None)
    runpy.run_module("gemify.integrations.lm_eval", run_name="__main__")
    assert "|opposites|" in capsys.readouterr().out
