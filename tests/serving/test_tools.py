"""Tools through the OpenAI client: calls that must come follow their schemas, and results go on into the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from gemify import GemModel
from running_server import Served, serving, tiny_gem

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "the </s> weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": NOW}},
]
SCHEMAS = {"weather": WEATHER, "now": NOW}
# Tools as Qwen's and Hermes' templates have them.
TEMPLATE = (
    "{% if tools %}<s>tools:{% for tool in tools %} {{ tool.function | tojson }}{% endfor %}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory) -> GemModel:
    return tiny_gem(tmp_path_factory.mktemp("tools"), TEMPLATE)


@pytest.fixture(scope="module")
def served(gem: GemModel, one_thread: None) -> Iterator[Served]:
    with serving(gem) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    """A server whose chat template knows no tools."""
    with serving(tiny_gem(tmp_path_factory.mktemp("plain"))) as running:
        yield running


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


def dense(served: Served) -> dict[str, int]:
    return {str(served.gem.tokenizer(c, add_special_tokens=False)["input_ids"][-1]): -50 for c in " \n\t\r"}


def require_valid(calls: Any) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
@pytest.mark.parametrize("knows", [True, False])
def test_a_call_that_must_come(served: Served, plain: Served, choice: Any, knows: bool) -> None:
    of = served if knows else plain
    for options in ({"seed": 1, "n": 2},):
        params: Any = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
        params |= {"logit_bias": dense(of), "parallel_tool_calls": False, **options}
        whole = of.client().chat.completions.create(**params)
        for got in whole.choices:
            assert got.finish_reason == "tool_calls"
            assert got.message.content is None
            assert len(got.message.tool_calls or []) == 1
            require_valid(got.message.tool_calls)
            if choice != "required":
                assert got.message.tool_calls[0].function.name == "weather"
        streamed: dict[int, Any] = {}
        reasons: dict[int, str] = {}
        for chunk in of.client().chat.completions.create(stream=True, **params):
            for piece in chunk.choices:
                for call in piece.delta.tool_calls or []:
                    streamed[piece.index] = (call.index, call.function.name, call.function.arguments)
                reasons |= {piece.index: piece.finish_reason} if piece.finish_reason else {}
                assert not piece.delta.content
        assert streamed == {
            c.index: (0, c.message.tool_calls[0].function.name, c.message.tool_calls[0].function.arguments)
            for c in whole.choices
        }
        assert set(reasons.values()) == {"tool_calls"}


def test_several_calls_at_once(client: OpenAI, served: Served) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=ASK, tools=TOOLS, tool_choice="required", seed=1, max_tokens=260,
        logit_bias=dense(served) | {"2": -100},
    ).choices[0]  # fmt: skip
    assert len(got.message.tool_calls or []) > 1
    require_valid(got.message.tool_calls)


def test_a_loop_of_calls(client: OpenAI, gem: GemModel, served: Served) -> None:
    """What an agent does: a call, its result as a message, an answer in words."""
    messages = list(ASK)
    first = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=300,
        parallel_tool_calls=False, logit_bias=dense(served),
    ).choices[0].message  # fmt: skip
    assert first.tool_calls
    messages.append(first.model_dump(exclude_none=True))  # type: ignore[arg-type]
    messages.append({"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny </s>"})
    answer = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=5
    )
    assert answer.choices[0].message.tool_calls is None
    call = first.tool_calls[0].function
    shown = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        ]},
        {"role": "tool", "content": "sunny </s>"},
    ]  # fmt: skip
    ids = gem.tokenizer.apply_chat_template(
        shown, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


def test_auto_leaves_the_choice_to_the_model(client: OpenAI, gem: GemModel, served: Served) -> None:
    """Begun as a call, an answer ends as one that follows its schema; otherwise it is text."""
    begun = [*ASK, {"role": "assistant", "content": "Let me see."}]
    words = client.chat.completions.create(model="tiny", messages=begun, tools=TOOLS, temperature=0, max_tokens=8)
    assert words.choices[0].message.content
    assert words.choices[0].message.tool_calls is None
    open_tag = gem.tokenizer("<", add_special_tokens=False)["input_ids"][-1]
    for seed in range(3):
        got = client.chat.completions.create(
            model="tiny", messages=ASK, tools=TOOLS, seed=seed, max_tokens=120, logit_bias={str(open_tag): 3}
        ).choices[0]  # fmt: skip
        require_valid(got.message.tool_calls or [])


def test_a_template_that_knows_no_tools_refuses_auto(plain: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="reads no tools, so auto finds none"):
        plain.client().chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    spoken = plain.client().chat.completions.create(
        model="tiny", messages=ASK, tools=TOOLS, tool_choice="none", max_tokens=2
    )
    assert spoken.choices[0].message.content is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "none of the tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "only with tool_choice none"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
             "tool_choice": "required"}, "object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}],
             "tool_choice": "required"}, "Unimplemented",
        ),
        ({"messages": [{"role": "tool"}]}, "content: the field is required"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}], "tool_choice": "nothing"}, "tool_choice"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}]}]}, "JSON of an object",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_tool_is_refused(client: OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 5, **fields})
