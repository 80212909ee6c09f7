"""The response models write OpenAI's fields, in its order: null where a field is null, absent where it is absent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemify.engine.requests import Completion, TokenDelta
from gemify.engine.sampling import TokenLogprob
from gemify.model.answer_parser import AnswerDelta
from gemify.serving.protocol.responses import ApiModel, GemifyFields
from gemify.serving.response_builder import ChoiceState, Kind, ResponseBuilder, build_usage

HEAD = {"chat": "chat.completion.chunk", "completion": "text_completion"}
TOP = TokenLogprob(6, "\N{REPLACEMENT CHARACTER}", b"\xff", -float("inf"))
TOKEN = TokenLogprob(5, "e\u0301", "e\u0301".encode(), -0.5, (TOP, TokenLogprob(7, "", b"", -2.0)))


def written(model: ApiModel) -> Any:
    """What a client reads, without the two fields that differ each time."""
    read = json.loads(model.to_json())
    assert list(read)[:5] == ["id", "object", "created", "model", "system_fingerprint"]
    return {name: value for name, value in read.items() if name not in ("id", "created")}


def chunk(kind: Kind, *choices: Any, **fields: Any) -> str:
    head = {"object": HEAD[kind], "model": "tiny", "system_fingerprint": None}
    return json.dumps(head | {"choices": list(choices)} | fields)


def test_chunks_of_a_chat() -> None:
    builder = ResponseBuilder("chat", "tiny", logprobs=False, include_usage=True)
    none = {"logprobs": None, "finish_reason": None}
    ended = ChoiceState(completion=Completion(1, "stop", 2))
    role = {"role": "assistant", "content": "", "refusal": None}
    gemify = GemifyFields(object="gemify", embedding=[1.0])
    assert json.dumps(written(*builder.first_chunk(0, gemify=gemify))) == chunk(
        "chat", {"index": 0, "delta": role, **none}, usage=None, gemify={"object": "gemify", "embedding": [1.0]}
    )
    assert json.dumps(written(*builder.delta_chunk(1, AnswerDelta("a")))) == chunk(
        "chat", {"index": 1, "delta": {"content": "a"}, **none}, usage=None
    )
    assert json.dumps(written(*builder.final_chunk(1, ended))) == chunk(
        "chat", {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "stop"}, usage=None
    )
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    usage |= {"prompt_tokens_details": {"cached_tokens": 2}}  # type: ignore[dict-item]
    assert json.dumps(written(*builder.usage_chunk(build_usage(4, 2, 3)))) == chunk("chat", usage=usage)
    assert "usage" not in written(*ResponseBuilder("chat", "tiny", logprobs=False).first_chunk(0))


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_log_probabilities(kind: Kind) -> None:
    builder = ResponseBuilder(kind, "tiny", logprobs=True)
    for offset in (0, 2):
        (choice,) = written(*builder.delta_chunk(0, AnswerDelta(TOKEN.text, tokens=(TOKEN,))))["choices"]
        top = [
            {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -9999.0, "bytes": [255]},
            {"token": "", "logprob": -2.0, "bytes": []},
        ]
        chat = {"token": TOKEN.text, "logprob": -0.5, "bytes": [101, 204, 129], "top_logprobs": top}
        completion = {
            "tokens": [TOKEN.text],
            "token_logprobs": [-0.5],
            "top_logprobs": [{"bytes:\\xff": -9999.0, "token_id:7": -2.0}],
            "text_offset": [offset],
        }
        expected = {"content": [chat], "refusal": None} if kind == "chat" else completion
        assert json.dumps(choice["logprobs"]) == json.dumps(expected)


def test_whole_answers() -> None:
    state = ChoiceState()
    for event in (TokenDelta(0, "a"), TokenDelta(0, "b"), Completion(0, "length", 2)):
        state.add(event)
    chat = written(ResponseBuilder("chat", "tiny", logprobs=False).full([state], build_usage(1, 0, 2)))
    message = {"role": "assistant", "content": "ab", "refusal": None}
    assert chat["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert "gemify" not in chat
    whole = written(ResponseBuilder("completion", "tiny", logprobs=False).full([state], build_usage(1, 0, 2)))
    assert whole["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}]
