"""Gated weights: nothing changes where no special token stands, and stock PEFT gives the same embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

import tiny_models
from gemify import GemModel
from gemify.model.adapter import gate
from gemify.model.kv_cache import output_cache
from tiny_gems import make_gem, randomize

ARCHITECTURES = ["llama", "mistral-window", "gemma3", "gpt2", "qwen3", "opt", "gpt_oss"]
PROMPT = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]])


@pytest.fixture(params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A base model and a gated GEM on the same weights, its trained ones random."""
    kernel = "eager" if request.param in tiny_models.EAGER_ONLY else "sdpa"
    directory = tiny_models.save(tmp_path / "base", request.param, attn_implementation=kernel)
    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=kernel).eval()
    gem = make_gem(directory, attn_implementation=kernel)
    return base, gem


def test_logits_cache_and_text_are_the_bases_to_the_bit(pair) -> None:  # type: ignore[no-untyped-def]
    base, gem = pair
    with torch.no_grad():
        ours, theirs = gem.lm(input_ids=PROMPT, use_cache=True), base(input_ids=PROMPT, use_cache=True)
    assert torch.equal(ours.logits, theirs.logits)
    for a, b in zip(output_cache(ours).layers, output_cache(theirs).layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": gem.special_ids, "pad_token_id": 0}
    mask = torch.ones_like(PROMPT)
    assert torch.equal(
        gem.lm.generate(PROMPT, attention_mask=mask, **options), base.generate(PROMPT, attention_mask=mask, **options)
    )


def test_the_gate_does_act_at_its_columns_and_only_from_there_on(pair) -> None:  # type: ignore[no-untyped-def]
    base, gem = pair
    columns = torch.zeros_like(PROMPT, dtype=torch.bool)
    columns[0, 5] = True
    with torch.no_grad():
        plain = base(input_ids=PROMPT).logits[0]
        with gate(columns):
            gated = gem.lm(input_ids=PROMPT).logits[0]
    assert not torch.allclose(gated[5], plain[5])
    # columns before the gated one see nothing of it; exact up to the kernels' choice by shape
    torch.testing.assert_close(gated[:5], plain[:5], atol=1e-6, rtol=1e-6)


def test_raw_text_teaches_gated_weights_nothing(pair) -> None:  # type: ignore[no-untyped-def]
    """The paper's share p of raw rows has no meaning with a frozen base: their loss depends on no trained weight."""
    _, gem = pair
    gem.adapter.set_training(True)
    weights = [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD]
    for weight in weights:
        weight.requires_grad_(True)
    columns = torch.zeros_like(PROMPT, dtype=torch.bool)
    for gated in (False, True):
        columns[0, 5] = gated
        with gate(columns):
            loss = gem.lm(input_ids=PROMPT, labels=PROMPT).loss
        found = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
        assert any(g is not None and bool(g.any()) for g in found) is gated


@pytest.mark.parametrize("k", [1, 3])
def test_stock_peft_gives_the_same_embedding(base_dir: Path, tmp_path: Path, k: int) -> None:
    """k special tokens are k stock requests ``text s_i``: they share one position id and do not see each other."""
    gem = make_gem(base_dir, special_tokens=k, pooling="concat")
    gem.save_pretrained(tmp_path / "gem")
    text = "a little text"
    ids = gem.tokenizer(text)["input_ids"]
    ours = gem.encode(text).reshape(k, -1)
    for i, special in enumerate(gem.special_ids):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "gem").eval()
        if k > 1:  # stock PEFT looks for the whole sequence of invocation tokens
            stock.peft_config["default"].alora_invocation_tokens = [special]
        with torch.no_grad():
            out = stock(input_ids=torch.tensor([[*ids, special]]), output_hidden_states=True)
        torch.testing.assert_close(out.hidden_states[-1][0, -1], torch.tensor(ours[i]), atol=1e-5, rtol=1e-5)


def test_tokens_scope_is_stock_trainable_tokens(base_dir: Path, tmp_path: Path) -> None:
    gem = make_gem(base_dir, tune="tokens")
    assert gem.adapter is not None
    assert gem.adapter.lora_parameters() == []
    gem.save_pretrained(tmp_path / "gem")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "gem").eval()
    ids = [*gem.tokenizer("hello")["input_ids"], *gem.special_ids]
    with torch.no_grad():
        out = stock(input_ids=torch.tensor([ids]), output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1][0, -1], torch.tensor(gem.encode("hello")), atol=1e-5, rtol=1e-5)


def test_a_gated_adapter_cannot_be_merged(gem: GemModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tune lora"):
        gem.save_pretrained(tmp_path / "x", merge=True)
    assert gem.adapter is not None
    with pytest.raises(ValueError, match="--tune lora"):
        gem.adapter._peft[0].merge_and_unload()
    assert not (tmp_path / "x").exists()


def test_merged_lora_equals_the_adapter(base_dir: Path, tmp_path: Path) -> None:
    gem = make_gem(base_dir, tune="lora")
    before = gem.encode(["one", "two words"])
    gem.save_pretrained(tmp_path / "adapter")
    gem.save_pretrained(tmp_path / "merged", merge=True)
    for directory in ("adapter", "merged"):
        again = GemModel.from_pretrained(tmp_path / directory).encode(["one", "two words"])
        torch.testing.assert_close(torch.tensor(again), torch.tensor(before), atol=1e-4, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ids = [*gem.tokenizer("one")["input_ids"], *gem.special_ids]
        hidden = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(hidden, torch.tensor(before[0]), atol=1e-4, rtol=1e-4)


def test_added_tokens_leave_the_base_alone(tmp_path: Path) -> None:
    """No reserved token: new ones are added to the tokenizer; a gated GEM does not resize the table."""
    directory = tiny_models.save(tmp_path / "base", reserved=0)
    base = AutoModelForCausalLM.from_pretrained(directory)
    for names in (2, ["<|mine|>"]):
        gem = GemModel.from_base(str(directory), special_tokens=names)  # type: ignore[arg-type]
        randomize(gem)
        assert torch.equal(gem.lm(input_ids=PROMPT).logits, base(input_ids=PROMPT).logits)
        gem.save_pretrained(tmp_path / "gem")
        again = GemModel.from_pretrained(tmp_path / "gem")
        assert (again.encode("hello") == gem.encode("hello")).all()


def test_added_tokens_beyond_the_table(tmp_path: Path) -> None:
    """Ids that have no row in the table at all."""
    lm = tiny_models.build("llama")
    lm.resize_token_embeddings(259)
    lm.save_pretrained(tmp_path / "base")
    tiny_models.tokenizer(0).save_pretrained(tmp_path / "base")
    gem = GemModel.from_base(str(tmp_path / "base"), special_tokens=2)
    assert gem.special_ids == [259, 260]
    randomize(gem)
    assert gem.lm.get_input_embeddings().weight.shape[0] == 259
    assert isinstance(gem.generate(f"a {gem.config.special_tokens[0]} b", max_new_tokens=2), str)  # its name is text
    gem.save_pretrained(tmp_path / "gem")
    assert (GemModel.from_pretrained(tmp_path / "gem").encode("hi") == gem.encode("hi")).all()
    full = GemModel.from_base(str(tmp_path / "base"), tune="full", special_tokens=2)
    assert full.lm.get_input_embeddings().weight.shape[0] == 261
    full.save_pretrained(tmp_path / "full")
    assert (GemModel.from_pretrained(tmp_path / "full").encode("hi") == full.encode("hi")).all()


def test_only_gated_columns_are_cast_to_the_adapters_type(base_dir: Path) -> None:
    """PEFT casts every layer's whole input: in bfloat16 a fifth of a pass. The same bits come without it."""
    gem = make_gem(base_dir, dtype="bfloat16")
    layers = [m for m in gem.lm.modules() if isinstance(m, LoraLayer)]
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert layers
    assert all(layer._cast_input_dtype(x, torch.float32) is x for layer in layers)
    texts = ["a cat sat", "the dog ran away"]
    lean = gem.encode(texts)
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    assert (gem.encode(texts) == lean).all()
