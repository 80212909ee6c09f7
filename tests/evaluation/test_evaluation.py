from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from gemify.evaluation.models import language_loss, same_logits
from gemify.io.vectors import write_vectors
from gemify.training.callbacks import Pair, read_pairs, spearman


class Lengths:
    """An encoder whose cosine is known: the angle grows with the text's length."""

    def encode(self, inputs: list[str], *, batch_size: int = 32) -> Any:
        return np.array([[np.cos(len(t) / 50), np.sin(len(t) / 50)] for t in inputs])


def test_spearman_of_a_known_order() -> None:
    pairs = [Pair("", "x" * n, 5.0 - n / 10) for n in range(1, 20)]
    assert spearman(Lengths(), pairs) == pytest.approx(100.0)
    assert spearman(Lengths(), [Pair(p.sentence1, p.sentence2, -p.score) for p in pairs]) == pytest.approx(-100.0)


def test_pairs_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tiny_models.write_pairs(tmp_path / "p.jsonl", 4)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(path.read_text())
    assert read_pairs(path) == read_pairs(tmp_path / "p.jsonl.gz")
    for content, message in (
        ("", "holds no row"),
        ('{"sentence1": "a", "sentence2": "b", "score": 1}\n', "at least two"),
        ('{"sentence1": "a"}\n', r"row 1: no column 'sentence2' \(there are sentence1\)"),
        ("\x00\xff", "row 1: not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    with pytest.raises(ValueError, match="no such data file"):
        read_pairs(tmp_path / "none.jsonl")


def test_language_loss_is_the_models_own() -> None:
    lm, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    texts = ["a text", "a rather longer text than the first", "x"]
    total = count = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            total += lm(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert language_loss(lm, tokenizer, texts) == pytest.approx(total / count, rel=1e-5)


def test_same_logits_notices_one_changed_weight() -> None:
    lm, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    other = tiny_models.build("llama")
    assert same_logits(lm, other, tokenizer, ["abc"])
    with torch.no_grad():
        other.lm_head.weight[5, 0] += 1e-4
    assert not same_logits(lm, other, tokenizer, ["abc", "def ghi"])


def test_vectors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.ones((2, 3), dtype=np.float32)
    write_vectors(tmp_path / "v.npy", ["a", "b"], vectors, metrics={"texts": 2})
    assert json.loads((tmp_path / "v.npy.metrics.json").read_text()) == {"texts": 2}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_vectors(tmp_path / "v.npy", ["a", "b"], vectors * 2, metrics={})
    assert (np.load(tmp_path / "v.npy") == vectors).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.npy", "v.npy.metrics.json"]
    with pytest.raises(ValueError, match="must end in one of"):
        write_vectors(tmp_path / "v.csv", ["a", "b"], vectors, metrics={})
