"""Equal texts of one batch are no negatives of each other, and negatives of the data are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import tiny_models
from gemify.model.gem import GemModel
from gemify.model.tokenization import TextTokenizer
from gemify.paper.objectives import FILLER, equal_texts, info_nce, similarity_loss
from gemify.training.batches import Batches, shard_batch
from gemify.training.examples import Source
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from tiny_gems import make_objective

NUMBERS = np.random.default_rng(0)


def made(rows: list[dict[str, Any]], directory: Path, **options: Any) -> list[MicroBatch]:
    """The contrastive batches of some rows."""
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = {"batch_size": len(rows), "contrastive_batch_size": len(rows), "min_length": 2, "drop_rate": 0.0}
    recipe = Recipe.from_dict({"data": str(path), "max_steps": 4, "ntp_steps": 0, **size, **options})
    tokenize = TextTokenizer(tiny_models.tokenizer(), frozenset([3]))
    return [b["batch"] for b in Batches(recipe, Source(str(path)), tokenize, end_id=2)]


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ (y / np.linalg.norm(y, axis=-1, keepdims=True)).T


def test_excluded_candidates_do_not_count() -> None:
    """Against the formula: the sum runs over the candidates that hold another text."""
    q, d, n = (NUMBERS.standard_normal((4, 6)) for _ in range(3))
    keys = [(0, 10, 11, 20), (1, 12, 11, FILLER), (2, 10, 13, 11), (3, 14, 15, 21)]
    candidates = cosines(q, np.concatenate([d, n])) * 7
    expected = 0.0
    for i, (_, anchor, positive, _) in enumerate(keys):
        mine = {anchor, positive}
        kept = [i] + [j for j in range(4) if j != i and not mine & set(keys[j][1:3])]
        kept += [4 + j for j in range(4) if keys[j][3] not in {*mine, FILLER}]
        expected -= log_softmax(candidates[i, kept])[0] / 4
    excluded = equal_texts(torch.tensor(keys), torch.arange(4))
    got = info_nce(*map(torch.tensor, (q, d)), 7.0, torch.tensor(n), excluded_BN=excluded)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_few_texts_reaches_a_low_loss() -> None:
    """32 rows, each text 8 times: with its copies as negatives no model gets below the logarithm of 8."""
    vectors = torch.eye(4).repeat_interleave(8, 0)
    keys = torch.tensor([(100 + i, i // 8, i // 8) for i in range(32)])
    assert float(info_nce(vectors, vectors, 100.0)) > 2.0
    assert float(info_nce(vectors, vectors, 100.0, excluded_BN=equal_texts(keys, torch.arange(32)))) < 1e-6


def test_only_equal_texts_in_a_batch_are_no_loss_and_no_nan() -> None:
    vectors = torch.randn(3, 5, requires_grad=True)
    excluded = equal_texts(torch.zeros(3, 3, dtype=torch.long), torch.arange(3))
    loss = info_nce(vectors, vectors, 20.0, excluded_BN=excluded)
    loss = loss + similarity_loss(vectors, torch.randn(3, 5), excluded_NN=torch.ones(3, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-5)
    assert torch.isfinite(vectors.grad).all() if vectors.grad is not None else False


def test_the_similarity_loss_leaves_equal_texts_out() -> None:
    """A row over the others equals the row of a batch that holds each text once, seen from that text."""
    x, y = (torch.tensor(NUMBERS.standard_normal((4, 5))) for _ in range(2))
    twice = [0, 1, 2, 3, 0]
    same = torch.tensor(twice)[:, None] == torch.tensor(twice)
    alone = [cosines(v.numpy(), v.numpy()) * 20 for v in (x, y)]
    rows = []
    for i in twice:
        others = [j for j in twice if j != i]
        a, b = (log_softmax(c[i, others]) for c in alone)
        rows.append((np.exp(b) * (b - a)).sum())
    got = similarity_loss(x[twice], y[twice], excluded_NN=same)
    assert float(got) == pytest.approx(np.mean(rows), rel=1e-4)


def test_rows_of_one_text_or_id_share_a_key(tmp_path: Path) -> None:
    texts = ["one text of it", "another text here", "one text of it", "a third text now"]
    for batch in made([{"text": t} for t in texts], tmp_path):
        assert batch.keys is not None
        keys = dict(zip((pair[0].ids for pair in batch.views), (k[1] for k in batch.keys), strict=True))
        assert len(keys) == 3
        assert [keys[pair[0].ids] for pair in batch.views] == [key[1] for key in batch.keys]
    assert all(b.keys is None for b in made([{"text": t} for t in texts[1:]], tmp_path))
    by_id = made([{"text": t, "id": i} for t, i in zip(texts[1:], "aba", strict=True)], tmp_path)
    assert all(b.keys is not None and len({k[0] for k in b.keys}) == 2 for b in by_id)
    pairs = [
        {"anchor": a, "positive": p} for a, p in (("first one here", "second one there"), ("second one there", "x y z"))
    ]
    for batch in made(pairs, tmp_path):
        assert batch.keys is not None
        (_, a, b), (_, c, d) = batch.keys
        assert len({a, b, c, d}) == 3


def test_negatives_are_drawn_and_missing_ones_count_nothing(tmp_path: Path) -> None:
    rows = [
        {"query": "a query of words", "pos": ["its answer"], "neg": ["bad one", "bad two", "bad three"]},
        {"anchor": "another query", "positive": "its good answer", "negative": "its bad answer"},
        {"anchor": "a third query", "positive": "an answer too"},
    ]
    tokens = tiny_models.tokenizer()
    drawn = set()
    for batch in made(rows, tmp_path):
        assert batch.keys is not None
        assert {len(views) for views in batch.views} == {3}
        texts = {
            tokens.decode(v[0].ids): (tokens.decode(v[2].ids), k[3])
            for v, k in zip(batch.views, batch.keys, strict=True)
        }
        drawn.add(texts["a query of words"][0])
        assert texts["another query"][0] == "its bad answer"
        assert texts["a third query"] == ("an answer too", FILLER)
    assert drawn <= {"bad one", "bad two", "bad three"}
    assert len(drawn) > 1
    assert {len(v) for b in made(rows, tmp_path, num_negatives=3) for v in b.views} == {5}
    assert {len(v) for b in made(rows, tmp_path, num_negatives=0) for v in b.views} == {2}
    assert made(rows, tmp_path) == made(rows, tmp_path)


def test_the_loss_of_triplets_is_the_formula_in_chunks_too(gem: GemModel, tmp_path: Path) -> None:
    rows = [
        {"anchor": f"query {i % 3} of it", "positive": f"answer {i}", "negative": f"wrong {i % 2}"} for i in range(5)
    ]
    batch = made(rows, tmp_path)[0]
    assert batch.keys is not None
    found = []
    for chunk in (None, 2, 3):
        objective = make_objective(gem, frozen=True, contrastive_chunk_size=chunk, group_tokens=40)
        loss = objective(batch).total
        loss.backward()
        found.append((loss.detach(), objective.temperature.t.grad.clone()))
        vectors = objective.embed([v for views in batch.views for v in views]).detach().view(5, 3, -1)
    excluded = equal_texts(torch.tensor(batch.keys), torch.arange(5))
    assert excluded.any()
    expected = info_nce(vectors[:, 0], vectors[:, 1], 20.0, vectors[:, 2], excluded_BN=excluded)
    for loss, gradient in found:
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=1e-4)
    assert shard_batch(batch, 1, 2).keys == batch.keys
