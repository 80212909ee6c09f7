"""Chats are served from the library's own prompt, with the variables a request gives its template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from chat_templates import TEMPLATES, TOKENIZERS
from gemify import GemModel
from running_server import Served, indexed, serving
from tiny_gems import make_gem

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "who is?"},
]


def gem_of(directory: Path, template: str, kind: str) -> GemModel:
    base = tiny_models.save(directory / "base", vocab_size=1024)
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(base)
    return make_gem(base)


def library(gem: GemModel, messages: Any, **options: Any) -> tuple[int, str]:
    """The prompt's length and the greedy answer, by transformers alone."""
    options = {"add_generation_prompt": True, **options}
    prompt = gem.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **options)
    length = prompt["input_ids"].shape[1]
    out = gem.lm.generate(**prompt, max_new_tokens=8, do_sample=False, suppress_tokens=gem.special_ids, pad_token_id=0)
    return length, gem.tokenizer.decode(out[0, length:], skip_special_tokens=True)


def chat(served: Served, messages: Any, **options: Any) -> tuple[int, str]:
    asked = {"messages": messages, "max_tokens": 8, "temperature": 0, **options}
    answer = served.post("/v1/chat/completions", asked)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    return got["usage"]["prompt_tokens"], got["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("a BOS for every user turn", "legacy_prefix"),
        ("system before the last user turn", "first_prefix"),
        ("trims", "byte_level"),
        ("drops earlier thoughts", "byte_level"),
        ("a transcript without control tokens", "unigram"),
    ],
)
def test_answers_are_the_librarys(tmp_path: Path, template: str, kind: str) -> None:
    gem = gem_of(tmp_path, template, kind)
    with serving(gem) as served:
        for messages in (
            SAID[1:2],
            SAID[:2],
            SAID,
            [*SAID[:2], {"role": "assistant", "content": "a</think>b"}, SAID[3]],
        ):
            expected = library(gem, messages)
            assert chat(served, messages) == expected
            assert gem.chat(messages, max_new_tokens=8, do_sample=False) == expected[1]


def test_a_tokenizer_that_follows_no_schema_serves_the_rest(tmp_path: Path) -> None:
    """llguidance reads no such tokenizer: the server gets ready, and who asks for a schema is told so."""
    gem = gem_of(tmp_path, "a transcript without control tokens", "unigram")
    with serving(gem) as served:
        body = {"messages": SAID[1:2], "max_tokens": 4, "response_format": {"type": "json_object"}}
        refused = served.post("/v1/chat/completions", body)
        assert refused.status_code == 400
        assert "tokenizer cannot follow a grammar or a schema" in refused.json()["error"]["message"]
        assert chat(served, SAID[1:2]) == library(gem, SAID[1:2])


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    with serving(gem_of(tmp_path_factory.mktemp("model"), "drops earlier thoughts", "byte_level")) as running:
        yield running


def test_the_last_message_is_continued(thinking: Served) -> None:
    begun = [*SAID[:2], {"role": "assistant", "content": "The cat is"}]
    expected = library(thinking.gem, begun, continue_final_message=True, add_generation_prompt=False)
    assert chat(thinking, begun, continue_final_message=True, add_generation_prompt=False) == expected
    assert chat(thinking, begun, continue_final_message=True) == expected
    got = thinking.gem.chat(begun, continue_final_message=True, max_new_tokens=8, do_sample=False)
    assert got == expected[1]
    both = {"messages": begun, "continue_final_message": True, "add_generation_prompt": True}
    refused = thinking.post("/v1/chat/completions", both)
    assert refused.status_code == 400
    assert "needs add_generation_prompt false" in refused.text


def test_a_prompt_may_end_after_its_last_message(thinking: Served) -> None:
    expected = library(thinking.gem, SAID, add_generation_prompt=False)
    assert chat(thinking, SAID, add_generation_prompt=False) == expected


def test_variables_reach_the_template(thinking: Served) -> None:
    expected = library(thinking.gem, SAID, enable_thinking=False)
    assert chat(thinking, SAID, chat_template_kwargs={"enable_thinking": False}) == expected
    got = thinking.gem.chat(SAID, chat_template_kwargs={"enable_thinking": False}, max_new_tokens=8, do_sample=False)
    assert got == expected[1]
    for name in ("chat_template", "tokenize", "return_dict"):
        asked = {"messages": SAID, "chat_template_kwargs": {name: "x"}}
        refused = thinking.post("/v1/chat/completions", asked)
        assert refused.status_code == 400
        assert f"own variables, got '{name}'" in refused.text


def test_reasoning_effort_is_honoured_or_refused(thinking: Served, tmp_path: Path) -> None:
    refused = thinking.post("/v1/chat/completions", {"messages": SAID, "reasoning_effort": "high"})
    assert refused.status_code == 400
    assert "reasoning_effort" in refused.json()["error"]["message"]
    gem = gem_of(tmp_path, "channels", "byte_level")
    with serving(gem) as served:
        assert chat(served, SAID, reasoning_effort="high") == library(gem, SAID, reasoning_effort="high")


def test_answers_from_an_index_where_the_template_takes_no_system_message(tmp_path: Path) -> None:
    index = indexed(tmp_path, {"a.txt": "Owls hunt at night.\n"}, tokens=48)
    gem = index.model
    assert isinstance(gem, GemModel)
    gem.tokenizer.chat_template = TEMPLATES["refuses a system turn"].replace("{{ bos_token }}", "")
    with serving(gem, index=index) as served:
        for messages in ([SAID[1]], SAID):
            assert chat(served, messages, gemify={"search": {"k": 1, "mode": "fts"}})[0] > 20
        begun = {"messages": [SAID[1]], "continue_final_message": True, "gemify": {"search": {"k": 1}}}
        assert served.post("/v1/chat/completions", begun).status_code == 400
