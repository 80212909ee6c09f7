"""Anthropic's client against the server: what it gets is what a chat gets, in Anthropic's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic import Anthropic
from pydantic import BaseModel
from test_answer_format import THINKS
from test_structured_outputs import PERSON
from test_tools import SCHEMAS, TEMPLATE, WEATHER

import tiny_models
from gemify import GemModel
from gemify.engine.requests import Completion
from gemify.model.answer_parser import AnswerDelta, ToolCall
from gemify.serving.protocol.messages import CreateMessageRequest
from gemify.serving.response_builder import ChoiceState, build_usage
from gemify.serving.routes.messages import MessageBuilder
from running_server import FAILURES, Served, serving, tiny_gem
from tiny_gems import make_gem

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
TOOLS: list[Any] = [
    {"name": "weather", "description": "the </s> weather", "input_schema": WEATHER},
    {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]
KEEP_THOUGHTS = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
GREEDY = {"temperature": 0}  # the client names it no longer, but sends it


class Likes(BaseModel):
    cats: bool
    dogs: bool


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory) -> GemModel:
    return tiny_gem(tmp_path_factory.mktemp("messages"), TEMPLATE)


@pytest.fixture(scope="module")
def served(gem: GemModel, one_thread: None) -> Iterator[Served]:
    with serving(gem) as running:
        yield running


def client_of(served: Served, **options: Any) -> Anthropic:
    return Anthropic(**{"base_url": served.url, "api_key": "no key is needed", "max_retries": 0, **options})


@pytest.fixture
def client(served: Served) -> Anthropic:
    return client_of(served)


def prompt_tokens(message: Any) -> int:
    return int(message.usage.input_tokens + message.usage.cache_read_input_tokens)


def test_an_answer_is_that_of_a_chat(client: Anthropic, served: Served) -> None:
    said: list[Any] = [{"role": "system", "content": "Be brief."}, *ASK]
    chat = served.client().chat.completions.create(model="tiny", messages=said, temperature=0, max_tokens=12)
    assert chat.usage is not None
    blocks: Any = [{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}}]
    blocks.append({"type": "text", "text": "brief."})
    for system in ("Be brief.", blocks):
        got = client.messages.create(model="tiny", max_tokens=12, system=system, messages=ASK, extra_body=GREEDY)
        assert [block.to_dict()["text"] for block in got.content] == [chat.choices[0].message.content]
        assert (got.role, got.model, got.stop_reason, got.stop_sequence) == ("assistant", "tiny", "max_tokens", None)
        assert prompt_tokens(got) == chat.usage.prompt_tokens
        assert got.usage.output_tokens == 12
        count = client.messages.count_tokens(model="tiny", system=system, messages=ASK)
        assert count.input_tokens == chat.usage.prompt_tokens
    assert got.usage.cache_read_input_tokens == chat.usage.prompt_tokens - 1
    within: Any = [{"role": "system", "content": "Be brief."}, *ASK]
    again = client.messages.create(model="tiny", max_tokens=12, messages=within, extra_body=GREEDY)
    assert again.content[0].to_dict()["text"] == chat.choices[0].message.content


def test_a_stream_joins_to_the_answer(client: Anthropic, served: Served) -> None:
    params: Any = {"model": "tiny", "max_tokens": 12, "messages": ASK, "extra_body": GREEDY}
    whole = client.messages.create(**params)
    with client.messages.stream(**params) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].to_dict()["text"]
    assert final.content[0].to_dict()["text"] == text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    assert prompt_tokens(final) == prompt_tokens(whole)
    body = {name: value for name, value in params.items() if name != "extra_body"} | GREEDY | {"stream": True}
    lines = served.post("/v1/messages", body).text.split("\n\n")
    names = [line.partition("\n")[0].removeprefix("event: ") for line in lines if line]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    start = json.loads(lines[0].partition("data: ")[2])["message"]
    assert start["usage"] == {"input_tokens": prompt_tokens(final), "output_tokens": 0}


def test_a_stop_sequence_is_named(client: Anthropic) -> None:
    params: Any = {"model": "tiny", "max_tokens": 12, "messages": ASK, "extra_body": GREEDY}
    text = client.messages.create(**params).content[0].to_dict()["text"]
    got = client.messages.create(stop_sequences=["never", text[4:6]], **params)
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", text[4:6])
    assert got.content[0].to_dict()["text"] == text[: text.find(text[4:6])]


def test_an_answer_goes_on_from_the_last_message(client: Anthropic, served: Served) -> None:
    begun: list[Any] = [*ASK, {"role": "assistant", "content": "The sun"}]
    chat = served.client().chat.completions.create(
        model="tiny", messages=begun, temperature=0, max_tokens=8, extra_body={"continue_final_message": True}
    )
    got = client.messages.create(model="tiny", max_tokens=8, messages=begun, extra_body=GREEDY)
    assert got.content[0].to_dict()["text"] == chat.choices[0].message.content


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=str)
def test_a_call_that_must_come(client: Anthropic, choice: Any) -> None:
    params: Any = {"model": "tiny", "max_tokens": 600, "messages": ASK, "tools": TOOLS, "extra_body": GREEDY}
    params["tool_choice"] = {**choice, "disable_parallel_tool_use": True}
    whole = client.messages.create(**params)
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert call.type == "tool_use"
    jsonschema.validate(call.input, SCHEMAS[call.name])
    with client.messages.stream(**params) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == call.input
    assert final.stop_reason == "tool_use"
    (streamed,) = final.content
    assert streamed.type == "tool_use"
    assert (streamed.name, streamed.input) == (call.name, call.input)


def test_a_loop_of_calls(client: Anthropic, gem: GemModel) -> None:
    """What an agent does: a call, its result in the user's message, an answer in words."""
    first = client.messages.create(
        model="tiny", max_tokens=600, messages=ASK, tools=TOOLS, tool_choice={"type": "tool", "name": "weather"},
        extra_body=GREEDY,
    )  # fmt: skip
    (call,) = first.content
    assert call.type == "tool_use"
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny </s>"}]}
    asked: Any = {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}
    messages: list[Any] = [*ASK, {"role": "assistant", "content": first.content}, asked]
    none: Any = {"type": "none"}
    params: Any = {"model": "tiny", "messages": messages, "tools": TOOLS, "tool_choice": none}
    answer = client.messages.create(max_tokens=5, extra_body=GREEDY, **params)
    assert [block.type for block in answer.content] == ["text"]
    shown = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": call.name, "arguments": call.input}}
        ]},
        {"role": "tool", "content": "sunny </s>"},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    ids = gem.tokenizer.apply_chat_template(
        shown, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert client.messages.count_tokens(**params).input_tokens == len(ids)
    result["is_error"] = True
    longer = client.messages.count_tokens(**params).input_tokens
    assert longer == len(ids) + len(gem.tokenizer("Error: ", add_special_tokens=False)["input_ids"])


def test_an_answer_that_follows_a_schema(client: Anthropic) -> None:
    params: Any = {"model": "tiny", "messages": ASK, "max_tokens": 800}
    parsed = client.messages.parse(output_format=Likes, extra_body=GREEDY, **params)
    assert isinstance(parsed.parsed_output, Likes)
    form = {"type": "json_schema", "schema": PERSON}
    got = client.messages.create(extra_body={**GREEDY, "output_config": {"format": form}}, **params)
    assert got.stop_reason == "end_turn"
    jsonschema.validate(json.loads(got.content[0].to_dict()["text"]), PERSON)  # type: ignore[arg-type]


def test_thoughts_are_blocks_of_their_own(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> None:
    gem = make_gem(tiny_models.save(tmp_path_factory.mktemp("thinks") / "base"))
    gem.tokenizer.chat_template = THINKS
    with serving(gem) as served:
        client = client_of(served)
        params: Any = {"model": "tiny", "max_tokens": 2000, "messages": ASK}
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}
        body: Any = {**GREEDY, "max_tokens": 12}
        whole = client.messages.create(thinking=thinking, extra_body=body, **params)
        assert [block.type for block in whole.content] == ["thinking"]
        assert 0 < whole.usage.to_dict()["output_tokens_details"]["thinking_tokens"] <= 12  # type: ignore[index]
        with client.messages.stream(thinking=thinking, extra_body=body, **params) as stream:
            thought = "".join(event.thinking for event in stream if event.type == "thinking")
        assert thought == whole.content[0].to_dict()["thinking"]
        hidden: Any = {"type": "adaptive", "display": "omitted"}
        omitted = client.messages.create(
            thinking=hidden, extra_body={**body, "context_management": KEEP_THOUGHTS}, **params
        )
        assert [block.type for block in omitted.content] == ["text"], "this template thinks only if it is told to"
        with client.messages.stream(thinking={**thinking, "display": "omitted"}, extra_body=body, **params) as stream:
            assert {event.type for event in stream} == {"message_start", "message_delta", "message_stop"}
        quiet = client.messages.create(thinking={"type": "disabled"}, extra_body=body, **params)
        assert [block.type for block in quiet.content] == ["text"]


def test_a_model_without_thoughts_refuses_to_think(client: Anthropic) -> None:
    params: Any = {"model": "tiny", "max_tokens": 2000, "messages": ASK, "extra_body": {"max_tokens": 2}}
    with pytest.raises(anthropic.BadRequestError, match="reads no enable_thinking"):
        client.messages.create(thinking={"type": "enabled", "budget_tokens": 1024}, **params)
    for harmless in ("disabled", "adaptive"):
        assert client.messages.create(thinking={"type": harmless}, **params).role == "assistant"


def test_blocks_of_every_kind_in_their_order() -> None:
    call = ToolCall("call_1", "now", "{}")
    deltas = [
        AnswerDelta(reasoning="hm"), AnswerDelta(reasoning="m"), AnswerDelta("a"), AnswerDelta(""), AnswerDelta("b"),
        AnswerDelta(tool_calls=(call, ToolCall("call_2", "now", "no object"))),
    ]  # fmt: skip
    choice = ChoiceState(completion=Completion(0, "stop", 9))
    builder = MessageBuilder("tiny", 4)
    events = [event.model_dump() for delta in deltas for event in builder.delta_chunk(0, delta)]
    events += [event.model_dump() for event in builder.final_chunk(0, choice)]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert [e["index"] for e in events if e["type"] == "content_block_delta"] == [0, 0, 1, 1, 2, 3]
    for delta in deltas:
        choice.add_delta(delta)
    content = builder.full([choice], build_usage(4, 3, 9, 2)).model_dump()["content"]
    assert content == [
        {"type": "thinking", "thinking": "hmm", "signature": ""}, {"type": "text", "text": "ab"},
        {"type": "tool_use", "id": "call_1", "name": "now", "input": {}},
        {"type": "tool_use", "id": "call_2", "name": "now", "input": {"arguments": "no object"}},
    ]  # fmt: skip


def test_thoughts_of_earlier_answers_reach_the_template() -> None:
    said: list[Any] = [
        *ASK,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Well."}, {"type": "tool_use", "id": "1", "name": "now", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]},
    ]  # fmt: skip
    body = CreateMessageRequest.model_validate({"messages": said, "max_tokens": 1})
    messages = [m.for_template() for m in body.to_chat(thinks=False, can_switch_thoughts=False).messages]
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"a": 1}}}
    assert messages == [
        *ASK,
        {"role": "assistant", "content": "Well.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "tag 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [
            {"type": "image"}]}]}]}, "reads text only"),
        ({"messages": []}, "at least 1"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "name: the field is required"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "none of the tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "1024"),
        ({"output_config": {"effort": "high"}}, "reasoning_effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "Invalid type"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"mcp_servers": [{"url": "http://127.0.0.1:1"}]}, "mcp_servers is not supported here"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_refused(client: Anthropic, fields: dict[str, Any], words: str) -> None:
    given: Any = {"model": "tiny", "messages": ASK, "max_tokens": 5}
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**given, extra_body=fields)
    assert words in str(refused.value)
    facts: Any = refused.value.body
    assert (facts["type"], facts["error"]["type"]) == ("error", "invalid_request_error")


def test_keys_and_limits_are_those_of_chats(gem: GemModel) -> None:
    keys = {"ann": "key-of-ann", "bob": "key-of-bob"}
    params: Any = {"model": "tiny", "messages": ASK, "max_tokens": 1}
    with serving(gem, keys=keys, requests_per_minute=2) as served:
        with pytest.raises(anthropic.AuthenticationError, match="not known here") as refused:
            client_of(served, api_key="key-of-eve").messages.create(**params)
        facts: Any = refused.value.body
        assert (facts["type"], facts["error"]["type"]) == ("error", "authentication_error")
        ann = client_of(served, api_key="key-of-ann")
        ann.messages.create(**params)
        ann.messages.count_tokens(model="tiny", messages=ASK)
        with pytest.raises(anthropic.RateLimitError, match="more than 2 requests a minute"):
            ann.messages.create(**params)
        bob = client_of(served, api_key=None, auth_token="key-of-bob")
        assert bob.messages.create(**params).role == "assistant"
        with pytest.raises(anthropic.NotFoundError, match="'other' is not here"):
            bob.messages.create(**{**params, "model": "other"})


@pytest.mark.parametrize(("raised", "words"), FAILURES)
def test_a_stream_that_fails_midway_says_so(
    gem: GemModel, monkeypatch: pytest.MonkeyPatch, raised: Exception, words: str
) -> None:
    with serving(gem) as served:
        served.fail_midway(monkeypatch, raised)
        seen: list[str] = []
        with (
            pytest.raises(anthropic.APIStatusError, match=words) as told,
            client_of(served).messages.stream(model="tiny", max_tokens=9, messages=ASK) as stream,
        ):
            seen.extend(stream.text_stream)
        assert seen == ["so far"]
        assert "secret" not in str(told.value)


def test_a_client_that_leaves_frees_its_place(gem: GemModel) -> None:
    with serving(gem, engine={"max_num_seqs": 1}) as served:
        client = client_of(served)
        params: Any = {"model": "tiny", "max_tokens": 900, "messages": ASK, "extra_body": {"temperature": 1}}
        with client.messages.create(stream=True, **params) as stream:
            assert next(iter(stream)).type == "message_start"
        served.wait_until(lambda: served.engine.stats().num_running_seqs == 0)
        assert served.engine.stats().generation_tokens < 900
        assert client.messages.create(**{**params, "max_tokens": 1}).role == "assistant"
