"""Vectors and language on a GPU: the oracles are the CPU and, to the bit, the plain base on the same GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretend_device
import tiny_models
from gemify import GemModel
from gemify.model.adapter import gate
from gemify.model.base import load_base
from gemify.model.encode import encode_ids
from gemify.model.export import export
from gemify.model.forward import MaskedBatch, left_pad, masked_pass, special_pass, suffix_pass, text_pass
from gemify.model.rope_shift import require_shiftable
from gemify.paper.tokens import build_inputs, split_row
from gpu_device import DEVICE, KINDS, NEEDS_GPU, ON_GPU, TEXTS, cosines, on_both, save_kind
from tiny_gems import make_gem

pytestmark = NEEDS_GPU
ARCHITECTURES = ["llama", "qwen3", "gemma3", "mistral-window"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny_models.save(root / name, name) for name in ARCHITECTURES}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_are_the_cpus(bases: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    directory = save_kind(bases[name], tmp_path / "gem", kind)
    gem, cpu = on_both(directory)
    assert gem.device.type == torch.device(DEVICE).type
    expected = cpu.encode(TEXTS)
    np.testing.assert_allclose(gem.encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(gem.encode(TEXTS, batch_size=1), expected, atol=1e-4)
    half, _ = on_both(directory, dtype=torch.bfloat16)
    assert (cosines(half.encode(TEXTS), expected) > 0.99).all()
    assert gem.fingerprint == cpu.fingerprint or DEVICE == pretend_device.NAME  # a module moved to it ties no weights


@pytest.mark.parametrize("kind", ["gated", "embedding-lora-mean", "embedding-lora-token-causal"])
def test_vectors_under_eager_attention(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    gem, cpu = on_both(save_kind(bases["gemma3"], tmp_path / "gem", kind), attn_implementation="eager")
    np.testing.assert_allclose(gem.encode(TEXTS), cpu.encode(TEXTS), atol=1e-4)


@pytest.mark.parametrize("kind", ["gated-2", "embedding-lora-mean"])
def test_vectors_under_flex_attention(tmp_path: Path, kind: str) -> None:
    if not ON_GPU:
        pytest.skip("flex_attention's kernels are the GPU's own")
    if shutil.which("gcc") is None:
        pytest.skip("flex_attention is compiled, and there is no C compiler")
    base = tiny_models.save(tmp_path / "base", hidden_size=64)  # heads of 16 values: its kernels take no smaller ones
    gem = make_gem(base, **KINDS[kind], device=DEVICE, dtype=torch.float32)
    flex = make_gem(base, **KINDS[kind], device=DEVICE, dtype=torch.float32, attn_implementation="flex_attention")
    np.testing.assert_allclose(flex.encode(TEXTS), gem.encode(TEXTS), atol=1e-3)


def test_compiled_layers(bases: dict[str, Path], tmp_path: Path) -> None:
    if ON_GPU and shutil.which("gcc") is None:
        pytest.skip("there is no C compiler for torch.compile")
    if not ON_GPU:
        pytest.skip("tests/model/test_encode.py compiles for the CPU")
    gem, cpu = on_both(save_kind(bases["llama"], tmp_path / "gem", "gated"))
    np.testing.assert_allclose(gem.encode(TEXTS, compile=True), cpu.encode(TEXTS), atol=1e-3)


@pytest.mark.parametrize("kind", ["gated", "gated-2", "embedding-lora-mean"])
def test_no_text_and_no_token(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    gem, cpu = on_both(save_kind(bases["llama"], tmp_path / "gem", kind))
    assert gem.encode([]).shape == (0, gem.get_embedding_dim())
    np.testing.assert_allclose(gem.encode(["", "a"]), cpu.encode(["", "a"]), atol=1e-4)
    assert encode_ids(gem.lm, gem.config, [[]], gem.projection).device.type == gem.device.type


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gated", "gated-2", "tokens", "embedding-lora-mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_the_gate_closed_it_is_the_base_to_the_bit(
    bases: dict[str, Path], tmp_path: Path, name: str, kind: str, dtype: torch.dtype, kernel: str
) -> None:
    options: dict[str, Any] = {"device": DEVICE, "dtype": dtype, "attn_implementation": kernel}
    base, _ = load_base(str(bases[name]), **options)
    gem = GemModel.from_pretrained(save_kind(bases[name], tmp_path / "gem", kind), **options)
    gem.encode(TEXTS)  # leaves nothing behind
    ids_BT, mask_BT = left_pad([[40, 41, 42], list(range(60, 79)), list(range(30, 41))])
    inputs = {"input_ids": ids_BT.to(DEVICE), "attention_mask": mask_BT.long().to(DEVICE)}
    with torch.no_grad():
        assert torch.equal(gem.lm(**inputs).logits, base(**inputs).logits)
        assert torch.equal(gem.lm(**inputs, logits_to_keep=1).logits, base(**inputs, logits_to_keep=1).logits)
        gated_BT = torch.zeros_like(mask_BT)
        gated_BT[:, -1] = True
        with gate(gated_BT.to(DEVICE)):
            opened = gem.lm(**inputs).logits
        assert not torch.equal(opened, base(**inputs).logits)
    greedy = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    written = base.generate(**inputs, **greedy, pad_token_id=0, suppress_tokens=gem.special_ids or None)
    assert torch.equal(gem.generate_ids(None, inputs["input_ids"], mask_BT.to(DEVICE), **greedy), written)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefill_is_embedded_written_on_and_recovered_from(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    gem, cpu = on_both(save_kind(bases[name], tmp_path / "gem", "gated-2"))
    prompts = TEXTS[2:5]
    ours, theirs = gem.prefill(prompts), cpu.prefill(prompts)
    torch.testing.assert_close(gem.embed(ours), cpu.embed(theirs), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(gem.embed(ours).numpy(), gem.encode(prompts), atol=1e-4)
    one, other = gem.prefill(prompts[0]), cpu.prefill(prompts[0])
    torch.testing.assert_close(gem.embed(one, start=9), cpu.embed(other, start=9), atol=1e-4, rtol=1e-4)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    assert gem.generate(ours, **greedy) == gem.generate(prompts, **greedy) == cpu.generate(prompts, **greedy)
    assert len(gem.generate(one, max_new_tokens=4, num_beams=3, num_return_sequences=2)) == 2
    recovered = gem.recover(prompts, max_new_tokens=12)
    assert recovered == gem.recover(ours, max_new_tokens=12) == cpu.recover(theirs, max_new_tokens=12)
    torch.testing.assert_close(gem.embed(ours), cpu.embed(theirs), atol=1e-4, rtol=1e-4)  # left as it was


def test_a_templates_words_and_special_tokens_run_in_one_pass(bases: dict[str, Path], tmp_path: Path) -> None:
    directory = save_kind(bases["qwen3"], tmp_path / "gem", "gated", template='{text} is:"', special_tokens=2)
    gem, cpu = on_both(directory)
    prefill = gem.prefill(TEXTS)
    np.testing.assert_allclose(gem.embed(prefill).numpy(), cpu.encode(TEXTS), atol=1e-4)
    one, other = gem.prefill(TEXTS[2]), cpu.prefill(TEXTS[2])
    torch.testing.assert_close(gem.embed(one, start=5), cpu.embed(other, start=5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_suffix_after_two_passes_is_that_of_one(name: str, dtype: torch.dtype, shared: bool) -> None:
    """A soft prompt: the suffix knows its text by the special tokens' KV alone."""
    lm = tiny_models.build(name).to(DEVICE, dtype)
    rows = [split_row(list(range(20, 34)), 9), split_row(list(range(60, 69)), 4)]
    with torch.no_grad():
        prefix_BT, mask_BT = (t.to(DEVICE) for t in left_pad([row.prefix for row in rows]))
        text = text_pass(lm, prefix_BT, mask_BT)
        specials = special_pass(lm, text, [3, 4], shared_position=shared, with_logits=True)
        suffix_BT = torch.tensor([list(row.suffix) for row in rows], device=DEVICE)
        after = suffix_pass(lm, specials, suffix_BT, torch.ones_like(suffix_BT, dtype=torch.bool))
        batch = MaskedBatch.of(
            [build_inputs(row, [3, 4], shared_position=shared) for row in rows], shared_position=shared, device=DEVICE
        )
        whole = masked_pass(lm, batch)
    assert specials.logits_BV is not None
    for at, row in enumerate(rows):
        first = len(row.prefix) + 2
        one = torch.cat([specials.logits_BV[at : at + 1], after[at]]).float()
        other = whole[at, first - 1 : first + len(row.suffix)].float()
        if dtype == torch.float32:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        else:
            assert torch.cosine_similarity(one, other, dim=-1).min() > 0.99


def test_kv_caches_are_moved_along_positions(bases: dict[str, Path]) -> None:
    """It raises where keys that were moved are not those of the other position."""
    for dtype in (torch.float32, torch.bfloat16):
        require_shiftable(load_base(str(bases["llama"]), device=DEVICE, dtype=dtype)[0])


@pytest.mark.parametrize("kind", ["tokens", "lora", "full", "embedding-lora-mean", "embedding-lora-token-causal"])
def test_exported_vectors(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    if DEVICE == pretend_device.NAME:
        pytest.skip("its tensors have no storage that could be written")
    options = {"special_tokens": 1} if kind == "tokens" else {}
    gem, cpu = on_both(save_kind(bases["qwen3"], tmp_path / "gem", kind, **options))
    expected = cpu.encode(TEXTS)
    export(gem, tmp_path / "out")
    model = library.SentenceTransformer(str(tmp_path / "out" / "embedding"), device=DEVICE)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(
        GemModel.from_pretrained(tmp_path / "gem", device=DEVICE).encode(TEXTS), expected, atol=1e-4
    )


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_layers_are_for_cpus(bases: dict[str, Path], tmp_path: Path, quantize: str) -> None:
    directory = save_kind(bases["llama"], tmp_path / "gem", "gated")
    if DEVICE != "cpu":
        with pytest.raises(ValueError, match=r"^int. weights need bfloat16 on a CPU, got bfloat16 on \w+: [^\n]*$"):
            GemModel.from_pretrained(directory, quantize=quantize, device=DEVICE)
    else:
        assert GemModel.from_pretrained(directory, quantize=quantize, device=DEVICE).encode("a").shape == (32,)
