"""OpenAI's client and /v1/responses: what it gets is what a chat gets, in the form of a response."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI
from test_answer_format import THINKS
from test_structured_outputs import PERSON, Pet
from test_tools import SCHEMAS, TEMPLATE, WEATHER

import tiny_models
from gemify import GemModel
from gemify.engine.requests import Completion
from gemify.model.answer_parser import AnswerDelta, ToolCall
from gemify.serving.protocol.create_response import CreateResponseRequest
from gemify.serving.response_builder import ChoiceState, build_usage
from gemify.serving.routes.responses import ResponseObjectBuilder
from running_server import FAILURES, Served, serving, tiny_gem
from tiny_gems import make_gem

ASK = "What is the weather in Rome?"
SAID: list[Any] = [{"role": "user", "content": ASK}]
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "the </s> weather", "parameters": WEATHER, "strict": True},
    {"type": "function", "name": "now"},
]
PARAMS: dict[str, Any] = {"model": "tiny", "temperature": 0, "input": ASK}


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory) -> GemModel:
    return tiny_gem(tmp_path_factory.mktemp("responses"), TEMPLATE)


@pytest.fixture(scope="module")
def served(gem: GemModel, one_thread: None) -> Iterator[Served]:
    with serving(gem) as running:
        yield running


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


def test_an_answer_is_that_of_a_chat(client: OpenAI) -> None:
    said: list[Any] = [{"role": "system", "content": "Be brief."}, *SAID]
    chat = client.chat.completions.create(model="tiny", messages=said, temperature=0, max_tokens=12)
    assert chat.usage is not None
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]
    for given in (ASK, parts, [{"type": "message", **SAID[0]}]):
        asked: Any = {**PARAMS, "input": given, "instructions": "Be brief.", "max_output_tokens": 12}
        got = client.responses.create(**asked, metadata={"a": "b"})
        assert got.output_text == chat.choices[0].message.content
        assert (got.status, got.store, got.metadata, got.instructions) == ("incomplete", False, {"a": "b"}, "Be brief.")
        assert got.incomplete_details is not None
        assert got.incomplete_details.reason == "max_output_tokens"
        assert got.usage is not None
        assert (got.usage.input_tokens, got.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert got.usage.input_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1
    assert got.usage.total_tokens == chat.usage.total_tokens
    within: Any = [{"role": "developer", "content": "Be brief."}, *SAID]
    again = client.responses.create(**{**PARAMS, "input": within, "max_output_tokens": 12})
    assert again.output_text == chat.choices[0].message.content


def test_a_stream_joins_to_the_answer(client: OpenAI, served: Served) -> None:
    whole = client.responses.create(max_output_tokens=12, **PARAMS)
    events = list(client.responses.create(max_output_tokens=12, stream=True, **PARAMS))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    assert last.response.usage.output_tokens == 12
    assert events[0].to_dict()["response"]["status"] == "in_progress"
    lines = served.post("/v1/responses", {**PARAMS, "max_output_tokens": 2, "stream": True}).text.split("\n\n")
    assert lines[0].startswith("event: response.created\ndata: {")
    assert lines[-2].startswith("event: response.incomplete\ndata: {")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=str)
def test_a_call_that_must_come(client: OpenAI, choice: Any) -> None:
    params: Any = {**PARAMS, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    whole = client.responses.create(max_output_tokens=600, **params)
    assert (whole.status, whole.tool_choice) == ("completed", whole.tool_choice)
    (call,) = whole.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    del params["model"]
    with client.responses.stream(model="tiny", max_output_tokens=600, **params) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        final = stream.get_final_response()
    (streamed,) = final.output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments, deltas) == (call.name, call.arguments, call.arguments)


def test_a_loop_of_calls(client: OpenAI, gem: GemModel) -> None:
    """What an agent does: a call, its output as an item, an answer in words."""
    items: list[Any] = list(SAID)
    named: Any = {"type": "function", "name": "weather"}
    first = client.responses.create(**{**PARAMS, "input": items}, tools=TOOLS, tool_choice=named, max_output_tokens=600)
    (call,) = first.output
    assert call.type == "function_call"
    items += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "sunny </s>"}]
    answer = client.responses.create(**{**PARAMS, "input": items}, tools=TOOLS, tool_choice="none", max_output_tokens=5)
    assert [item.type for item in answer.output] == ["message"]
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    shown = [
        *SAID,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "sunny </s>"},
    ]
    ids = gem.tokenizer.apply_chat_template(
        shown, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(ids)
    items += [item.to_dict() for item in answer.output]
    assert client.responses.create(**{**PARAMS, "input": [*items, *SAID]}, max_output_tokens=2).status == "incomplete"


def test_answers_follow_a_schema(client: OpenAI) -> None:
    parsed = client.responses.parse(text_format=Pet, max_output_tokens=400, **PARAMS)
    assert isinstance(parsed.output_parsed, Pet)
    form: Any = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    got = client.responses.create(text={"format": form}, max_output_tokens=800, **PARAMS)
    assert got.status == "completed"
    jsonschema.validate(json.loads(got.output_text), PERSON)
    assert got.text is not None
    assert got.text.format is not None
    assert got.text.format.to_dict() == form
    any_object = client.responses.create(text={"format": {"type": "json_object"}}, max_output_tokens=9, **PARAMS)
    assert any_object.output_text.startswith("{")


def test_thoughts_are_items_of_their_own(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> None:
    gem = make_gem(tiny_models.save(tmp_path_factory.mktemp("thinks") / "base"))
    gem.tokenizer.chat_template = THINKS.replace("if enable_thinking", "if reasoning_effort != 'none'")
    with serving(gem) as served:
        client = served.client()
        params: Any = {**PARAMS, "max_output_tokens": 12, "reasoning": {"effort": "high", "summary": "auto"}}
        whole: Any = client.responses.create(include=["reasoning.encrypted_content"], **params)
        assert [item.type for item in whole.output] == ["reasoning"]
        (thought,) = whole.output[0].content
        assert 0 < whole.usage.output_tokens_details.reasoning_tokens <= 12
        assert whole.output_text == ""
        events: Any = list(client.responses.create(stream=True, **params))
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == thought.text
        assert events[-1].response.output[0].content[0].text == thought.text
        quiet = client.responses.create(**{**params, "reasoning": {"effort": "none"}})
        assert [item.type for item in quiet.output] == ["message"]


def test_items_of_every_kind_in_their_order() -> None:
    call = ToolCall("call_1", "now", "{}")
    deltas = [
        AnswerDelta(reasoning="hm"), AnswerDelta(reasoning="m"), AnswerDelta("a"), AnswerDelta(""), AnswerDelta("b"),
        AnswerDelta(tool_calls=(call, call)),
    ]  # fmt: skip
    choice = ChoiceState(completion=Completion(0, "stop", 9))
    for delta in deltas:
        choice.add_delta(delta)
    body = CreateResponseRequest.model_validate({"input": "a"})
    streamed, whole = (ResponseObjectBuilder("tiny", body) for _ in range(2))
    events = [*streamed.first_chunk(0), *(event for delta in deltas for event in streamed.delta_chunk(0, delta))]
    events += [*streamed.final_chunk(0, choice), *streamed.usage_chunk(build_usage(4, 3, 9, 2))]
    facts = [event.model_dump() for event in events]
    full = whole.full([choice], build_usage(4, 3, 9, 2)).model_dump()
    kinds = [item["type"] for item in full["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert [f["item"]["type"] for f in facts if f["type"] == "response.output_item.added"] == kinds
    assert [f["output_index"] for f in facts if f["type"] == "response.output_item.done"] == [0, 1, 2, 3]
    last = facts[-1]["response"]
    assert facts[-1]["type"] == "response.completed"
    assert [without_id(item) for item in last["output"]] == [without_id(item) for item in full["output"]]
    assert last["usage"] == full["usage"]
    assert full["output"][0]["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert full["output"][1]["content"][0]["text"] == "ab"


def without_id(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "id"}


def test_items_become_messages() -> None:
    items: list[Any] = [
        *SAID,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
        {"type": "function_call", "call_id": "1", "name": "now", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "noon"}]},
        {"type": "function_call", "call_id": "3", "name": "now", "arguments": "{}"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "no"}]},
        {"role": "developer", "content": "Go on."},
    ]
    body = CreateResponseRequest.model_validate({"input": items, "instructions": "Be brief."})

    def call(number: str, arguments: Any) -> Any:
        return {"id": number, "type": "function", "function": {"name": "now", "arguments": arguments}}

    calls = [call("1", {"a": 1}), call("2", {})]
    assert [message.for_template() for message in body.to_chat().messages] == [
        {"role": "system", "content": "Be brief."},
        *SAID,
        {"role": "assistant", "content": "Well.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "assistant", "content": "", "tool_calls": [call("3", {})]},
        {"role": "system", "content": "Go on."},
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is stored: send the whole conversation"),
        ({"conversation": "conv_1"}, "nothing is stored"),
        ({"store": True}, "store is not supported here"),
        ({"background": True}, "background is not supported here"),
        ({"truncation": "auto"}, "truncation is not supported here"),
        ({"prompt": {"id": "pmpt_1"}}, "give instructions and input"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include.0"),
        ({"input": []}, "at least 1"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "tag 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "reads text only"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "not only thoughts"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "[]"}]}, "JSON of an object"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "none of the tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "json_schema: the field is required"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "Invalid type"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_refused(client: OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**PARAMS, max_output_tokens=5, extra_body=fields)
    assert words in str(refused.value)


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    harmless = {"store": False, "background": False, "truncation": "disabled", "prompt_cache_key": "a", "stream": False}
    got = served.post("/v1/responses", {"input": "a", "max_output_tokens": 1, "nonsense": 1, **harmless})
    assert got.status_code == 200
    assert got.headers["x-gemify-ignored"] == "nonsense"


@pytest.mark.parametrize(("raised", "words"), FAILURES)
def test_a_stream_that_fails_midway_says_so(
    gem: GemModel, monkeypatch: pytest.MonkeyPatch, raised: Exception, words: str
) -> None:
    with serving(gem) as served:
        served.fail_midway(monkeypatch, raised)
        events = iter(served.client().responses.create(stream=True, **PARAMS))
        seen: Any = [next(events) for _ in range(5)]
        assert seen[-1].delta == "so far"
        with pytest.raises(openai.APIError, match=words) as told:
            next(events)
        assert "secret" not in str(told.value)
        monkeypatch.undo()


def test_a_client_that_leaves_frees_its_place(gem: GemModel) -> None:
    with serving(gem, engine={"max_num_seqs": 1}) as served:
        client = served.client()
        with client.responses.create(model="tiny", input=ASK, max_output_tokens=900, stream=True) as stream:
            assert next(iter(stream)).type == "response.created"
        served.wait_until(lambda: served.engine.stats().num_running_seqs == 0)
        assert served.engine.stats().generation_tokens < 900
        assert client.responses.create(model="tiny", input=ASK, max_output_tokens=1).store is False
