"""Extending prompts that have run, and moving and joining their caches."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from gemify.model.forward import left_pad, text_pass
from gemify.model.kv_cache import CachedText, from_key_values, key_values, output_cache, slice_key_values
from gemify.model.prefill import extend
from gemify.model.rope_shift import concatenate, require_shiftable, shift_positions

ROTARY = ["llama", "qwen2", "qwen3", "olmo2", "gpt_neox"]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "qwen2-window"])
@pytest.mark.parametrize("cut", [1, 7, 11])
def test_extending_equals_running_at_once(name: str, cut: int) -> None:
    lm = tiny_models.build(name)
    rows = [list(range(10, 22)), list(range(30, 42))]
    whole, mask = left_pad(rows)
    at_once = extend(lm, text_pass(lm, whole[:, :0], mask[:, :0]), whole[:, :0], whole, mask, single=False)
    begun = extend(
        lm, text_pass(lm, whole[:, :0], mask[:, :0]), whole[:, :0], whole[:, :cut], mask[:, :cut], single=False
    )
    before = [(k.clone(), v.clone()) for k, v in key_values(begun.text.cache)]
    went_on = extend(lm, begun.text, begun.ids_BT, whole[:, cut:], mask[:, cut:], single=False)
    torch.testing.assert_close(went_on.logits_BV, at_once.logits_BV, rtol=1e-5, atol=1e-5)
    assert torch.equal(went_on.ids_BT, whole)
    for (k, v), (k2, v2) in zip(before, key_values(begun.text.cache), strict=True):
        assert torch.equal(k, k2)
        assert torch.equal(v, v2)


def test_rows_may_be_extended_by_different_lengths() -> None:
    lm = tiny_models.build("llama")
    texts, more = [[5, 6, 7], [8, 9]], [[11], [12, 13, 14]]
    begun = text_pass(lm, *left_pad(texts))
    got = extend(lm, begun, left_pad(texts)[0], *left_pad(more), single=False).logits_BV
    for row, (a, b) in enumerate(zip(texts, more, strict=True)):
        alone = lm(input_ids=torch.tensor([a + b])).logits[0, -1]
        torch.testing.assert_close(got[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("by", [3, 100])
def test_a_shifted_cache_is_that_of_the_text_at_its_new_place(name: str, by: int) -> None:
    lm = tiny_models.build(name)
    require_shiftable(lm)
    ids = torch.tensor([[7, 8, 9, 10]])
    moved = shift_positions(lm, text_pass(lm, ids, torch.ones_like(ids).bool()).cache, by)
    oracle = output_cache(lm(input_ids=ids, position_ids=torch.arange(4)[None] + by, use_cache=True))
    for (k, v), (k2, v2) in zip(key_values(moved), key_values(oracle), strict=True):
        torch.testing.assert_close(k, k2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v, v2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "cohere2", "opt", "mistral-window"])
def test_positions_that_cannot_be_shifted_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be concatenated"):
        require_shiftable(tiny_models.build(name))


def test_joined_caches_are_what_a_block_mask_gives() -> None:
    """Two texts that do not see each other, then a question that sees both: the dense mask is the oracle."""
    lm = tiny_models.build("llama")
    a, b, question = [5, 6, 7], [8, 9], [11, 12]
    parts, at = [], 0
    for ids in (a, b):
        x = torch.tensor([ids])
        parts.append(shift_positions(lm, text_pass(lm, x, torch.ones_like(x).bool()).cache, at))
        at += len(ids)
    text = CachedText(concatenate(lm, parts), torch.ones(1, 5, dtype=torch.bool))
    got = extend(lm, text, torch.tensor([a + b]), *left_pad([question]), single=True).logits_BV[0]
    see = torch.ones(7, 7, dtype=torch.bool).tril()
    see[3:5, :3] = False
    dense = torch.zeros(1, 1, 7, 7).masked_fill(~see, torch.finfo(torch.float32).min)
    oracle = lm(input_ids=torch.tensor([a + b + question]), attention_mask=dense, position_ids=torch.arange(7)[None])
    torch.testing.assert_close(got, oracle.logits[0, -1], rtol=1e-5, atol=1e-5)


def test_a_cut_cache_goes_on_like_a_shorter_text() -> None:
    lm = tiny_models.build("llama")
    long, short = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[5, 6, 7]])
    cache = from_key_values(lm, slice_key_values(text_pass(lm, long, torch.ones_like(long).bool()).cache, 0, 3))
    text = CachedText(cache, torch.ones(1, 3, dtype=torch.bool))
    got = extend(lm, text, short, *left_pad([[20]]), single=True).logits_BV[0]
    torch.testing.assert_close(got, lm(input_ids=torch.tensor([[5, 6, 7, 20]])).logits[0, -1], rtol=1e-5, atol=1e-5)
    windowed = tiny_models.build("mistral-window")
    with pytest.raises(ValueError, match="sliding windows"):
        slice_key_values(text_pass(windowed, long, torch.ones_like(long).bool()).cache, 0, 3)


@pytest.mark.parametrize("k", [1, 3])
def test_embedding_a_part_of_a_prompt_sees_that_part_alone(base_dir, k: int) -> None:  # type: ignore[no-untyped-def]
    """Special tokens that are shown only the columns from ``since`` on: a dense mask over the whole is the oracle."""
    from tiny_gems import make_gem

    gem = make_gem(base_dir, special_tokens=k)
    prefill = gem.prefill("one two three four five six")
    T = prefill.ids_BT.shape[1]
    assert torch.equal(gem.embed(prefill, start=0), gem.embed(prefill))
    part = gem.embed(prefill, start=T - 3)
    assert not torch.allclose(part, gem.embed(prefill), atol=1e-3)
    cut = [(keys.clone(), values.clone()) for keys, values in key_values(prefill.text.cache)]
    for keys, values in cut:  # whatever stands in the hidden columns must not matter
        keys[..., : T - 3, :] = 7.0
        values[..., : T - 3, :] = -7.0
    spoilt = type(prefill)(
        CachedText(from_key_values(gem.lm, cut), prefill.text.mask_BT),
        prefill.ids_BT,
        prefill.logits_BV,
        prefill.single,
    )
    torch.testing.assert_close(gem.embed(spoilt, start=T - 3), part)
    with pytest.raises(ValueError, match="start must be a position"):
        gem.embed(prefill, start=T)
