"""Reproducing the paper's tables: their cells at every scale, and the running of them, interrupted and resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import gemify.reproduce.run
from gemify import GemModel
from gemify.evaluation.mteb_tasks import task_type
from gemify.evaluation.report.comparison import TABLES
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.io.signals import StopRequestedError
from gemify.reproduce.run import TABLE_NAMES, estimate_seconds, plan_cells, reproduce
from gemify.reproduce.tables import SCALES, cells_of, scale_of
from gemify.training.recipe import Recipe


class Suite:
    """Stands in for the evaluation suite: loads the model, and writes plausible figures into the store."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.fails_at = fails_at

    def __call__(self, model: str | None, **options: Any) -> Sequence[ModelEntry]:
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(Path(model or "vanilla").name)
        store = ResultStore(options["output"])
        if model is None:
            assert (options["baselines"], options["base"]) == (("mean",), self.base)
            entries = [
                ModelEntry("tiny/mean", "1", {"kind": "baseline"}),
                ModelEntry("tiny/base", "1", {"kind": "base"}),
            ]
            k, spoken = 0, entries[1]
        else:
            k = GemModel.from_pretrained(model).config.k
            entries = [ModelEntry(f"gem/{Path(model).name}", "1", {"kind": "gem", "path": model})]
            spoken = entries[0]
        for number, task in enumerate(options["plan"].vectors):
            result = {"scores": {"test": [{"main_score": 0.5 + 0.01 * k + 0.1 * number}]}, "evaluation_time": 1.0}
            path = store.directory / "results" / entries[0].folder / f"{task}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
        for name in [f"mmlu_{i}" for i in range(57)] if "mmlu" in options["plan"].language else []:
            group = "mmlu" if options["limit"] is None else f"mmlu, first {options['limit']}"
            store.write("language", spoken, name, {"group": group, "metrics": {"acc": 0.25}, "main": "acc"})
        if "held_out" in options["plan"].language:
            loss = {"group": "held_out", "metrics": {"loss": 4.125}, "main": "loss"}
            store.write("language", spoken, "held_out", loss)
        if options["plan"].recovery:
            rows = [{"tokens": n, "exact": n < 15, "token_f1": 0.9, "rouge_l": 0.5} for n in range(1, 41)]
            store.write("recovery", entries[0], "special_tokens", {"k": k, "rows": rows})
        return entries

    base = ""


@pytest.fixture
def go(
    base_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:  # a tiny base and rows short enough for it
    small = {**SCALES["starter"].recipe, "max_length": 24, "batch_size": 8, "contrastive_batch_size": 8}
    starter = scale_of("starter")
    monkeypatch.setitem(SCALES, "starter", type(starter)(**{**vars(starter), "recipe": small, "precision": "fp32"}))

    def run(table: str, suite: Suite, **options: Any) -> str:
        suite.base = str(base_dir)
        settings: dict[str, Any] = {"base": str(base_dir), "steps": 2, **options}
        path = reproduce(
            table,
            output=tmp_path / "out",
            data=None,
            training_data=str(texts_file),
            show_progress_bar=False,
            evaluate=suite,
            **settings,
        )
        return path.read_text()

    return run


@pytest.mark.parametrize("scale", sorted(SCALES))
@pytest.mark.parametrize("table", TABLE_NAMES)
def test_every_table_is_made_of_valid_recipes(table: str, scale: str) -> None:
    cells = cells_of(table, scale_of(scale))
    assert len({c.name for c in cells}) == len(cells)
    for cell in cells:
        if cell.recipe is not None:
            recipe = Recipe.from_dict({**cell.recipe, "data": "texts.txt"})
            assert recipe.max_steps == cell.steps == SCALES[scale].steps
            assert recipe.base == cell.base
    if table in TABLES:  # every row of ours that claims a twin has one, and none is forgotten
        printed = {row.label for row in TABLES[table].rows}
        twins = {c.paper for c in cells if c.paper is not None}
        assert twins <= printed
        if table in ("table2", "table3", "table4"):
            assert twins == printed
    assert [c.name for c in plan_cells(table, scale=scale)] == [c.name for c in cells]


def test_the_paper_scale_is_the_papers_recipe() -> None:
    paper = Recipe.from_dict({**cells_of("table3", scale_of("paper"))[2].recipe, "data": ""})  # type: ignore[dict-item]
    assert (paper.tune, paper.p, paper.max_steps, paper.ntp_steps) == ("full", 0.8, 1000, 100)
    assert (paper.lr, paper.contrastive_lr, paper.batch_size, paper.max_length) == (1e-4, 1e-5, 32, 512)
    assert paper.base == "meta-llama/Llama-3.2-1B"
    assert [c.base for c in cells_of("table5", scale_of("paper"))][::2] == [
        "meta-llama/Llama-3.2-1B",
        "meta-llama/Llama-3.2-3B",
        "meta-llama/Meta-Llama-3-8B",
    ]
    assert len(scale_of("paper").bases_of("table1")) == 4
    assert len({task_type(t) for t in scale_of("paper").vectors}) == 6


def test_equal_cells_of_two_tables_are_one_run() -> None:
    for name in SCALES:
        scale = scale_of(name)
        known: dict[str, Any] = {}
        for table in TABLE_NAMES:
            for cell in cells_of(table, scale):
                recipe = None if cell.recipe is None else Recipe.from_dict({**cell.recipe, "data": ""})
                assert known.setdefault(cell.name, recipe) == recipe


def test_scales_can_be_changed_and_wrong_ones_are_named(tmp_path: Path) -> None:
    scale = scale_of("paper", base="some/other-1B", steps=50, limit=3)
    assert (scale.steps, scale.ntp_steps, scale.limit) == (50, 5, 3)
    assert [c.name for c in cells_of("table5", scale)] == ["other-1B-vanilla", "other-1B-gem-k1"]
    assert scale_of("paper", base="mistralai/Mistral-7B-v0.1").bases[0].gem == "GEM Mistral-7B"
    options: dict[str, Any] = {"output": tmp_path, "data": None, "training_data": "x.txt"}
    for changes, message in [
        ({"table": "table9"}, "unknown table 'table9': choose one of table1,"),
        ({"scale": "huge"}, "unknown scale 'huge': choose one of starter, paper"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"limit": 0}, "limit must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            reproduce(**{"table": "table3", **options, **changes})
    assert not list(tmp_path.iterdir())


def test_a_table_is_run_once_and_says_all(go: Any, tmp_path: Path, base_dir: Path) -> None:
    first = Suite()
    page = go("table3", first)
    assert first.calls == [
        "vanilla",
        f"{base_dir.name}-ntp-p0.8",
        f"{base_dir.name}-gem-k1",
        f"{base_dir.name}-gated-ntp",
        f"{base_dir.name}-gated-k1",
    ]
    for row in TABLES["table3"].rows:  # the paper's figures beside ours
        assert f"| {row.label} | paper | {row.values[0]:.2f} | {row.values[1]:.2f} |" in page
    assert "| vanilla | ours | 55.00 | 25.00 |" in page
    assert "| + contrastive | ours | 56.00 | 25.00 |" in page
    for stated in (
        f"base: {base_dir}",
        "2 steps, 1 of them",
        "8 rows a step, 16 rows",
        "STSBenchmark, Banking77",
        "10",
    ):
        assert stated in page
    assert "evaluated in bfloat16" in page
    assert "gated rows are not the paper's: tune gated" in page
    assert "4.1250" in page
    assert "Not finished" not in page
    run = tmp_path / "out" / "runs" / f"{base_dir.name}-gem-k1"
    assert (run / "summary.json").is_file()
    assert not (run / "checkpoints").exists()
    again = Suite()
    assert go("table3", again) == page
    assert again.calls == []
    main = Suite()  # table 1 shares all of its cells with table 3
    page = go("table1", main)
    assert main.calls == []
    assert "GEM Llama-3.2-1B | paper | 40.59" in page
    assert "GritLM-7B (supervised) | paper | 50.60" in page
    assert f"GEM {base_dir.name} | ours | – | – | – | 51.00 | – | – | 61.00 | 25.00 |" in page
    cut = Suite()
    go("table3", cut, limit=4)  # asked otherwise: measured again, not trained again
    assert len(cut.calls) == 5


def test_ctrl_c_leaves_what_is_finished_and_a_rerun_goes_on(
    go: Any, tmp_path: Path, base_dir: Path, texts_file: Path
) -> None:
    options: dict[str, Any] = {"output": tmp_path / "out", "training_data": str(texts_file)}
    changes: dict[str, Any] = {"base": str(base_dir), "steps": 2}
    left = plan_cells("table5", **options, **changes)
    assert [c.steps for c in left] == [0, 2]
    assert estimate_seconds(left, tmp_path / "out") is None
    with pytest.raises(KeyboardInterrupt):
        go("table5", Suite(fails_at=1))  # trained, not evaluated
    page = (tmp_path / "out" / "table5.md").read_text()
    assert f"**Not finished: 1 of 2 cells** ({base_dir.name}-gem-k1)" in page
    assert f"| {base_dir.name} | ours | 55.00 | – | 25.00 | – |" in page
    assert "| 1B | paper | 18.29 | 54.35 | 31.70 | 28.30 |" in page
    assert "| 8B | paper | 26.67 | 54.48 | 66.70 | 57.24 |" in page
    assert [c.name for c in plan_cells("table5", **options, **changes)] == [f"{base_dir.name}-gem-k1"]
    metrics = tmp_path / "out" / "runs" / f"{base_dir.name}-gem-k1" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    suite = Suite()
    page = go("table5", suite)
    assert suite.calls == [f"{base_dir.name}-gem-k1"]
    assert metrics.stat().st_mtime_ns == before
    assert f"| {base_dir.name} | ours | 55.00 | 56.00 | 25.00 | 25.00 |" in page
    assert plan_cells("table5", **options, **changes) == []
    seconds = estimate_seconds(left, tmp_path / "out")
    assert seconds is not None
    assert seconds > 0


def test_a_stopped_training_goes_on_too(go: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = gemify.reproduce.run.train
    heard: list[str] = []

    def stops_at_the_second(recipe: Recipe, output: Path, **options: Any) -> Any:
        if heard:
            raise StopRequestedError("stopped at step 1 of 2; go on with --resume")
        heard.append(output.name)
        return real(recipe, output, **options)

    monkeypatch.setattr(gemify.reproduce.run, "train", stops_at_the_second)
    suite = Suite()
    with pytest.raises(StopRequestedError):
        go("table2", suite)
    assert suite.calls == heard
    assert "Not finished: 8 of 9 cells" in (tmp_path / "out" / "table2.md").read_text()
    monkeypatch.undo()


def test_recovery_is_shown_by_length(go: Any) -> None:
    suite = Suite()
    page = go("table6", suite)
    assert len(suite.calls) == 4
    assert "the paper prints examples, and no figures" in page
    assert "| GEM | 1-8 | 8 | 100.00 | 90.00 | 50.00 |" in page
    assert "| GEM | 9-16 | 8 | 75.00 | 90.00 | 50.00 |" in page
    assert "| gated | all | 40 | 35.00 | 90.00 | 50.00 |" in page
    assert "65+" not in page


def test_other_steps_in_the_same_output_are_refused(go: Any) -> None:
    go("table5", Suite())
    with pytest.raises(ValueError, match="cannot resume with another recipe: max_steps was 2, is 3"):
        go("table5", Suite(), steps=3)
