"""The model card: measured figures only, and whatever its owner wrote around them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("markdown_it")

from huggingface_hub import ModelCard

from gemify.evaluation.report.render import write_card
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.model.config import CONFIG_FILE, GemConfig
from gemify.model.hub import CARD_FILE


@pytest.fixture
def gem(tmp_path: Path) -> Path:
    """A GEM directory as far as a card needs one."""
    return save(tmp_path / "my-gem", tune="gated")


def save(directory: Path, **settings: Any) -> Path:
    config = GemConfig(base="org/small-lm", special_tokens=("<a>", "<b>"), special_ids=(3, 4), **settings)
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(config.to_json())
    return directory


def measured(directory: Path, *, sts: float = 0.7125, limit: int | None = None, gate: bool = True) -> Any:
    """A store and its subject, with two scores, a language task beside its base's, and the gate."""
    store = ResultStore(directory)
    common = {"dtype": "float32", "limit": limit, "instructions": False}
    base = ModelEntry("small-lm/base", "b", {"label": "small-lm", "kind": "base", **common})
    revision = "w-float32" + (f"-limit{limit}" if limit else "")
    pair = {"name": base.name, "revision": base.revision}
    entry = ModelEntry(
        "gem/my-gem", revision, {"label": "GEM gated: my-gem", "kind": "gem", "base_subject": pair, **common}
    )
    for one in (base, entry):
        store.register(one)
        samples = [1.0, 0.0, 0.0, 1.0] if one is base else [1.0, 0.0, 0.0, 0.0]
        value = {"task": "arc_easy", "group": "arc_easy", "n": 4, "main": "acc", "per_sample": samples}
        store.write("language", one, "arc_easy", {**value, "metrics": {"acc": sum(samples) / 4}})
    for task, score in (("STSBenchmark", sts), ("NFCorpus", 0.1234)):
        path = store.directory / "results" / entry.folder / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"scores": {"test": [{"main_score": score}]}, "evaluation_time": 1.0}))
    if gate:
        store.write("gate", entry, "logits", {"prompts": 20, "identical": 20, "max_difference": 0.0})
    return store, entry


def figures(text: str) -> set[str]:
    """Every figure with decimals below the header, but for the paper's number."""
    body = text.split("\n---\n", 1)[1].replace("2506.04344", "")
    body = re.sub(r"gemify \d+\.\d+\.\d+\S*", "", body)
    return set(re.findall(r"[+-]?\d+\.\d+", body))


def test_a_new_card_holds_the_measured_figures_and_no_other(gem: Path, tmp_path: Path) -> None:
    path = write_card(gem, *measured(tmp_path / "out"))
    assert path == gem / CARD_FILE
    text = path.read_text()
    # 2 of 4 and 1 of 4; their paired differences are 0 0 0 -1: deviation 1/2, standard error 1/4.
    means = {"12.34", "71.25", f"{(12.34 + 71.25) / 2:.2f}", "41.80"}
    assert figures(text) <= means | {"50.00", "25.00", "-25.00"}
    assert {"12.34", "71.25", "50.00", "-25.00"} <= figures(text)
    assert "| 20 | 20 | 0 | equal bit for bit |" in text
    assert "Retrieval" in text
    assert "published" not in text
    assert "weights are untouched" in text
    assert "float32, no instructions, whole tasks" in text


def test_the_hubs_own_reader_understands_it(gem: Path, tmp_path: Path) -> None:
    card = ModelCard.load(write_card(gem, *measured(tmp_path / "out")))
    assert (card.data.library_name, card.data.base_model) == ("gemify", "org/small-lm")
    assert card.data.tags == ["embeddings", "feature-extraction", "gemify", "sentence-transformers"]
    assert card.data.model_name == "my-gem"
    found = {(r.task_type, r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("STS", "STSBenchmark", "main_score"): 71.25,
        ("Retrieval", "NFCorpus", "main_score"): 12.34,
        ("Language", "arc_easy", "acc"): 25.0,
    }
    assert 'GemModel.from_pretrained("my-gem")' in card.text


def test_renewing_keeps_everything_around_the_figures(gem: Path, tmp_path: Path) -> None:
    path = write_card(gem, *measured(tmp_path / "out"))
    text = path.read_text()
    text = text.replace("# my-gem\n", "# My own title\n\nWritten by hand: 99.99 on nothing.\n")
    text = text.replace("library_name: gemify", "library_name: gemify\nlicense: mit\nlanguage:\n- en")
    path.write_text(text + "\n## Thanks\n\nTo all. A backslash: \\1 \\g<0>.\n")
    write_card(gem, *measured(tmp_path / "out", sts=0.5))
    renewed = path.read_text()
    assert "# My own title\n\nWritten by hand: 99.99 on nothing.\n" in renewed
    assert renewed.endswith("## Thanks\n\nTo all. A backslash: \\1 \\g<0>.\n")
    assert "71.25" not in renewed
    assert "50.00" in renewed
    assert renewed.count("<!-- gemify: measured results -->") == 1
    card = ModelCard.load(path)
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert {r.dataset_name: r.metric_value for r in card.data.eval_results}["STSBenchmark"] == 50.0
    write_card(gem, *measured(tmp_path / "out", sts=0.5))
    assert path.read_text() == renewed  # nothing grows


def test_a_card_someone_wrote_is_added_to(gem: Path, tmp_path: Path) -> None:
    (gem / CARD_FILE).write_text("# Notes\n\nNo header here.\n")
    text = write_card(gem, *measured(tmp_path / "out")).read_text()
    assert "# Notes\n\nNo header here.\n" in text
    assert text.index("No header here") < text.index("## Measured results")
    assert len(ModelCard.load(gem / CARD_FILE).data.eval_results) == 3


def test_a_subset_run_is_marked_and_gives_no_index(gem: Path, tmp_path: Path) -> None:
    path = write_card(gem, *measured(tmp_path / "whole"))
    assert "model-index" in path.read_text()
    write_card(gem, *measured(tmp_path / "quick", limit=10))
    text = path.read_text()
    assert "model-index" not in text
    assert ModelCard.load(path).data.eval_results is None
    assert "SUBSET RUN, limit 10" in text
    assert "not comparable with scores of whole tasks" in text


def test_a_trained_base_is_not_called_untouched(tmp_path: Path) -> None:
    text = write_card(save(tmp_path / "full", tune="full"), *measured(tmp_path / "out", gate=False)).read_text()
    assert "untouched" not in text
    assert "weights were trained" in text
    assert "bit for bit" not in text


def test_what_was_never_measured_or_is_no_gem_gets_no_card(gem: Path, tmp_path: Path) -> None:
    store, entry = measured(tmp_path / "out")
    with pytest.raises(ValueError, match="has no results of gem/other w"):
        write_card(gem, store, ModelEntry("gem/other", "w"))
    assert not (gem / CARD_FILE).exists()
    with pytest.raises(ValueError, match=r"holds no config_gemify.json"):
        write_card(tmp_path, store, entry)
