"""Training without special tokens, the SimCSE baseline: rows, views, whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gemify import GemModel
from gemify.model.encode import encode_ids
from gemify.paper.tokens import raw_row
from gemify.paper.views import full_view
from gemify.training.batches import Batches
from gemify.training.examples import Source
from gemify.training.objective import MicroBatch, Objective, target_count
from gemify.training.recipe import Recipe
from gemify.training.trainer import train

ROOT = Path(__file__).parents[2]
IDS = [[20, 21, 22, 23, 24], [30, 31], [40, 41, 42]]


def recipe(base_dir: Path, texts_file: Path, **options: Any) -> Recipe:
    values = {
        "base": str(base_dir),
        "data": str(texts_file),
        "tune": "lora",
        "special_tokens": 0,
        "max_steps": 6,
        "ntp_steps": 0,
        "batch_size": 8,
        "contrastive_batch_size": 16,
        "save_steps": 2,
        **options,
    }
    return Recipe.from_dict(values)


def objective(gem: GemModel) -> Objective:
    return Objective(gem.lm, gem.adapter, gem.config)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_trains_saves_and_resumes(base_dir: Path, texts_file: Path, tmp_path: Path, tune: str) -> None:
    made = recipe(base_dir, texts_file, tune=tune)
    gem, summary = train(made, tmp_path / "run", show_progress_bar=False)
    fresh = GemModel.from_base(str(base_dir), tune=tune, special_tokens=0)  # type: ignore[arg-type]
    assert not (fresh.encode("hello") == gem.encode("hello")).all()
    assert (GemModel.from_pretrained(tmp_path / "run").encode("hello") == gem.encode("hello")).all()
    assert summary["steps"] == 6
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("contrastive" in r and "ntp" not in r for r in rows)
    for name in ("summary.json", "config_gemify.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")  # the last two steps are made again
    again, _ = train(made, tmp_path / "run", resume=True, show_progress_bar=False)
    assert (again.encode("hello") == gem.encode("hello")).all()


def test_next_token_rows_are_raw(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    made = recipe(base_dir, texts_file, ntp_steps=3)
    gem = GemModel.from_base(str(base_dir), tune="lora", special_tokens=0)
    batches = [b["batch"] for b in Batches(made, Source(str(texts_file)), gem.text_tokenizer, end_id=2)]
    assert {r.kind for b in batches for r in b.rows} == {"raw"}
    assert [bool(b.views) for b in batches] == [False] * 3 + [True] * 3
    row = raw_row(IDS[0])
    loss = objective(gem)(MicroBatch(0.0, [row], step_targets=target_count(row, frozen_base=False))).total
    ids = torch.tensor([IDS[0]])
    torch.testing.assert_close(loss, gem.lm(input_ids=ids, labels=ids).loss)


def test_views_are_embedded_as_texts_are(base_dir: Path) -> None:
    gem = GemModel.from_base(str(base_dir), tune="lora", special_tokens=0)
    with torch.no_grad():
        got = objective(gem).eval().embed([full_view(ids) for ids in IDS])
        torch.testing.assert_close(got, encode_ids(gem.lm, gem.config, IDS), atol=1e-6, rtol=1e-6)


def test_dropout_tells_equal_views_apart(base_dir: Path) -> None:
    """SimCSE's own views: in training mode with LoRA dropout. Without dropout they are equal, and teach nothing."""
    views = [(full_view(ids), full_view(ids)) for ids in IDS]
    flat = [v for pair in views for v in pair]
    for dropout in (0.1, 0.0):
        gem = GemModel.from_base(str(base_dir), tune="lora", special_tokens=0, adapter={"lora_dropout": dropout})
        assert gem.adapter is not None
        with torch.no_grad():
            for p in gem.adapter.lora_parameters():
                p.fill_(0.1)
            for training in (True, False):
                vectors = objective(gem).train(training).embed(flat)
                apart = not torch.allclose(vectors[0::2], vectors[1::2], atol=1e-6)
                assert apart == (training and dropout > 0.0)


@pytest.mark.parametrize(
    "options", [{"drop_rate": 0.0, "lora_dropout": 0.1}, {"view": "halves"}, {"tune": "full", "drop_rate": 0.0}]
)
def test_every_way_of_making_views_runs(
    base_dir: Path, texts_file: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    _, summary = train(recipe(base_dir, texts_file, max_steps=2, **options), tmp_path / "run", show_progress_bar=False)
    assert summary["contrastive"] >= 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "gated"}, "needs tune embedding_lora, lora or full"),
        ({"tune": "tokens"}, "needs tune embedding_lora, lora or full"),
        ({"special_tokens": -1}, "k must be at least 1"),
        ({"pooling": "concat"}, "set pooling to mean"),
        ({"mix": 0.8}, "leave mix out"),
        ({"view": "mask"}, "choose delete, span or halves"),
        ({"contrastive_batch_size": None}, "set contrastive_batch_size"),
    ],
)
def test_contradictions_are_named(base_dir: Path, texts_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(base_dir, texts_file, **options)


def test_the_recipe_is_the_contrastive_part_of_the_gated_one() -> None:
    simcse, gated = (
        Recipe.from_dict(Recipe.read_yaml(ROOT / "recipes" / f"{name}.yaml")) for name in ("simcse", "gated")
    )
    assert simcse.p == 1.0
    assert simcse.max_steps == gated.max_steps - gated.ntp_steps
    differing = {n for n in vars(gated) if getattr(simcse, n) != getattr(gated, n)}
    assert differing == {"tune", "special_tokens", "max_steps", "ntp_steps"}
