"""Each sampling parameter against transformers' `generate` with the same seed, and what ends an answer."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_client import Asker, Heard, running
from gemify import GemModel
from gemify.engine.requests import PromptLogprobs
from gemify.engine.sampling import SamplingParams
from tiny_gems import make_gem

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = [random.Random(i).randrange(10, 260) for i in range(40)]


@pytest.fixture(scope="module")
def gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir, special_tokens=2)


@pytest.fixture(scope="module")
def asker(gem: GemModel) -> Any:
    with running(gem, max_num_batched_tokens=16) as asker:
        yield asker


def generated(gem: GemModel, new: int, seed: int, **options: Any) -> list[int]:
    """transformers' own answer."""
    never = list(gem.config.special_ids)
    torch.manual_seed(seed)
    ids_1T = torch.tensor([IDS])
    defaults = {"top_k": 0, "pad_token_id": 0, "suppress_tokens": never, "max_new_tokens": new, "do_sample": True}
    with torch.no_grad():
        out = gem.lm.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **defaults | options)
    return out[0, len(IDS) :].tolist()


def tokens(heard: Heard) -> list[int]:
    return [token.id for token in heard.tokens()]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 20, "top_p": 0.7, "temperature": 1.3},
        {"min_p": 0.3, "temperature": 1.5},
        {"typical_p": 0.4},
        {"min_p": 0.1, "top_p": 0.8, "typical_p": 0.9, "top_k": 50, "temperature": 0.7},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6, "top_k": 8},
    ],
    ids=str,
)
def test_draws_are_those_of_generate(gem: GemModel, asker: Asker, options: dict[str, Any]) -> None:
    for seed in range(4):
        sampling = SamplingParams(max_tokens=12, seed=seed, top_logprobs=0, **options)
        assert tokens(asker.write(IDS, sampling)) == generated(gem, 12, seed, **options)


def test_a_repetition_penalty_counts_the_prompt_in_greedy_answers(gem: GemModel, asker: Asker) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=3.0, top_logprobs=0)
    written = tokens(asker.write(IDS, sampling))
    assert written == generated(gem, 12, 0, do_sample=False, repetition_penalty=3.0)
    assert written != generated(gem, 12, 0, do_sample=False)


def test_what_changes_nothing_leaves_the_draws_alone(asker: Asker) -> None:
    plain = SamplingParams(max_tokens=12, seed=3, top_p=0.9, top_logprobs=0)
    neutral = SamplingParams(
        max_tokens=12, seed=3, top_p=0.9, top_logprobs=0, top_k=-1, min_p=0.0, typical_p=1.0, repetition_penalty=1.0
    )
    assert tokens(asker.write(IDS, plain)) == tokens(asker.write(IDS, neutral))


def test_a_stop_token_ends_the_answer_and_is_none_of_its_text(gem: GemModel, asker: Asker) -> None:
    written = generated(gem, 12, 0, do_sample=False)
    stop = written[5]
    before = written[: written.index(stop)]
    heard = asker.write(IDS, SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(stop,)))
    assert heard.text() == gem.tokenizer.decode(before, skip_special_tokens=True)
    (end,) = heard.finished()
    assert (end.reason, end.completion_tokens) == ("stop", len(before) + 1)
    late = asker.write(IDS, SamplingParams(max_tokens=len(before) + 1, temperature=0.0, stop_token_ids=(stop,)))
    assert late.finished()[0].reason == "stop"


def test_end_tokens_count_or_not(gem: GemModel, asker: Asker) -> None:
    always_end = {2: 100.0}
    ended = asker.write(IDS, SamplingParams(max_tokens=8, temperature=0.0, logit_bias=always_end))
    assert (ended.text(), ended.finished()[0].completion_tokens) == ("", 1)
    going_on = SamplingParams(max_tokens=8, temperature=0.0, logit_bias=always_end, ignore_eos=True, top_logprobs=0)
    heard = asker.write(IDS, going_on)
    assert tokens(heard) == [2] * 8
    assert (heard.text(), heard.finished()[0].reason) == ("", "length")
    shown = asker.write(IDS, SamplingParams(**{**vars(going_on), "skip_special_tokens": False}))
    assert shown.text() == gem.tokenizer.decode([2] * 8)
    held_back = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={2: 5.0}, min_tokens=5, top_logprobs=0)
    heard = asker.write(IDS, held_back)
    assert tokens(heard)[:5] == generated(gem, 5, 0, do_sample=False, min_new_tokens=5)
    assert 2 not in tokens(heard)[:5]


def test_a_stop_string_counts_from_min_tokens_on(asker: Asker) -> None:
    plain = asker.write(IDS, SamplingParams(max_tokens=30, temperature=0.0)).text()
    stop = plain[0]
    assert asker.write(IDS, SamplingParams(max_tokens=30, temperature=0.0, stop=(stop,))).text() == ""
    heard = asker.write(IDS, SamplingParams(max_tokens=30, temperature=0.0, stop=(stop,), min_tokens=4))
    assert len(heard.text()) > 0
    assert plain.startswith(heard.text())


def test_a_prompts_log_probabilities_are_the_models(gem: GemModel, asker: Asker) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.0, top_logprobs=2, prompt_logprobs=3)
    with torch.no_grad():
        logprobs_TV = gem.lm(torch.tensor([IDS])).logits[0].log_softmax(-1)
    for _ in range(2):  # the second time the prefix cache knows the prompt
        heard = asker.write(IDS, sampling).wait()
        (prompt,) = heard.of(PromptLogprobs)
        assert [token.id for token in prompt.tokens] == IDS
        assert math.isnan(prompt.tokens[0].logprob)
        for at, token in enumerate(prompt.tokens[1:]):
            assert token.logprob == pytest.approx(float(logprobs_TV[at, token.id]), abs=1e-4)
            assert [t.logprob for t in token.top] == pytest.approx(logprobs_TV[at].topk(3).values.tolist(), abs=1e-4)
        assert tokens(heard) == generated(gem, 3, 0, do_sample=False)
        assert asker.request.cached_tokens == 0


@pytest.mark.parametrize(
    "options",
    [{"top_k": -2}, {"min_p": 1.5}, {"typical_p": 0.0}, {"repetition_penalty": 0.0}, {"min_tokens": 300}],
    ids=str,
)
def test_what_lies_outside_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must lie in"):
        SamplingParams(**options)
