"""Log-likelihoods with shared prefixes: the figures of one plain forward pass a request, and of lm-eval's own code."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny_models
from gemify import GemModel
from gemify.evaluation.lm_eval_prefix_cache import score, share_prefixes
from tiny_gems import randomize

Requests = list[tuple[list[int], list[int]]]


def one_by_one(lm: Any, requests: Requests) -> list[tuple[float, bool]]:
    """The oracle: each request alone, unpadded and uncached, through the whole model."""
    answers = []
    for context, ending in requests:
        with torch.no_grad():
            logits_TV = lm(input_ids=torch.tensor([(context + ending)[:-1]]), use_cache=False).logits[0]
        scored_TV = logits_TV[len(context) - 1 :].log_softmax(-1)
        total = sum(float(row_V[token]) for row_V, token in zip(scored_TV, ending, strict=True))
        answers.append((total, scored_TV.argmax(-1).tolist() == ending))
    return answers


def greedy(lm: Any, context: list[int], count: int) -> list[int]:
    """What the model itself would go on with."""
    ids = list(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(context) :]


def assert_same(got: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [g for _, g in got] == [g for _, g in expected]
    assert [s for s, _ in got] == pytest.approx([s for s, _ in expected], abs=1e-4)


def draw(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(8, tiny_models.VOCABULARY) for _ in range(count)]


def sample(lm: Any) -> Requests:
    """A header of 9 tokens, contexts of 1 to 40 more, endings of 1 to 30, of which some are the model's own."""
    contexts = [draw(0, 9) + draw(n, n) for n in (1, 17, 40, 39)]
    requests = [(c, draw(100 + n, n)) for c in contexts for n in (1, 4, 30)]
    context, own = contexts[1], greedy(lm, contexts[1], 4)
    other = [(token + 1) % tiny_models.VOCABULARY for token in own]
    answers = [own, own[:1], own[:3], [*own[:-1], other[-1]], [other[0], *own[1:]]]
    requests += [(context, answer) for answer in answers]
    random.Random(5).shuffle(requests)
    return requests


EXTRA = {  # distances of their own: attention biased by the column (MPT) or the mask (Bloom), chunks (Llama 4)
    "mpt": {"vocab_size": tiny_models.VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "bloom": {"vocab_size": tiny_models.VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama4_text": {
        **tiny_models.HEADED,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
    },
}


def build(name: str) -> PreTrainedModel:
    if name in tiny_models.ARCHITECTURES:
        return tiny_models.build(name, "eager" if name in tiny_models.EAGER_ONLY else "sdpa")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **EXTRA[name]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return lm.eval()


@pytest.mark.parametrize("name", [*tiny_models.ARCHITECTURES, *EXTRA])
def test_every_architecture_scores_as_one_by_one(name: str) -> None:
    lm = build(name)
    requests = sample(lm)
    expected = one_by_one(lm, requests)
    assert 2 < sum(own for _, own in expected) < len(expected) - 3
    for max_tokens in (130, 8192):
        assert_same(score(lm, requests, max_tokens=max_tokens), expected)


TOKENS = st.integers(3, 60)


@st.composite
def random_requests(draw: Any) -> Requests:
    header = draw(st.lists(TOKENS, max_size=12))
    contexts = [
        header + draw(st.lists(TOKENS, min_size=0 if header else 1, max_size=25))
        for _ in range(draw(st.integers(1, 5)))
    ]
    endings = st.lists(TOKENS, min_size=1, max_size=12)
    return draw(st.lists(st.tuples(st.sampled_from(contexts), endings), min_size=1, max_size=10))


@pytest.fixture(scope="module")
def three() -> list[PreTrainedModel]:
    """Rotary positions, absolute positions, sliding windows shorter than the texts."""
    return [tiny_models.build(name) for name in ("llama", "gpt2", "mistral-window")]


@given(requests=random_requests(), max_tokens=st.sampled_from([1, 40, 300]))
@settings(max_examples=12)
def test_any_requests_score_as_one_by_one(three: list[PreTrainedModel], requests: Requests, max_tokens: int) -> None:
    for lm in three:
        assert_same(score(lm, requests, max_tokens=max_tokens), one_by_one(lm, requests))


def test_one_request_one_context_and_none(three: list[PreTrainedModel]) -> None:
    for lm in three:
        for requests in ([([7], [9])], [(draw(1, 20), draw(2, 5))], [(draw(1, 20), draw(n, 3)) for n in range(4)]):
            assert_same(score(lm, requests), one_by_one(lm, requests))
        assert score(lm, []) == []


@pytest.mark.parametrize("requests", [[([5], [6]), ([], [6])], [([5], [6]), ([5], [])]])
def test_nothing_to_score_is_said(three: list[PreTrainedModel], requests: Requests) -> None:
    with pytest.raises(ValueError, match=r"^request 1 has an empty context or continuation") as caught:
        score(three[0], requests)
    assert "\n" not in str(caught.value)


def test_every_token_runs_once(three: list[PreTrainedModel]) -> None:
    """Header once, each distinct context once, each ending but its last token: no column more, with equal lengths."""
    lm = three[0]
    contexts = [draw(0, 50) + draw(n, 10) for n in (1, 2, 3)]
    requests = [(c, draw(10 + n, 6)) for c in contexts for n in range(4)]
    ran: list[int] = []
    hook = lm.get_input_embeddings().register_forward_hook(lambda module, args, output: ran.append(args[0].numel()))
    head: list[int] = []
    hook_head = lm.lm_head.register_forward_hook(lambda module, args, output: head.append(args[0].shape[:-1].numel()))
    score(lm, requests)
    hook.remove()
    hook_head.remove()
    assert sum(ran) == 50 + 3 * 10 + 12 * 5
    assert sum(head) == 3 + 12 * 5


def test_a_gems_language_model_shares_its_header_too(gem: GemModel) -> None:
    requests = [(draw(0, 50) + draw(n, 5), draw(20 + n, 3)) for n in range(1, 4)]
    ran: list[int] = []
    hook = gem.lm.get_input_embeddings().register_forward_hook(lambda m, args, out: ran.append(args[0].numel()))
    got = score(gem.lm, requests)
    hook.remove()
    assert sum(ran) == 50 + 3 * 5 + 3 * 2
    randomize(gem, seed=9)
    assert score(gem.lm, requests) == got  # trained weights touch no plain text
    assert_same(got, one_by_one(gem.lm, requests))


# In lm-eval

ASKED = [
    ("", "abc"),
    ("", "abd"),
    ("Question: one\nAnswer:", " yes"),
    ("Question: one\nAnswer:", " no, not at all"),
    ("Question: one\nAnswer: ", "yes"),  # lm-eval moves the space
    ("Question: two, longer\nAnswer:", " A"),
    ("Question: two, longer\nAnswer:", " B"),
    ("Q", "x"),
    *[("long " * 9 + "c" * extra, "de") for extra in range(5)],  # around the model's 48 positions
    ("x" * 90, " ending"),
    ("y", "z" * 47),
]


def harness_of(lm: Any, *, bos: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    tokenizer = tiny_models.tokenizer()
    if bos:
        start = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = start
    return HFLM(pretrained=lm, tokenizer=tokenizer, backend="causal", batch_size=4)


def instances(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window"])
def test_a_shared_harness_answers_as_the_stock_one(name: str, bos: bool) -> None:
    pytest.importorskip("lm_eval")
    model_type, values = tiny_models.ARCHITECTURES[name]
    length = {"n_positions" if name == "gpt2" else "max_position_embeddings": 48}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **length})).eval()
    stock, shared = harness_of(lm, bos=bos), share_prefixes(harness_of(lm, bos=bos), max_tokens=200)
    assert shared.max_length == 48
    expected = stock.loglikelihood(instances(ASKED), disable_tqdm=True)
    runs: list[int] = []
    hook = lm.get_input_embeddings().register_forward_hook(lambda m, args, out: runs.append(args[0].shape[1]))
    assert_same(shared.loglikelihood(instances(ASKED), disable_tqdm=True), expected)
    hook.remove()
    assert max(runs) == 48  # cut as lm-eval cuts them
    rolled = [("a text longer than the model's forty-eight positions, so in parts",), ("short",)]
    one, other = (h.loglikelihood_rolling(instances(rolled), disable_tqdm=True) for h in (stock, shared))  # type: ignore[arg-type]
    assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_recurrent_models_go_through_lm_eval(name: str) -> None:
    pytest.importorskip("lm_eval")
    lm = tiny_models.build(name)
    expected = harness_of(lm, bos=True).loglikelihood(instances(ASKED[:7]), disable_tqdm=True)
    shared = share_prefixes(harness_of(lm, bos=True))
    assert_same(shared.loglikelihood(instances(ASKED[:7]), disable_tqdm=True), expected)
