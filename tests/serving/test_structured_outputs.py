"""Schemas, patterns, choices and grammars through the OpenAI client: what is answered is what was asked for."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from running_server import Served, serving, tiny_gem

ASK: list[Any] = [{"role": "user", "content": "hello there"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "<|eot|>"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    with serving(tiny_gem(tmp_path_factory.mktemp("model"))) as running:
        yield running


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


@pytest.fixture
def dense(served: Served) -> dict[str, int]:
    """A bias against white space, with which a random model fills its answers."""
    return {str(served.gem.tokenizer(c, add_special_tokens=False)["input_ids"][-1]): -100 for c in " \n\t\r"}


def strict(schema: dict[str, Any], **options: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True, **options}}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1, "n": 4}, {"seed": 2, "top_p": 0.9}], ids=str)
def test_answers_follow_the_schema(client: OpenAI, dense: dict[str, int], options: dict[str, Any]) -> None:
    params: Any = {"model": "tiny", "messages": ASK, "max_tokens": 200, "response_format": strict(PERSON), **options}
    params["logit_bias"] = dense
    whole = client.chat.completions.create(**params)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
    texts = [""] * len(whole.choices)
    for chunk in client.chat.completions.create(stream=True, **params):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_pydantic_models_are_parsed(client: OpenAI, dense: dict[str, int]) -> None:
    got = client.chat.completions.parse(
        model="tiny", messages=ASK, max_tokens=60, response_format=Pet, temperature=0, logit_bias=dense
    )
    assert isinstance(got.choices[0].message.parsed, Pet)


def test_any_object(client: OpenAI) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=300, temperature=0, response_format={"type": "json_object"},
    )  # fmt: skip
    if got.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(got.choices[0].message.content or ""), dict)
    assert (got.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-c]{3}(x|y)"}, "[a-c]{3}[xy]"),
        ({"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}}, "[0-9]{4}-[0-9]{2}"),
        ({"guided_choice": ["yes", 'nö "q"\n', "</s>"]}, 'yes|nö "q"\n|</s>'),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_grammar": 'root ::= "a" | "(" root ")"'}, r"\(*a\)*"),
        ({"structured_outputs": {"grammar": 'start: ("x" "y")~3'}}, "(xy){3}"),
        ({"guided_json": {"enum": [1, 2]}}, "[12]"),
        ({"structured_outputs": {"json": '{"const": [true, null]}'}}, r"\[\s*true\s*,\s*null\s*\]"),
        ({"structured_outputs": {"json_object": True}}, r"\{(.|\n)*"),
    ],
    ids=str,
)
def test_vllms_fields(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        chat = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=60, n=2, seed=seed, extra_body=fields
        )
        plain = client.completions.create(model="tiny", prompt="a", max_tokens=60, seed=seed, extra_body=fields)
        assert len(chat.choices) == 2
        for text in (*(choice.message.content or "" for choice in chat.choices), plain.choices[0].text):
            assert re.fullmatch(pattern, text), text


def test_rows_of_every_kind_share_a_batch(served: Served) -> None:
    """Rows without a grammar write what they write alone, beside rows that have one."""

    async def ask() -> list[str]:
        client = served.async_client()

        async def answer(number: int, **options: Any) -> str:
            got = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": f"question {number}"}], max_tokens=24, seed=number,
                **options,
            )  # fmt: skip
            return got.choices[0].message.content or ""

        alone = [await answer(i) for i in range(6)]
        both = await asyncio.gather(
            *(answer(i) for i in range(6)),
            *(answer(i, extra_body={"guided_regex": "[a-z]{20}"}) for i in range(6)),
        )
        await client.close()
        assert both[:6] == alone
        return both[6:]

    guided = asyncio.run(ask())
    assert all(re.fullmatch("[a-z]{20}", text) for text in guided)
    assert len(set(guided)) == 6


def test_log_probabilities_are_the_models_own(client: OpenAI) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2,
        extra_body={"guided_choice": ["zebra"]},
    )  # fmt: skip
    assert got.choices[0].logprobs is not None
    tokens = got.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == "zebra"
    assert any(token.logprob < min(top.logprob for top in token.top_logprobs) for token in tokens)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": strict({"type": "nonsense"})}, "Invalid type"),
        ({"response_format": strict({"not": {"type": "string"}})}, "Unimplemented keys"),
        ({"response_format": strict({"x": 2**70})}, "the schema:"),
        ({"guided_json": {"x": 2**70}}, "the schema:"),
        ({"response_format": strict({"$ref": "http://127.0.0.1:1/schema.json"})}, "does not fetch"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: the field is required"),
        ({"response_format": {"type": "xml"}}, "json_object"),
        ({"guided_regex": "(?=a)b"}, "invalid regex"),
        ({"guided_regex": "("}, "invalid regex"),
        ({"guided_json": "{"}, "json:"),
        ({"guided_json": "[" * 100_000}, "json:"),
        ({"guided_grammar": "no grammar"}, "GBNF"),
        ({"guided_choice": []}, "at least 1"),
        ({"guided_choice": ["a" * 200_000]}, "at most 131,072"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "give one of guided_regex and guided_choice"),
        ({"structured_outputs": {}}, "give one of json"),
        ({"structured_outputs": {"structural_tag": "x"}}, "not permitted"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(client: OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, extra_body=fields)


def test_keywords_that_cannot_be_followed_are_left_out_if_not_strict(client: OpenAI) -> None:
    schema = {"type": "integer", "not": {"const": 3}}
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=9, response_format=strict(schema, strict=False), seed=1
    )
    assert isinstance(json.loads(got.choices[0].message.content or ""), int)


def test_a_grammar_that_nothing_may_follow_fails_alone(served: Served, client: OpenAI) -> None:
    stops = served.gem.tokenizer("a", add_special_tokens=False)["input_ids"]
    fields = {"guided_choice": ["a"], "stop_token_ids": stops, "min_tokens": 5}
    with pytest.raises(openai.BadRequestError, match="forbids every token"):
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=9, extra_body=fields)
    assert served.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 1}).status_code == 200


def test_who_waits_for_a_grammar_may_leave(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends, and what was not begun is compiled no more."""
    grammars, slow, compiled = served.app.state.gemify.grammars, threading.Event(), []
    monkeypatch.setattr(grammars, "_compile", lambda grammar: slow.wait(60) and compiled.append(grammar))
    metrics = served.app.state.gemify.metrics

    async def ask() -> None:
        client = served.async_client()
        fields = [{"guided_choice": [f"left {i}"]} for i in range(3)]
        waiting = [
            asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, extra_body=f))
            for f in fields
        ]
        while metrics.in_flight_now < 3:
            await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        while metrics.in_flight_now:
            await asyncio.sleep(0.01)
        await client.close()

    try:
        asyncio.run(asyncio.wait_for(ask(), 60))
    finally:
        slow.set()
    grammars._threads.submit(lambda: None).result(60)  # after all that still waited
    assert len(compiled) <= 1


def test_a_slow_grammar_holds_up_no_other_request(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither embeddings, which need a thread as well, nor a grammar that is kept."""
    grammars, slow = served.app.state.gemify.grammars, threading.Event()
    compile_at_once = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda grammar: slow.wait(60) and compile_at_once(grammar))

    async def ask() -> None:
        client = served.async_client()

        async def answer(word: str) -> str | None:
            got = await client.chat.completions.create(
                model="tiny", messages=ASK, max_tokens=60, extra_body={"guided_choice": [word]}
            )
            return got.choices[0].message.content

        slow.set()
        assert await answer("kept") == "kept"
        slow.clear()
        waiting = [asyncio.create_task(answer(f"new {i}")) for i in range(40)]
        try:
            while served.app.state.gemify.metrics.in_flight_now < 40:
                await asyncio.sleep(0.01)
            await client.embeddings.create(model="tiny", input="a")
            assert await answer("kept") == "kept"
            assert not any(task.done() for task in waiting)
        finally:
            slow.set()
        assert await asyncio.gather(*waiting) == [f"new {i}" for i in range(40)]
        await client.close()

    asyncio.run(asyncio.wait_for(ask(), 60))
