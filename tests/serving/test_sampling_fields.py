"""vLLM's fields through the real clients: sampling, echoed prompts, lm-eval's scores, begun answers, unknown fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import OpenAI

from gemify import GemModel
from gemify.model.streaming import stream
from running_server import Served, serving, tiny_gem

ASK: list[Any] = [{"role": "user", "content": "hello there"}]
IGNORED = "x-gemify-ignored"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def served(directory: Path, one_thread: None) -> Iterator[Served]:
    with serving(tiny_gem(directory)) as running:
        yield running


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


@pytest.fixture
def gem(served: Served) -> GemModel:
    return served.gem


def test_sampled_answers_are_the_librarys(client: OpenAI, gem: GemModel) -> None:
    options: dict[str, Any] = {"top_k": 7, "min_p": 0.05, "typical_p": 0.95, "repetition_penalty": 1.2}
    got = client.completions.create(model="tiny", prompt="Once upon", max_tokens=16, seed=5, extra_body=options)
    written = "".join(
        stream(gem, "Once upon", max_new_tokens=16, seed=5, do_sample=True, temperature=1.0, top_p=1.0, **options)
    )
    assert got.choices[0].text == written


def test_stop_tokens_and_shortest_answers(client: OpenAI, gem: GemModel) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0}
    ends: dict[str, Any] = {"logit_bias": {"2": 100}}
    ended = client.chat.completions.create(**ask, **ends)
    assert (ended.choices[0].finish_reason, ended.choices[0].message.content) == ("stop", "")
    shortest = client.chat.completions.create(**ask, logit_bias={"2": 5}, extra_body={"min_tokens": 8})
    assert shortest.usage is not None
    assert shortest.usage.completion_tokens == 8
    shown = {"ignore_eos": True, "skip_special_tokens": False}
    endless = client.chat.completions.create(**ask, **ends, extra_body=shown)
    assert endless.choices[0].message.content == gem.tokenizer.decode([2] * 8)
    assert endless.choices[0].finish_reason == "length"
    q = gem.tokenizer("Q", add_special_tokens=False)["input_ids"]
    stopped = client.chat.completions.create(**ask, logit_bias={str(q[0]): 100}, extra_body={"stop_token_ids": q})
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "")


def test_an_answer_goes_on_with_the_last_message(client: OpenAI, gem: GemModel) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The answer is"}]
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    got = client.chat.completions.create(model="tiny", messages=begun, max_tokens=8, temperature=0, extra_body=options)
    prompt = str(gem.tokenizer.apply_chat_template(begun, tokenize=False, continue_final_message=True))
    ids = gem.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(ids)
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert got.choices[0].message.content == by_ids.choices[0].text


@pytest.mark.parametrize("logprobs", [None, 2])
def test_an_echoed_prompt(client: OpenAI, gem: GemModel, logprobs: int | None) -> None:
    prompts = ["Once upon", "a time"]
    params: Any = {"model": "tiny", "max_tokens": 4, "temperature": 0, "n": 2, "logprobs": logprobs}
    plain = client.completions.create(prompt=prompts, **params)
    whole = client.completions.create(prompt=prompts, echo=True, **params)
    assert [c.text for c in whole.choices] == [prompts[i // 2] + c.text for i, c in enumerate(plain.choices)]
    rows = gem.tokenizer(prompts)["input_ids"]
    by_ids = client.completions.create(prompt=rows, echo=True, **params)
    spelled = [gem.tokenizer.decode(row) for row in rows]
    assert [c.text for c in by_ids.choices] == [spelled[i // 2] + c.text for i, c in enumerate(plain.choices)]
    texts, tokens = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(prompt=prompts, echo=True, stream=True, **params):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs or [] if choice.logprobs else []
    assert texts == [c.text for c in whole.choices]
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        if logprobs is not None:
            assert choice.logprobs is not None
            length = len(gem.tokenizer(prompts[choice.index // 2])["input_ids"])
            assert choice.logprobs.token_logprobs == streamed
            assert len(streamed) == length + 4
            assert [p is None for p in streamed] == [True] + [False] * (length + 3)
            assert choice.logprobs.top_logprobs is not None
            assert [top is None for top in choice.logprobs.top_logprobs] == [p is None for p in streamed]
    alone = client.completions.create(prompt="Once upon", echo=True, **params | {"max_tokens": 0})
    assert [c.text for c in alone.choices] == ["Once upon"] * 2
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0


def test_lm_eval_scores_as_it_does_with_the_model_itself(served: Served, directory: Path) -> None:
    base = str(directory / "base")
    remote = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="tiny", tokenizer_backend="huggingface", tokenizer=base,
        batch_size=3,
    )  # fmt: skip
    local = HFLM(pretrained=served.gem.lm, tokenizer=served.gem.tokenizer, batch_size=1)
    scored = [
        Instance("loglikelihood", {}, (f"question {i % 3} is", f" answer {i}" * (1 + i % 4)), i) for i in range(8)
    ]
    got, expected = remote.loglikelihood(scored), local.loglikelihood(scored)
    for (logprob, greedy), (its_logprob, its_greedy) in zip(got, expected, strict=True):
        assert logprob == pytest.approx(its_logprob, abs=1e-3)
        assert greedy == its_greedy


def test_unknown_fields_are_named(served: Served) -> None:
    body = {"messages": ASK, "max_tokens": 1, "metadata": {"a": "b"}}
    assert IGNORED not in served.post("/v1/chat/completions", body).headers
    body |= {"new_knob": 1, "other": None, "a\r\nx-evil: 1": 1}
    for stream_ in (False, True):
        response = served.post("/v1/chat/completions", body | {"stream": stream_})
        assert response.status_code == 200
        assert response.headers[IGNORED] == "new_knob, other, ?"
        assert "x-evil" not in response.headers
    assert served.post("/v1/embeddings", {"input": "a", "knob": 1}).headers[IGNORED] == "knob"


def test_unknown_fields_are_refused_by_a_strict_server(served: Served) -> None:
    with serving(served.gem, strict=True) as strict:
        refused = strict.post("/v1/embeddings", {"input": "a", "new_knob": 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "new_knob"
        assert strict.post("/v1/embeddings", {"input": "a", "user": "ann"}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("use_beam_search", True, False),
        ("max_new_tokens", 5, None),
        ("repeat_penalty", 1.1, 1.0),
        ("mirostat", 2, 0),
        ("bad_words", ["a"], []),
        ("allowed_token_ids", [1], None),
        ("priority", 1, 0),
        ("enable_thinking", False, None),
        ("thinking", {"type": "enabled"}, {"type": "disabled"}),
        ("num_return_sequences", 2, 1),
        ("extra_body", {"top_k": 1}, {}),
        ("penalty_alpha", 0.6, 0),
    ],
)
def test_what_is_well_known_and_not_here_is_refused_by_name(
    client: OpenAI, field: str, value: Any, harmless: Any
) -> None:
    for create, prompt in (
        (client.chat.completions.create, {"messages": ASK}),
        (client.completions.create, {"prompt": "a"}),
    ):
        ask: Any = {"model": "tiny", "max_tokens": 1, **prompt}
        with pytest.raises(openai.BadRequestError, match=f"{field} is not supported here") as raised:
            create(**ask, extra_body={field: value})
        assert raised.value.code == "unsupported_parameter"
        create(**ask, extra_body={field: harmless})


@pytest.mark.parametrize(
    ("path", "field", "value", "harmless"),
    [
        ("/v1/embeddings", "add_special_tokens", False, True),
        ("/v1/embeddings", "truncate_dim", 4, None),
        ("/v1/embeddings", "prompt", "query: ", ""),
        ("/v1/embeddings", "pooling", "mean", None),
        ("/v1/embeddings", "task", "retrieval", None),
        ("/v1/rerank", "truncate_prompt_tokens", 5, -1),
        ("/v2/rerank", "max_tokens_per_doc", 5, None),
        ("/tokenize", "chat_template", "{{ messages }}", None),
    ],
)
def test_other_routes_refuse_what_is_well_known_there(
    served: Served, path: str, field: str, value: Any, harmless: Any
) -> None:
    bodies = {"/v1/embeddings": {"input": "a"}, "/tokenize": {"prompt": "a"}}
    body = bodies.get(path, {"query": "a", "documents": ["a"]})
    refused = served.post(path, body | {field: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert IGNORED not in served.post(path, body | {field: harmless}).headers
    assert served.post(path, body | {"suffix": "a"}).headers[IGNORED] == "suffix"  # well known elsewhere
