"""Pairs with scores: the CoSENT loss against sentence-transformers' own, their rows, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_gem_trainer import arguments
from test_trainer import recipe

from gemify import GemModel, GemTrainer
from gemify.paper.objectives import cosent_loss
from gemify.paper.views import full_view
from gemify.training.examples import Example, Source
from gemify.training.objective import MicroBatch
from gemify.training.trainer import train
from tiny_gems import make_gem, make_objective

ROWS = [
    {"sentence1": f"the number {i} is small", "sentence2": f"the number {i + i % 4} is small", "score": 5 - i % 4}
    for i in range(24)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("scores", [[0.0, 5.0, 2.5, 2.5, 1.0], [1.0] * 5, [0, 1, 0, 1, 0]])
def test_the_loss_is_sentence_transformers(scores: list[float], base_dir: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    losses = pytest.importorskip("sentence_transformers.losses")
    generator = torch.Generator().manual_seed(3)
    first_ND, second_ND = (torch.randn(5, 8, generator=generator) for _ in range(2))
    model = st.SentenceTransformer(modules=[models.Transformer(str(base_dir))], device="cpu")
    theirs = losses.CoSENTLoss(model)
    embeddings = iter([first_ND, second_ND])
    model.forward = lambda features, **_: {"sentence_embedding": next(embeddings)}  # type: ignore[method-assign]
    expected = theirs([{}, {}], torch.tensor(scores))
    assert float(cosent_loss(first_ND, second_ND, torch.tensor(scores))) == pytest.approx(float(expected), rel=1e-5)


def test_rows_are_pairs_with_scores(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": "3.5"}, {"sentence1": "c", "sentence2": "d", "score": 0}]
    found = list(Source(str(write(tmp_path / "rows.jsonl", rows))))
    assert found == [Example("a", "b", "scored", score=3.5), Example("c", "d", "scored", score=0.0)]


@pytest.mark.parametrize("score", [None, "high", float("nan"), True])
def test_a_score_that_is_no_number_is_refused(score: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"sentence1": "a", "sentence2": "b", "score": score}])
    with pytest.raises(ValueError, match=r"rows.jsonl row 1: 'score' must hold a number, got"):
        list(Source(str(path)))


@pytest.mark.parametrize("tune", ["gated", "embedding_lora", "lora"])
def test_a_run_orders_pairs_as_their_scores_do(base_dir: Path, tmp_path: Path, tune: str) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    options = {"tune": tune, "ntp_steps": 0, "max_steps": 40, "contrastive_lr": 1e-2, "lora_dropout": 0.0}
    options |= {"special_tokens": 0, "attention": "bidirectional"} if tune == "embedding_lora" else {}
    gem, summary = train(recipe(base_dir, path, **options), tmp_path / "run", show_progress_bar=False)
    fresh = GemModel.from_base(str(base_dir), tune=tune)  # type: ignore[arg-type]
    scores = [row["score"] for row in ROWS]

    def correlation(model: GemModel) -> float:
        texts = ([row[name] for row in ROWS] for name in ("sentence1", "sentence2"))
        one, two = (model.encode(some, normalize_embeddings=True) for some in texts)
        return float(spearmanr((np.asarray(one) * np.asarray(two)).sum(1), scores).statistic)

    assert correlation(gem) > max(0.6, correlation(fresh))
    assert summary["contrastive"] > 0


def test_scores_of_all_pairs_count_in_every_shard() -> None:
    """Every shard has the scores of the whole batch."""
    from gemify.training.batches import shard_batch

    views = [(full_view([20 + i, 21]), full_view([30 + i, 22])) for i in range(5)]
    shard = shard_batch(MicroBatch(1.0, views=views, scores=[1.0, 2.0, 3.0, 4.0, 5.0]), 1, 2)
    assert shard.scores == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert shard.pairs == 5


def test_pairs_with_scores_and_texts_have_files_of_their_own(base_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, *({"text": f"a text of number {i}"} for i in range(24))])
    with pytest.raises(ValueError, match="a batch holds pairs with scores and other rows"):
        train(recipe(base_dir, path, ntp_steps=0), tmp_path / "run", show_progress_bar=False)


def test_a_gem_in_a_teachers_space_is_trained_through_its_map(base_dir: Path, tmp_path: Path) -> None:
    """The loss is that of the vectors that `encode` gives, and the map is saved and resumed."""
    from dataclasses import replace

    from gemify.model.projection import Projection

    gem = make_gem(base_dir, tune="embedding_lora", special_tokens=0, attention="bidirectional")
    gem.projection = Projection(torch.randn(12, gem.get_embedding_dim(), generator=torch.Generator().manual_seed(1)))
    gem.config = replace(gem.config, projection_dim=12, teacher="a-teacher")
    gem.save_pretrained(tmp_path / "start")
    scores = [float(row["score"]) for row in ROWS[:6]]
    texts = [[row[name] for row in ROWS[:6]] for name in ("sentence1", "sentence2")]
    expected = cosent_loss(*(torch.tensor(gem.encode(t)) for t in texts), torch.tensor(scores))
    ids = [gem.text_tokenizer(t, max_tokens=64) for t in texts]
    views = [tuple(full_view(i) for i in pair) for pair in zip(*ids, strict=True)]
    made = make_objective(gem, frozen=True, projection=gem.projection)
    assert float(made(MicroBatch(1.0, views=views, scores=scores)).total) == pytest.approx(float(expected), rel=1e-4)

    settings = {"recipe": {"ntp_steps": 0, "min_length": 2, "contrastive_batch_size": 8}, "train_dataset": ROWS}
    whole, half = (
        GemTrainer(GemModel.from_pretrained(tmp_path / "start"), arguments(tmp_path / name), **settings)
        for name in ("whole", "half")
    )
    whole.train()
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not torch.equal(whole.gem.projection.weight_PD, gem.projection.weight_PD)  # type: ignore[union-attr]
    assert torch.equal(whole.gem.projection.weight_PD, half.gem.projection.weight_PD)  # type: ignore[union-attr]
    assert (whole.gem.encode("the number 3") == half.gem.encode("the number 3")).all()
