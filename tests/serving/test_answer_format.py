"""Thoughts, text and calls are told apart, piece by piece, in the forms that chat templates have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from test_structured_outputs import PERSON
from test_tools import TEMPLATE

import tiny_models
from gemify import GemModel
from gemify.engine.grammar import GrammarCompiler
from gemify.model.answer_parser import AnswerParser
from gemify.model.chat_template import ChatTemplate
from gemify.serving.answer_format import AnswerFormat, ToolFormat
from gemify.serving.protocol.structured_outputs import after_thoughts, json_grammar
from running_server import serving
from tiny_gems import make_gem

CALL = '<tool_call>\n{"name": "now", "arguments": {"a": [1, "}"]}}\n</tool_call>'
MISTRAL = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.tool_calls %}[TOOL_CALLS]"
    '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% endif %}</s>{% endfor %}{{ tools }}"
)
PYTHONIC = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}(){% endfor %}</s>{% endfor %}{{ tools }}"  # noqa: E501
THINKS = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory) -> GemModel:
    return make_gem(tiny_models.save(tmp_path_factory.mktemp("parser") / "base"))


def form(gem: GemModel, template: str) -> AnswerFormat:
    gem.tokenizer.chat_template = template
    return AnswerFormat(gem.lm, gem.tokenizer, ChatTemplate(gem.tokenizer))


def parts(parser: AnswerParser | None, text: str, size: int) -> tuple[str, str, list[Any]]:
    assert parser is not None
    deltas = [d for at in range(0, len(text), size) for d in parser.feed(text[at : at + size])] + parser.finish()
    calls = [(call.name, json.loads(call.arguments)) for delta in deltas for call in delta.tool_calls]
    return "".join(d.reasoning for d in deltas), "".join(d.text for d in deltas), calls


def test_the_form_of_a_call_is_read_off_the_template(gem: GemModel) -> None:
    assert form(gem, TEMPLATE).tools == ToolFormat()
    mistral = form(gem, MISTRAL)
    assert mistral.tools == ToolFormat('[TOOL_CALLS]{"name": "', '", "arguments": ', "}")
    parser = mistral.parser("", has_tools=True, must_call=False)
    assert parts(parser, 'Well. [TOOL_CALLS]{"name": "now", "arguments": {}}', 3) == ("", "Well.", [("now", {})])
    assert form(gem, PYTHONIC).tools == ToolFormat()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_text_thoughts_and_calls(gem: GemModel, size: int) -> None:
    thinking = form(gem, TEMPLATE + "{# <think> #}")
    text = f"<think>\nhm < 3\n</think>\n\nLet me see. {CALL}\n{CALL}"
    reasoning, said, calls = parts(thinking.parser("", has_tools=True, must_call=False), text, size)
    assert (reasoning.strip(), said.strip()) == ("hm < 3", "Let me see.")
    assert calls == [("now", {"a": [1, "}"]})] * 2
    begun = thinking.parser("assistant: <think>\n", has_tools=False, must_call=False)
    assert parts(begun, "so</think>Yes <tool_call>", size) == ("so", "Yes <tool_call>", [])
    ended = thinking.parser("assistant: <think>\n\n</think>\n\n", has_tools=False, must_call=False)
    assert parts(ended, "Yes.", size) == ("", "Yes.", [])


@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_no_call_is_text(gem: GemModel, size: int) -> None:
    plain = form(gem, TEMPLATE)
    for text in ('<tool_call>\n{"name": "now", "argum', "<tool_call>nonsense</tool_call> and more", "a < b <tool_ca"):
        reasoning, said, calls = parts(plain.parser("", has_tools=True, must_call=False), text, size)
        assert (reasoning, calls) == ("", [])
        assert text.replace("<tool_call>", "").replace("</tool_call>", "").strip()[:6] in said


def test_nothing_is_parsed_where_there_is_nothing(gem: GemModel) -> None:
    assert form(gem, TEMPLATE).parser("", has_tools=False, must_call=False) is None


def test_a_tokenizers_own_response_template_is_used(gem: GemModel) -> None:
    own = {"defaults": {"role": "assistant"}, "start_anchor": "assistant: ", "fields": {
        "reasoning_content": {"open": "[[", "close": "]]", "content": "text"}, "content": {"content": "text"},
    }}  # fmt: skip
    gem.tokenizer.response_template = own
    try:
        parser = form(gem, TEMPLATE).parser("x assistant: [[", has_tools=False, must_call=False)
    finally:
        del gem.tokenizer.response_template
    assert parts(parser, "hm]]Yes", 1) == ("hm", "Yes", [])


def test_an_answer_follows_its_schema_after_the_thoughts(tmp_path: Path) -> None:
    base = tiny_models.save(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # whose control token ends thoughts
        (base / name).write_text((base / name).read_text().replace("<|reserved_2|>", "</think>"))
    gem = make_gem(base)
    gem.tokenizer.chat_template = THINKS
    bias = {str(gem.tokenizer.convert_tokens_to_ids("</think>")): 3}
    bias |= {str(gem.tokenizer(c, add_special_tokens=False)["input_ids"][-1]): -100 for c in " \n\t\r"}
    params: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 400, "seed": 1}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    with serving(gem) as served:
        for form in ({"response_format": schema}, {"guided_regex": "[a-c]{3}"}, {"guided_choice": ["left"]}):
            fields = {"chat_template_kwargs": {"enable_thinking": True}, **form}
            got = served.client().chat.completions.create(**params, logit_bias=bias, n=3, extra_body=fields)
            answers = [choice.message for choice in got.choices]
            assert any(getattr(answer, "reasoning_content", None) for answer in answers)
            for answer in answers:
                if "response_format" in form:
                    jsonschema.validate(json.loads(answer.content or ""), PERSON)
                else:
                    assert re.fullmatch("[a-c]{3}|left", answer.content or "")


@pytest.mark.parametrize("control_tokens", [{}, {"</think>": 7}], ids=["text", "token"])
def test_thoughts_that_have_begun_end_before_the_answer(gem: GemModel, control_tokens: dict[str, int]) -> None:
    vocab = int(gem.lm.get_input_embeddings().weight.shape[0])
    compiler = GrammarCompiler(gem.tokenizer, vocab_size=vocab, eos_ids=[2])
    matcher = compiler.compile(after_thoughts(json_grammar(PERSON), control_tokens)).start()

    def allows(text: str) -> bool:
        """Whether a text may follow; what may, does."""
        for token in gem.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if matcher.mask(torch.zeros(vocab))[token] == -torch.inf:
                return False
            matcher.accept(token)
        return True

    assert allows('hm {"so')
    if control_tokens:
        matcher.accept(7)
    else:
        assert allows("</think>")
    assert allows('\n\n{"name": "a')
    assert not allows("way too long")


def test_thoughts_are_apart_in_chats(gem: GemModel) -> None:
    gem.tokenizer.chat_template = THINKS
    with serving(gem) as served:
        client: Any = served.client()
        params: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 30}
        params |= {"temperature": 0, "extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
        whole: Any = client.chat.completions.create(**params).choices[0].message
        plain = client.chat.completions.create(**params | {"extra_body": {}}).choices[0].message
        with_thoughts, without = (
            client.chat.completions.create(
                model="tiny", max_tokens=1, extra_body={"gemify": {"return_embedding": True}}, messages=[
                    {"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes.", **thoughts},
                    {"role": "user", "content": "b"},
                ],
            )
            for thoughts in ({"reasoning_content": "hm"}, {})
        )  # fmt: skip
        thought = "".join(
            getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            for chunk in client.chat.completions.create(stream=True, **params)
        )
        usage = client.chat.completions.create(**params).usage
    vectors = [answer.gemify["embedding"] for answer in (with_thoughts, without)]
    np.testing.assert_allclose(*vectors, atol=1e-5, err_msg="this template reads no thoughts of earlier answers")
    assert usage.completion_tokens_details.reasoning_tokens in range(1, 31)
    assert whole.reasoning_content
    assert thought == whole.reasoning_content
    assert whole.content == ""
    assert plain.content
    assert not hasattr(plain, "reasoning_content")
