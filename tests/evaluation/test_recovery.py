"""Recovery of texts from special tokens, and the attack on vectors: figures worked out by hand or by another way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import tiny_models
from gemify import GemModel
from gemify.evaluation.recovery import (
    LENGTHS,
    attack_vectors,
    measure_recovery,
    rouge_l,
    select_texts_by_length,
    token_f1,
)
from gemify.model.tokenization import TextTokenizer
from tiny_gems import randomize


@pytest.mark.parametrize(
    ("wanted", "got", "f1"),
    [
        ([1, 2, 3], [3, 1, 2], 1.0),
        ([1, 2, 3], [4, 5], 0.0),
        ([1, 1, 2], [1, 2, 2, 2], 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ([1, 1, 1, 1], [1], 2 * (1 / 4) * 1 / (1 / 4 + 1)),
        ([1, 2], [1, 2, 3, 4], 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ([], [], 1.0),
        ([], [1], 0.0),
        ([1], [], 0.0),
    ],
)
def test_token_f1(wanted: list[int], got: list[int], f1: float) -> None:
    assert token_f1(wanted, got) == pytest.approx(f1)
    assert token_f1(got, wanted) == pytest.approx(f1)


def test_texts_have_the_lengths_asked_for(gem: GemModel) -> None:
    """The tiny tokenizer has a token a byte, so lengths are those of the strings."""
    lines = [f"line{n:05}." for n in range(100)]
    chosen = select_texts_by_length(gem, lines, 13)
    assert [len(text) for text in chosen] == [length for length in LENGTHS for _ in range(2)]
    taken = 0
    for text in chosen:  # beginnings of the given texts, each used once, joined where they are short
        parts = -(-(len(text) + 1) // 11)
        assert text == " ".join(lines[taken : taken + parts])[: len(text)]
        taken += parts
    assert [len(t) for t in select_texts_by_length(gem, lines, 1)] == list(LENGTHS)
    assert [len(t) for t in select_texts_by_length(gem, ["few", "texts, all of them"], 10)] == [6]


def lcs(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return lcs(one[:-1], other[:-1]) + 1
    return max(lcs(one[:-1], other), lcs(one, other[:-1]))


def test_the_cell_compares_what_comes_back(gem: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """More texts than a batch, so that rows could be mixed up."""
    answers = {
        "the cat sat on the mat": "the  cat sat on\nthe mat ",
        "the dog": "the cat sat",
        "a b c d": "d c b a",
        "Nothing": "",
        **{f"text number {n}": f"text numbers {n * n}" for n in range(60)},
    }
    asked: list[tuple[int, int]] = []

    def recover(self: GemModel, texts: list[str], *, max_new_tokens: int) -> list[str]:
        asked.append((max(map(len, texts)), max_new_tokens))
        return [answers[t] for t in texts]

    monkeypatch.setattr(GemModel, "recover", recover)
    cell = measure_recovery(gem, list(answers))
    assert cell["k"] == 1
    assert len(asked) > 1
    assert all(allowed >= longest for longest, allowed in asked)  # room for the whole text
    assert [(row["text"], row["recovered"]) for row in cell["rows"]] == list(answers.items())
    for row in cell["rows"]:
        text, back = row["text"], row["recovered"]
        assert row["tokens"] == len(text)
        assert row["exact"] == (text.split() == back.split())
        words, back_words = text.lower().split(), back.lower().split()
        expected = 2 * lcs(words, back_words) / (len(words) + len(back_words))
        assert row["rouge_l"] == pytest.approx(expected)
    by_text = {row["text"]: row for row in cell["rows"]}
    assert [by_text[t]["exact"] for t in list(answers)[:4]] == [True, False, False, False]
    assert by_text["the cat sat on the mat"]["token_f1"] == pytest.approx(2 * 22 / (22 + 24))
    assert by_text["the dog"]["token_f1"] == pytest.approx(2 * 4 / (7 + 11))  # t h e and a space
    assert by_text["a b c d"]["token_f1"] == 1.0
    assert by_text["Nothing"]["token_f1"] == by_text["Nothing"]["rouge_l"] == 0.0


def test_rouge_l_is_that_of_the_rouge_score_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = np.random.default_rng(0)
    words = ["The", "cat", "sat", "on", "mat.", "it's", "née", "2nd", "--", ""]
    for _ in range(300):
        one, other = (" ".join(draw.choice(words, draw.integers(0, 12))) for _ in range(2))
        assert rouge_l(one, other) == scorer.score(one, other)["rougeL"].fmeasure


TEXTS = ["the red stone", "a", "seven rivers"]


def test_the_first_special_token_alone_recovers_as_a_model_that_has_no_other(base_dir: Path) -> None:
    two = GemModel.from_base(str(base_dir), special_tokens=2)
    one = GemModel.from_base(str(base_dir), special_tokens=list(two.config.special_tokens[:1]))
    randomize(two)
    assert one.adapter is not None
    assert two.adapter is not None
    with torch.no_grad():
        for mine, theirs in zip(one.adapter.lora_parameters(), two.adapter.lora_parameters(), strict=True):
            mine.copy_(theirs)
        one.adapter.rows.rows_KD.copy_(two.adapter.rows.rows_KD[:1])
    first, alone, both = (
        measure_recovery(two, TEXTS, k=1),
        measure_recovery(one, TEXTS),
        measure_recovery(two, TEXTS, k=2),
    )
    assert first == alone
    assert first["k"] == 1
    assert both == measure_recovery(two, TEXTS)
    assert both["k"] == 2
    longest = max(map(len, TEXTS)) + 8
    assert [r["recovered"] for r in both["rows"]] == two.recover(TEXTS, max_new_tokens=longest)
    assert [r["recovered"] for r in both["rows"]] != [r["recovered"] for r in first["rows"]]
    assert set(first["rows"][0]) == {"text", "recovered", "tokens", "exact", "token_f1", "rouge_l"}
    for k in (0, 3):
        with pytest.raises(ValueError, match=rf"k must lie in 1\.\.2, got {k}"):
            measure_recovery(two, TEXTS, k=k)


# From vectors alone


def made_up(count: int, *, seed: int) -> list[str]:
    """Texts of four to ten letters, frequent and rare ones, each at most once."""
    generator = np.random.default_rng(seed)
    share = np.arange(1, 27) / np.arange(1, 27).sum()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return ["".join(generator.choice(letters, generator.integers(4, 11), replace=False, p=share)) for _ in range(count)]


def attacked(encode: Any, *, bos: bool = False) -> Any:
    """What the attack uses of a GEM."""
    tokenizer = tiny_models.tokenizer()
    if bos:
        start = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = start

    def vectors(texts: list[str], *, normalize_embeddings: bool) -> np.ndarray:
        made = encode(texts)
        return made / np.linalg.norm(made, axis=1, keepdims=True) if normalize_embeddings else made

    return SimpleNamespace(
        tokenizer=tokenizer,
        text_tokenizer=TextTokenizer(tokenizer, frozenset()),
        config=SimpleNamespace(max_length=64),
        encode=vectors,
    )


def telling(texts: list[str]) -> np.ndarray:
    """Vectors that determine the letters: which occur, turned and shifted."""
    turn = np.random.default_rng(0).normal(size=(26, 40)).astype(np.float32)
    return np.array(
        [[float(c in t) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts], dtype=np.float32
    ) @ turn + np.linspace(-6, 6, 40, dtype=np.float32)


def mute(texts: list[str]) -> np.ndarray:
    seeds = [int.from_bytes(t.encode(), "little") % 2**32 for t in texts]
    return np.array([np.random.default_rng(s).normal(size=40) for s in seeds], dtype=np.float32)


def mean_f1(cell: dict[str, Any]) -> float:
    return float(np.mean([row["token_f1"] for row in cell["rows"]]))


def test_the_attack_reads_vectors_that_tell_and_no_others() -> None:
    known, texts = made_up(600, seed=1), made_up(100, seed=2)
    told = attack_vectors(attacked(telling), known, texts, ridge=1e-3)
    guessed = attack_vectors(attacked(mute), known, texts)
    frequent = "zyxwvutsrqponmlkjihgfedcba"
    chance = float(np.mean([len(set(t) & set(frequent[: len(t)])) / len(t) for t in texts]))
    assert told["chance_token_f1"] == guessed["chance_token_f1"] == pytest.approx(chance, abs=0.03)
    assert mean_f1(told) > 0.95
    assert chance - 0.15 < mean_f1(guessed) < chance + 0.03
    assert "600 other texts" in told["note"]
    row = told["rows"][0]
    assert row["text"] == texts[0]
    assert row["tokens"] == len(texts[0])
    assert row["token_f1"] == pytest.approx(len(set(row["guess"].split()) & set(texts[0])) / len(texts[0]))


def test_the_attack_is_ridge_regression() -> None:
    """Against scikit-learn's, on vectors that tell half of it."""
    linear = pytest.importorskip("sklearn.linear_model")
    known, texts = made_up(300, seed=1), made_up(60, seed=2)

    def half(texts: list[str]) -> np.ndarray:
        return telling(texts) + 3 * mute(texts)

    gem = attacked(half)
    cell = attack_vectors(gem, known, texts, ridge=0.2)
    letters = "abcdefghijklmnopqrstuvwxyz"
    present = np.array([[float(c in t) for c in letters] for t in known])
    fitted = linear.Ridge(alpha=0.2).fit(gem.encode(known, normalize_embeddings=True), present)
    scores = fitted.predict(gem.encode(texts, normalize_embeddings=True))
    guesses = [{letters[at] for at in np.argsort(-row)[: len(t)]} for row, t in zip(scores, texts, strict=True)]
    assert [set(row["guess"].split()) for row in cell["rows"]] == guesses
    assert cell["chance_token_f1"] + 0.05 < mean_f1(cell) < 0.9


def test_a_beginning_that_every_text_has_is_no_guess() -> None:
    """A BOS would be named right every time: it is neither wanted nor guessed."""
    known, texts = made_up(300, seed=1), made_up(30, seed=2)
    plain, with_bos = (attack_vectors(attacked(telling, bos=bos), known, texts) for bos in (False, True))
    assert with_bos == plain


def test_the_attack_needs_tokens_that_recur(gem: GemModel) -> None:
    with pytest.raises(ValueError, match=r"^no token occurs three times in 2 known texts"):
        attack_vectors(gem, ["abc", "abd"], ["abe"])
    lines = made_up(40, seed=3)
    cell = attack_vectors(gem, lines[:30], lines[30:])
    assert [row["text"] for row in cell["rows"]] == lines[30:]
    assert all(0.0 <= row["token_f1"] <= 1.0 for row in cell["rows"])
    assert 0.0 < cell["chance_token_f1"] < 1.0
