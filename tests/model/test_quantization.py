"""Quantized weights: a layer multiplies by what `weight` gives; a gated GEM stays its quantized base to the bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_models
from gemify import GemModel
from gemify.model.adapter import gate
from gemify.model.base import load_base
from gemify.model.pretrained import weights_fingerprint
from gemify.model.quantization import Int4Linear, Int8Linear, Nf4Linear, Quantization, QuantizedLinear
from tiny_gems import make_gem, save_gem

PROMPT = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]])
NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
EACH = pytest.mark.parametrize("quantize", ["int8", "int4", pytest.param("nf4", marks=NEEDS_BITSANDBYTES)])


@pytest.mark.parametrize(
    ("made", "steps"), [(Int8Linear, 127), (Int4Linear, 7.5), pytest.param(Nf4Linear, 3.5, marks=NEEDS_BITSANDBYTES)]
)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_that_of_weights_near_the_given_ones(made: type[QuantizedLinear], steps: float, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 48).bfloat16().requires_grad_(False)
    layer, x = made(linear), torch.randn(2, rows, 96).bfloat16()
    step = linear.weight.float().abs().max() / steps
    assert (layer.weight.float() - linear.weight.float()).abs().max() < 0.55 * step + 2e-3 * linear.weight.abs().max()
    expected = x.float() @ layer.weight.float().T + linear.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, atol=2e-2, rtol=2e-2)


@EACH
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gated_gem_is_its_quantized_base_to_the_bit(
    tmp_path: Path, quantize: Quantization, architecture: str
) -> None:
    directory = tiny_models.save(tmp_path / "base", architecture)
    base, _ = load_base(str(directory), quantize=quantize)
    gem = GemModel.from_pretrained(save_gem(directory, tmp_path / "gem"), quantize=quantize)
    found = [type(m) for m in gem.lm.modules() if isinstance(m, QuantizedLinear)]
    assert found == [type(m) for m in base.modules() if isinstance(m, QuantizedLinear)]
    assert len(found) > 10
    with torch.no_grad():
        assert torch.equal(gem.lm(PROMPT).logits, base(PROMPT).logits)
        columns = torch.zeros_like(PROMPT, dtype=torch.bool)
        columns[0, 5] = True
        with gate(columns):
            assert not torch.equal(gem.lm(PROMPT).logits[0, 5], base(PROMPT).logits[0, 5])
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "suppress_tokens": gem.special_ids}
    written = base.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), pad_token_id=0, **options)
    ours = gem.generate_ids(None, PROMPT, torch.ones_like(PROMPT).bool(), max_new_tokens=40, min_new_tokens=40)
    assert torch.equal(ours, written)


@EACH
def test_vectors_are_near_the_unquantized_ones(base_dir: Path, tmp_path: Path, quantize: Quantization) -> None:
    directory = save_gem(base_dir, tmp_path / "gem")
    texts = ["a little text", "another one that is a bit longer"]
    exact = GemModel.from_pretrained(directory).encode(texts, normalize_embeddings=True)
    near = GemModel.from_pretrained(directory, quantize=quantize).encode(texts, normalize_embeddings=True)
    assert ((exact * near).sum(1) > 0.9).all()


@EACH
def test_gradients_reach_a_gated_adapter_through_quantized_layers(base_dir: Path, quantize: Quantization) -> None:
    gem = make_gem(base_dir, quantize=quantize)
    assert gem.adapter is not None
    columns = torch.zeros_like(PROMPT, dtype=torch.bool)
    columns[0, 3] = True
    with gate(columns):
        gem.lm(PROMPT).logits.float().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in gem.adapter.lora_parameters())


def test_fingerprints_tell_quantizations_apart(base_dir: Path) -> None:
    names = [None, "int8", "int4", *(["nf4"] if find_spec("bitsandbytes") else [])]
    found = {weights_fingerprint(load_base(str(base_dir), quantize=name)[0]) for name in names}
    assert len(found) == len(names)


def test_what_cannot_be_is_refused(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'int3': choose one of none, int8, int4, nf4"):
        load_base(str(base_dir), quantize="int3")
    with pytest.raises(ValueError, match="leave dtype out"):
        load_base(str(base_dir), quantize="int4", dtype=torch.float32)
    full = make_gem(base_dir, tune="full", quantize="int8")
    with pytest.raises(ValueError, match="cannot be saved"):
        full.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()
