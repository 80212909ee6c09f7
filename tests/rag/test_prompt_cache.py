"""Prompts that grow: the same logits, vectors and answers as prompts run at once, and nothing run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_models
from gemify import GemModel
from gemify.rag.prompt_cache import ModelRunner, PromptCache
from tiny_gems import make_gem, randomize

ids = st.lists(st.integers(10, 60), min_size=1, max_size=12)


@given(prompts=st.lists(ids, min_size=1, max_size=4), shared=ids)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reaching_equals_running_at_once(gem: GemModel, prompts: list[list[int]], shared: list[int]) -> None:
    prompt = PromptCache(ModelRunner(gem))
    for rest in prompts:
        whole = shared + rest
        handle = prompt.extend_to(whole)
        oracle = gem.lm(input_ids=torch.tensor([whole])).logits[0, -1]
        torch.testing.assert_close(handle.logits_BV[0], oracle, rtol=1e-5, atol=1e-5)
        assert prompt.ids == tuple(whole)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
@pytest.mark.parametrize("since", [0, 4])
def test_embedding_on_the_way_equals_embedding_apart(tmp_path: Path, name: str, k: int, since: int) -> None:
    gem = make_gem(tiny_models.save(tmp_path / name, name), special_tokens=k)
    ids = list(range(20, 31))
    for begun in ([], ids[:3], ids):
        apart, fused = PromptCache(ModelRunner(gem)), PromptCache(ModelRunner(gem))
        if begun:
            fused.extend_to(begun)
        vector = gem.embed(apart.extend_to(ids), start=since)
        torch.testing.assert_close(fused.extend_and_embed(ids, start=since), vector, rtol=1e-5, atol=1e-5)
        assert fused.ids == apart.ids
        further = [*ids, 40, 41]
        torch.testing.assert_close(
            fused.extend_to(further).logits_BV, apart.extend_to(further).logits_BV, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_a_templates_words_after_a_text_leave_no_trace(tmp_path: Path, name: str, k: int) -> None:
    base = str(tiny_models.save(tmp_path / name, name))
    gem, plain = (GemModel.from_base(base, special_tokens=k, template=t) for t in ('{text} is:"', "{text}"))
    randomize(gem)
    randomize(plain)
    ids, words = list(range(20, 31)), gem.tokenizer(' is:"')["input_ids"]
    for since in (0, 4):
        for begun in ([], ids[:3], ids):
            apart, fused = PromptCache(ModelRunner(plain)), PromptCache(ModelRunner(gem))
            if begun:
                fused.extend_to(begun)
            vector = plain.embed(apart.extend_to([*ids, *words]), start=since)  # the words as if they were the text's
            torch.testing.assert_close(fused.extend_and_embed(ids, start=since), vector, rtol=1e-5, atol=1e-5)
            assert fused.ids == tuple(ids)
            further = [*ids, 40, 41]
            alone = PromptCache(ModelRunner(plain)).extend_to(further).logits_BV
            torch.testing.assert_close(fused.extend_to(further).logits_BV, alone, rtol=1e-5, atol=1e-5)


def test_only_what_is_new_is_run(gem: GemModel) -> None:
    prompt = PromptCache(ModelRunner(gem))
    prompt.extend_to([10, 11, 12])
    prompt.extend_to([10, 11, 12, 13, 14])
    assert prompt.computed == 5
    prompt.extend_to([10, 11, 12, 13, 14])
    assert prompt.computed == 5
    prompt.extend_to([10, 11, 20])
    assert prompt.computed == 6
    prompt.extend_to([10])  # its logits are not kept: one token runs again
    assert prompt.computed == 7


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_written_answer_is_generates_and_is_kept(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    gem = GemModel.from_base(str(tiny_models.save(tmp_path / name, name)))
    prompt, start = PromptCache(ModelRunner(gem)), [10, 11, 12, 13]
    pieces: list[str] = []
    first = prompt.generate(prompt.extend_to(start), on_text=pieces.append, max_new_tokens=9, do_sample=False)
    plain = gem.generate_ids(None, torch.tensor([start]), torch.ones(1, 4), max_new_tokens=9, do_sample=False)
    assert list(first.ids) == [i for i in plain[0, 4:].tolist() if i != 2]
    assert "".join(pieces) == first.text
    before = prompt.computed
    more = [*start, *first.ids, 30, 31]
    handle = prompt.extend_to(more)
    assert prompt.computed - before <= 3  # the last token made, and the two new ones
    torch.testing.assert_close(
        handle.logits_BV[0], gem.lm(input_ids=torch.tensor([more])).logits[0, -1], rtol=1e-5, atol=1e-5
    )


def test_a_stop_string_ends_the_answer_before_it(gem: GemModel) -> None:
    whole = PromptCache(ModelRunner(gem))
    text = whole.generate(whole.extend_to([10, 11, 12]), max_new_tokens=20, do_sample=False).text
    stop = text[3:5]
    prompt, pieces = PromptCache(ModelRunner(gem)), []  # type: ignore[var-annotated]
    written = prompt.generate(
        prompt.extend_to([10, 11, 12]), max_new_tokens=20, do_sample=False, stop=stop, on_text=pieces.append
    )
    assert written.text == text[: text.index(stop)] == "".join(pieces)
    assert written.num_tokens < 20


def test_an_empty_prompt_is_refused(gem: GemModel) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        PromptCache(ModelRunner(gem)).extend_to([])
