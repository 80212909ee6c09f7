"""An embedding pass of its own (``embedding_lora``): the oracles are PEFT and transformers' own bidirectional mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_models
from gemify import GemModel
from gemify.model.attention import MaskNotUsedError, bidirectional_mask
from gemify.model.projection import Projection, ridge
from tiny_gems import make_gem

TEXTS = ["a cat on a mat", "x", "the river is long and red " * 3]
MEAN: dict[str, Any] = {"tune": "embedding_lora", "special_tokens": 0, "attention": "bidirectional"}


def states(directory: Path, base: Path, gem: GemModel, *, causal: bool) -> list[torch.Tensor]:
    """Hidden states [T, D] of each text alone, by PEFT on the plain base and no code of ours."""
    lm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), str(directory)
    )
    lm.config.is_causal = causal
    rows = gem.text_tokenizer(TEXTS, max_tokens=gem.config.max_text_tokens)
    with torch.no_grad():
        return [
            lm(input_ids=torch.tensor([[*row, *gem.special_ids]]), output_hidden_states=True).hidden_states[-1][0]
            for row in rows
        ]


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "mistral-window", "gemma2", "gemma3", "phi3-window", "gpt2", "olmo2"]
)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_vectors_are_pefts_and_language_is_the_bases(tmp_path: Path, name: str, attention: str) -> None:
    kernel = "eager" if name == "gemma2" else "sdpa"
    base = tiny_models.save(tmp_path / "base", name, attn_implementation=kernel)
    gem = make_gem(base, **{**MEAN, "attention": attention}, attn_implementation=kernel)
    gem.save_pretrained(tmp_path / "gem")
    expected = [s.mean(0).numpy() for s in states(tmp_path / "gem", base, gem, causal=attention == "causal")]
    np.testing.assert_allclose(gem.encode(TEXTS), np.stack(expected), atol=3e-5)
    ids = torch.tensor([[40, 41, 42, 43, 44]])
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation=kernel)
    with torch.no_grad():
        assert torch.equal(gem.lm(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_vector_may_stand_at_a_special_token(base_dir: Path, tmp_path: Path, attention: str) -> None:
    gem = make_gem(base_dir, tune="embedding_lora", attention=attention)
    gem.save_pretrained(tmp_path / "gem")
    expected = [s[-1].numpy() for s in states(tmp_path / "gem", base_dir, gem, causal=attention == "causal")]
    np.testing.assert_allclose(gem.encode(TEXTS), np.stack(expected), atol=3e-5)


def test_eager_and_sdpa_agree_and_padding_is_not_seen(base_dir: Path) -> None:
    one, other = (make_gem(base_dir, **MEAN, attn_implementation=a) for a in ("sdpa", "eager"))
    together = one.encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(together, np.stack([other.encode(t) for t in TEXTS]), atol=2e-5)


def test_a_pass_without_a_mask_is_an_error() -> None:
    with pytest.raises(MaskNotUsedError, match="no bidirectional mask"), bidirectional_mask():
        pass


def test_saved_and_loaded_with_a_projection(base_dir: Path, tmp_path: Path) -> None:
    gem = make_gem(base_dir, **MEAN)
    bare, fingerprint = gem.encode(TEXTS), gem.fingerprint
    weight_PD = torch.randn(7, gem.get_embedding_dim())
    gem.config, gem.projection = replace(gem.config, projection_dim=7), Projection(weight_PD)
    unit = bare / np.linalg.norm(bare, axis=1, keepdims=True)
    np.testing.assert_allclose(gem.encode(TEXTS), unit @ weight_PD.numpy().T, atol=1e-5)
    assert gem.get_embedding_dim() == 7
    assert gem.fingerprint != fingerprint
    gem.save_pretrained(tmp_path / "gem")
    again = GemModel.from_pretrained(tmp_path / "gem")
    assert (again.encode(TEXTS) == gem.encode(TEXTS)).all()
    assert again.fingerprint == gem.fingerprint
    (tmp_path / "gem" / "projection.safetensors").unlink()
    with pytest.raises(ValueError, match=r"projection\.safetensors is missing or damaged"):
        GemModel.from_pretrained(tmp_path / "gem")


def test_a_chats_cache_gives_no_vector(base_dir: Path) -> None:
    gem = make_gem(base_dir, tune="embedding_lora")
    prefill = gem.prefill("a cat")
    with pytest.raises(ValueError, match="embeds in a pass of its own: to embed use encode"):
        gem.embed(prefill)
    with pytest.raises(ValueError, match="nothing to recover"):
        gem.recover("a cat")
    with pytest.raises(ValueError, match=r"bidirectional attention needs .* tune 'gated' has none"):
        GemModel.from_base(str(base_dir), attention="bidirectional")


def test_ridge_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    states_ND = torch.randn(300, 12, generator=generator)
    weight_PD = torch.randn(5, 12, generator=generator)
    targets_NP = torch.nn.functional.normalize(states_ND, dim=-1) @ weight_PD.T
    torch.testing.assert_close(ridge(states_ND * 9.0, targets_NP, penalty=1e-9), weight_PD, atol=1e-4, rtol=1e-4)
