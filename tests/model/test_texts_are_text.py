"""Any text to embed is text, as long as it may be, and its vector is finite; the same by every way in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from chat_templates import TOKENIZERS
from gemify import GemModel
from gemify.model.tokenization import TextTokenizer, truncate_row
from tiny_gems import make_gem, save_gem

TEXT = "".join(chr(97 + i % 26) for i in range(300))


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def short(base_dir: Path) -> GemModel:
    return make_gem(base_dir, max_length=65)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_names_are_text(tmp_path: Path, kind: str) -> None:
    base = tiny_models.save(tmp_path / "base", vocab_size=1024)
    TOKENIZERS[kind]().save_pretrained(base)
    gem = make_gem(base)
    control = set(gem.tokenizer.all_special_ids) - {gem.tokenizer.unk_token_id}
    names = [name for name in gem.tokenizer.all_special_tokens if name != gem.tokenizer.unk_token]
    for name in names:
        for text in (name, f"the {name} cat", f"cat{name}", name * 3):
            row = gem.text_tokenizer([text], max_tokens=None)[0]
            assert control.isdisjoint(row[len(gem.text_tokenizer.bos_ids) :]), text
    plain = ["the cat", "  who is? ", "\n世界", "é"]
    bare = gem.tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert gem.text_tokenizer.tokenize_plain(plain) == bare, "other texts keep their ids"


@pytest.mark.parametrize("template", ['say:"{text}"is', "({text})", "{text}.", "Q:\n{text}\nA:"])
@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "word_piece"])
def test_no_space_comes_between_a_template_and_its_text(kind: str, template: str) -> None:
    """A tokenizer that puts a space before whatever it gets (Llama 2's) puts one before the whole alone."""
    tokenizer = TOKENIZERS[kind]()
    tokenize = TextTokenizer(tokenizer, frozenset(), template)
    for text in ("hello", "the cat", "  who", "x"):
        (row,) = tokenize([text], max_tokens=None)
        whole = template.format(text=text)
        assert row == tokenizer(whole)["input_ids"] or "\n" in template or text[0] == " "
        assert tokenizer.decode(row, skip_special_tokens=True).strip() == whole.strip()
    bare = TextTokenizer(tokenizer, frozenset())
    assert bare(["the cat"], max_tokens=None) == [tokenizer("the cat")["input_ids"]]


@pytest.mark.parametrize("text", ["half \ud83d", "\udcfcber", "\udfff\ud800", "a\0b", "\ufeffa", "e\u0301"])
def test_odd_characters_embed_and_generate(gem: GemModel, text: str) -> None:
    vector = gem.encode(text)
    assert np.isfinite(vector).all()
    assert np.array_equal(vector, gem.encode(text.encode("utf-8", "replace").decode()))
    assert isinstance(gem.generate(text, max_new_tokens=2), str)
    assert isinstance(gem.chat([{"role": "user", "content": text}], max_new_tokens=2), str)
    assert isinstance(gem.recover(text, max_new_tokens=2), str)


def test_parts_of_a_long_row() -> None:
    row = list(range(10))
    assert truncate_row(row, 10, "end") == [row]
    assert truncate_row(row, 4, "end") == [[0, 1, 2, 3]]
    assert truncate_row(row, 4, "start") == [[6, 7, 8, 9]]
    assert truncate_row(row, 4, "mean") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert truncate_row(row, 4, "error") == [row]
    assert truncate_row(row, 4, "start", head=1) == [[0, 7, 8, 9]]
    assert truncate_row(row, 4, "mean", head=1) == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]
    assert truncate_row(row, 4, "mean", head=4) == [[0, 1, 2, 3]]


def test_what_is_cut_is_said_once(short: GemModel, caplog: pytest.LogCaptureFixture) -> None:
    assert short.max_seq_length == 64
    vectors = short.encode([TEXT, "a cat", TEXT, TEXT[:64]])
    np.testing.assert_allclose(vectors[0], short.encode(TEXT[:64]), rtol=1e-4, atol=1e-5)
    assert [r.message for r in caplog.records] == [
        "2 of 4 texts were longer than the 64 tokens that this model embeds: cut at the end (truncate=mean embeds all"
        " of a text)"
    ]
    assert short.encode(["a cat"]).shape == (1, 32)
    assert len(caplog.records) == 1


def test_every_policy(short: GemModel, caplog: pytest.LogCaptureFixture) -> None:
    plain = {part: short.encode(part) for part in (TEXT[:64], TEXT[-64:], "a cat")}
    both = [TEXT, "a cat"]
    assert_close(short.encode(both, truncate="end")[0], plain[TEXT[:64]])
    assert_close(short.encode(both, truncate="start")[0], plain[TEXT[-64:]])
    parts = [TEXT[at : at + 64] for at in range(0, 300, 64)]
    weights = np.array([len(part) for part in parts]) / 300
    caplog.clear()
    mean = short.encode(both, truncate="mean")
    np.testing.assert_allclose(mean[0], weights @ short.encode(parts), rtol=1e-4, atol=1e-6)
    assert_close(mean[1], plain["a cat"])
    assert not caplog.records, "nothing is lost"
    with pytest.raises(ValueError, match=r"a text has 300 tokens, this model embeds up to 64: cut it up, or set"):
        short.encode(both, truncate="error")
    with pytest.raises(ValueError, match="unknown truncate 'left': choose one of error, end, start, mean"):
        short.encode(both, truncate="left")  # type: ignore[call-overload]


def test_a_prompt_stands_before_every_part(short: GemModel) -> None:
    whole = short.encode(TEXT, prompt="find: ", truncate="mean")
    size = 64 - len("find: ")
    parts = [TEXT[at : at + size] for at in range(0, 300, size)]
    lengths = np.array([len(part) + len("find: ") for part in parts])
    expected = lengths / lengths.sum() @ short.encode(parts, prompt="find: ")
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-6)
    start = short.encode(TEXT, prompt="find: ", truncate="start")
    assert_close(start, short.encode(TEXT[-size:], prompt="find: "))


def test_max_length_can_be_set_up_to_the_positions(base_dir: Path, tmp_path: Path) -> None:
    gem = make_gem(base_dir, max_length=65, template='say "{text}" is')
    overhead = 65 - gem.max_seq_length
    gem.max_seq_length = 300
    assert gem.config.max_length == 300 + overhead
    other = TEXT[:-1] + "!"
    assert not np.array_equal(gem.encode(TEXT), gem.encode(other))
    saved = save_gem(base_dir, tmp_path / "gem", max_length=65)
    longer = GemModel.from_pretrained(saved, max_length=1024)
    assert longer.max_seq_length == 1023
    assert GemModel.from_pretrained(saved).max_seq_length == 64
    for wrong in (0, 1, 1025):
        with pytest.raises(ValueError, match=r"max_length must lie in 2\.\.1024, got"):
            GemModel.from_pretrained(saved, max_length=wrong)
    for odd in (64.0, "64", None, True):
        with pytest.raises(ValueError, match="max_seq_length must be a whole number, got"):
            gem.max_seq_length = odd  # type: ignore[assignment]


@pytest.mark.parametrize("inputs", [None, 5, b"the cat"])
def test_what_is_no_text_is_said(gem: GemModel, inputs: Any) -> None:
    with pytest.raises(ValueError, match=f"a text or several texts, got {type(inputs).__name__}"):
        gem.encode(inputs)


def test_vectors_that_are_not_finite_are_refused(gem: GemModel) -> None:
    handle = gem.prefill("the cat")
    with torch.no_grad():
        gem.lm.get_decoder().layers[0].mlp.down_proj.weight.mul_(torch.inf)
    for embed in (lambda: gem.encode("the cat"), lambda: gem.encode(["a", "b"]), lambda: gem.embed(handle)):
        with pytest.raises(FloatingPointError, match=r"not finite .*: load it with float32 or bfloat16"):
            embed()


def test_nothing_is_logged_of_texts_that_fit(short: GemModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    short.encode(["a", TEXT[:64]])
    assert not caplog.records
