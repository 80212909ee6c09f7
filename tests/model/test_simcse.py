"""GEM without special tokens, the SimCSE baseline: the vector is the mean over the text's last hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tiny_models
from gemify import GemModel
from gemify.cli.main import app
from gemify.model.base import load_base

TEXTS = ["hello", "a somewhat longer text than that", "", "hello", "x" * 40]


def simcse(base_dir: Path, tune: Any = "lora", *, trained: bool = True, **options: Any) -> GemModel:
    """A baseline on the tiny model, by default with random LoRA weights in place of trained ones."""
    gem = GemModel.from_base(str(base_dir), tune=tune, special_tokens=0, **options)
    if trained and gem.adapter is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in gem.adapter.lora_parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return gem


def mean_alone(gem: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The oracle: one text, no padding, plain transformers."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
    if not ids.shape[1]:
        return torch.zeros(gem.config.hidden_size)
    with torch.no_grad():
        return gem.get_decoder()(input_ids=ids).last_hidden_state[0].mean(0)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_untrained_it_is_the_mean_pooled_base_exactly(base_dir: Path, tune: str) -> None:
    gem = simcse(base_dir, tune, trained=False)
    lm, tokenizer = load_base(str(base_dir))
    for text in TEXTS:
        assert torch.equal(gem.encode(text, convert_to_tensor=True), mean_alone(lm, tokenizer, text))
    assert gem.config.special_tokens == ()
    assert gem.get_embedding_dim() == 32


@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gpt2", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_do_not_matter(tmp_path: Path, architecture: str, side: str) -> None:
    gem = simcse(tiny_models.save(tmp_path / "base", architecture))
    gem.tokenizer.padding_side = side
    for order in (TEXTS, TEXTS[::-1]):
        for batch_size in (1, 2, 8):
            got = gem.encode(order, batch_size=batch_size, convert_to_tensor=True)
            for text, vector in zip(order, got, strict=True):
                expected = mean_alone(gem.lm, gem.tokenizer, text)
                torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_texts_without_tokens_give_zeros(base_dir: Path) -> None:
    gem = simcse(base_dir)
    assert (gem.encode("") == 0).all()
    assert (gem.encode(["", "a longer text"])[0] == 0).all()
    assert gem.encode(["", ""]).shape == (2, 32)


def test_the_whole_of_max_length_is_text(base_dir: Path) -> None:
    gem = simcse(base_dir, max_length=10)
    assert (gem.encode("abcdefghij" + "zzz") == gem.encode("abcdefghij")).all()
    assert not (gem.encode("abcdefghi") == gem.encode("abcdefghij")).all()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_save_and_load_give_the_same_bytes(base_dir: Path, tmp_path: Path, tune: str) -> None:
    gem = simcse(base_dir, tune)
    gem.save_pretrained(tmp_path / "gem")
    again = GemModel.from_pretrained(tmp_path / "gem")
    assert again.config == gem.config
    assert (again.encode(TEXTS) == gem.encode(TEXTS)).all()
    if tune == "lora":
        assert all("lora_" in name for name in load_file(tmp_path / "gem" / "adapter_model.safetensors"))
        again.save_pretrained(tmp_path / "merged", merge=True)
        merged = GemModel.from_pretrained(tmp_path / "merged")
        np.testing.assert_allclose(merged.encode(TEXTS), gem.encode(TEXTS), atol=1e-4)


def test_stock_peft_loads_the_adapter(base_dir: Path, tmp_path: Path) -> None:
    gem = simcse(base_dir)
    gem.save_pretrained(tmp_path / "gem")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "gem").eval()
    expected = mean_alone(stock.get_base_model(), gem.tokenizer, TEXTS[1])
    torch.testing.assert_close(gem.encode(TEXTS[1], convert_to_tensor=True), expected, atol=1e-5, rtol=1e-5)


def test_it_generates_and_says_what_it_cannot_do(base_dir: Path) -> None:
    gem = simcse(base_dir)
    prefill = gem.prefill("a prompt")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert gem.generate(prefill, **options) == gem.generate("a prompt", **options)
    with pytest.raises(ValueError, match="to embed use encode"):
        gem.embed(prefill)
    with pytest.raises(ValueError, match="no special tokens in a text's cache: nothing to recover"):
        gem.recover("a text")


def test_info_shows_it(base_dir: Path, tmp_path: Path) -> None:
    simcse(base_dir).save_pretrained(tmp_path / "gem")
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "gem"), "--json"])
    facts = json.loads(shown.stdout)
    assert (facts["tune"], facts["special_tokens"], facts["pooling"]) == ("lora", [], "mean")


def test_what_leaves_nothing_to_train_or_pool_is_refused(base_dir: Path) -> None:
    for tune in ("gated", "tokens"):
        with pytest.raises(ValueError, match="needs tune embedding_lora, lora or full"):
            simcse(base_dir, tune)
    with pytest.raises(ValueError, match="set pooling to mean"):
        simcse(base_dir, pooling="concat")
