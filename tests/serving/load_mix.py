"""A load of every kind of request: the calls, how their answers are read, and what is wrong with an answer."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema
import numpy as np

from gemify import GemModel
from gemify.bench.serve import traffic
from running_server import Served

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["walk", "eat", "<|im_end|>"]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2}$"}]},
    {"type": "object", "properties": {"is": {"type": "object", "properties": {"good": {"type": "boolean"}}}}},
]
GUIDED: list[dict[str, Any]] = [
    {"guided_regex": "[a-c]{3}(x|y)"},
    {"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}},
    {"guided_choice": ["yes", "no", "I do not know"]},
    *({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}} for s in SCHEMAS),
]
TOOLS: dict[str, dict[str, Any]] = {
    "weather": SCHEMAS[0],
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
QUESTIONS = [f"Tell me of {subject}." for subject in ("a lighthouse", "rain", "the weather in Rome", "chess", "tea")]
"""Of all but plain chats: few, since each must be answered alone, too."""
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"
Names = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A request as it goes over the wire. ``kind``: plain, structured, tools, leaves (midway), embed or rerank."""

    kind: str
    path: str
    body: str

    @property
    def fields(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass
class Answer:
    """What came back, in whatever form. ``numbers``: of vectors, or of documents and their scores."""

    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finished: bool = False
    numbers: list[list[float]] = field(default_factory=list)


def mix(count: int, *, max_tokens: int, guided_tokens: int, options: Mapping[str, Any], seed: int = 0) -> list[Call]:
    """A fifth structured, a tenth tools, a tenth in other forms, some that leave; the others as in `traffic`.

    Args:
        count: how many.
        max_tokens: of a plain answer.
        guided_tokens: of one that follows a schema or calls a tool.
        options: fields of those.
        seed: of the draw.
    """
    draw = random.Random(seed)
    return [_draw_call(draw, plain, max_tokens, {"max_tokens": guided_tokens, **options})
            for plain in traffic(count, max_tokens=max_tokens, seed=seed)]  # fmt: skip


def _draw_call(draw: random.Random, plain: Any, max_tokens: int, guided: dict[str, Any]) -> Call:
    question = draw.choice(QUESTIONS)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
    how: dict[str, Any] = draw.choice([{"temperature": 0}, {"temperature": 1, "seed": draw.randrange(9)}])
    stream = {"stream": True} if draw.random() < 0.5 else {}
    part = draw.random()
    if part < 0.2:
        return _call("structured", CHAT, asked | draw.choice(GUIDED) | guided | how | stream)
    if part < 0.3:
        return _call_of_tools(draw, asked, guided | how | stream)
    if part < 0.35:
        path, limit = draw.choice([(MESSAGES, "max_tokens"), (RESPONSES, "max_output_tokens")])
        body = asked if path == MESSAGES else {"input": question}
        return _call("plain", path, body | {limit: max_tokens, "temperature": 0})
    if part < 0.4:
        by = draw.choice([{}, {"rerank": "lm"}])
        return _call("rerank", RERANK, {"query": question, "documents": ["a lighthouse", "rain", "tea", "ice"], **by})
    if part < 0.44:
        return _call("leaves", CHAT, asked | draw.choice([{}, *GUIDED]) | guided | {"stream": True})
    if plain.kind == "embed":
        return _call("embed", EMBEDDINGS, {"input": list(plain.texts)})
    asked = {"messages": [{"role": "user", "content": plain.texts[0]}]}
    return _call("plain", CHAT, asked | {"max_tokens": max_tokens, "temperature": 0} | stream)


def _call_of_tools(draw: random.Random, asked: dict[str, Any], options: dict[str, Any]) -> Call:
    path, name = draw.choice([CHAT, CHAT, CHAT, MESSAGES, RESPONSES]), draw.choice([None, *TOOLS])
    if path == CHAT:
        tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()]
        choice: Any = "required" if name is None else {"type": "function", "function": {"name": name}}
        body = asked | options | {"tool_choice": choice, "parallel_tool_calls": draw.random() < 0.5}
        return _call("tools", path, body | {"tools": tools})
    body = {"temperature": options["temperature"]}
    if path == MESSAGES:
        choice = {"type": "any"} if name is None else {"type": "tool", "name": name}
        body |= asked | {"max_tokens": options["max_tokens"], "tool_choice": choice}
        return _call("tools", path, body | {"tools": [{"name": n, "input_schema": s} for n, s in TOOLS.items()]})
    choice = "required" if name is None else {"type": "function", "name": name}
    body |= {"input": asked["messages"], "max_output_tokens": options["max_tokens"], "tool_choice": choice}
    return _call(
        "tools", path, body | {"tools": [{"type": "function", "name": n, "parameters": s} for n, s in TOOLS.items()]}
    )


def _call(kind: str, path: str, body: dict[str, Any]) -> Call:
    return Call(kind, path, json.dumps(body, sort_keys=True))


async def send(calls: Sequence[Call], url: str, *, clients: int) -> list[Answer | str]:
    """Send calls by ``clients`` at a time. Return all answers in the order of the calls; a text is an error."""
    answers: list[Answer | str] = ["lost"] * len(calls)
    numbers = iter(range(len(calls)))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            for at in numbers:
                try:
                    answers[at] = await _ask(http, calls[at])
                except Exception as error:
                    answers[at] = f"{type(error).__name__}: {error}"

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def _ask(http: httpx.AsyncClient, call: Call) -> Answer:
    content = {"content": call.body, "headers": {"content-type": "application/json"}}
    if not call.fields.get("stream"):
        response = await http.post(call.path, **content)  # type: ignore[arg-type]
        assert response.status_code == 200, response.text[:300]
        return read(call.path, response.json())
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    reason, ended = None, False
    async with http.stream("POST", call.path, **content) as response:  # type: ignore[arg-type]
        assert response.status_code == 200, (await response.aread())[:300]
        async for line in response.aiter_lines():
            ended = ended or line == "data: [DONE]"
            if ended or not line.startswith("data: "):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                message["content"] += choice["delta"].get("content") or ""
                message["tool_calls"] += choice["delta"].get("tool_calls") or []
                reason = choice["finish_reason"] or reason
            if call.kind == "leaves" and message["content"]:
                return Answer()
    assert ended, "the stream broke off"
    return read(CHAT, {"choices": [{"message": message, "finish_reason": reason}]})


def read(path: str, got: dict[str, Any]) -> Answer:
    """An answer in the form of a path."""
    if path == EMBEDDINGS:
        return Answer(numbers=[row["embedding"] for row in got["data"]])
    if path == RERANK:
        return Answer(numbers=[[row["index"], row["relevance_score"]] for row in got["results"]])
    if path == CHAT:
        message = got["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        finished = got["choices"][0]["finish_reason"] != "length"
        return Answer(message["content"] or "", [(c["name"], json.loads(c["arguments"])) for c in calls], finished)
    if path == MESSAGES:
        text = "".join(block["text"] for block in got["content"] if block["type"] == "text")
        uses = [(block["name"], block["input"]) for block in got["content"] if block["type"] == "tool_use"]
        return Answer(text, uses, got["stop_reason"] != "max_tokens")
    items = got["output"]
    text = "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"])
    made = [(item["name"], json.loads(item["arguments"])) for item in items if item["type"] == "function_call"]
    return Answer(text, made, got["status"] == "completed")


def wrong(gem: GemModel, alone: Served, calls: Sequence[Call], answers: Sequence[Answer | str]) -> Iterator[str]:
    """Yield what was lost, breaks its schema, or differs from the library's vectors or from the answer alone.

    Args:
        gem: the model.
        alone: a server of it without a prefix cache, which is asked one call at a time.
        calls: what was sent.
        answers: what came back.
    """
    first: dict[Call, Answer | str] = {}
    vectors: dict[str, np.ndarray] = {}
    for call, answer in zip(calls, answers, strict=True):
        fields = call.fields
        if isinstance(answer, str):
            yield f"{call}: {answer}"
        elif call.kind == "embed":
            expected = _vectors(gem, fields["input"], vectors)
            if not np.allclose(answer.numbers, expected, atol=1e-5):
                yield f"{call}: off by {np.abs(np.asarray(answer.numbers) - expected).max():.1e}"
        elif call.kind == "rerank":
            expected = _scores(gem, alone, call, vectors)
            given = [score for _, score in answer.numbers]
            if given != sorted(given, reverse=True) or not np.allclose(
                given, [expected[int(index)] for index, _ in answer.numbers], atol=1e-5
            ):
                yield f"{call}: {answer.numbers}, not {expected}"
        elif call.kind != "leaves":
            if problem := _breaks(call, fields, answer):
                yield f"{call}: {problem}: {answer}"
            if fields.get("temperature") == 0:
                whole = _call(call.kind, call.path, fields | {"stream": False})
                if whole not in first:
                    (first[whole],) = asyncio.run(send([whole], alone.url, clients=1))
                if answer != first[whole]:
                    yield f"{call}: {answer}, alone {first[whole]}"


def _scores(gem: GemModel, alone: Served, call: Call, vectors: dict[str, np.ndarray]) -> list[float]:
    """The documents' scores for the query: cosines of the library, or the odds that the other server gives."""
    fields = call.fields
    if "rerank" in fields:
        (got,) = asyncio.run(send([call], alone.url, clients=1))
        assert isinstance(got, Answer), got
        return [score for _, score in sorted(got.numbers)]
    query_D, *documents_D = _vectors(gem, [fields["query"], *fields["documents"]], vectors)
    return [float(query_D @ document_D) for document_D in documents_D]


def _vectors(gem: GemModel, texts: Sequence[str], known: dict[str, np.ndarray]) -> np.ndarray:
    if new := [text for text in dict.fromkeys(texts) if text not in known]:
        known |= dict(zip(new, gem.encode(new, normalize_embeddings=True), strict=True))
    return np.stack([known[text] for text in texts])


def _breaks(call: Call, fields: dict[str, Any], answer: Answer) -> str | None:
    """What of its request an answer does not follow; one that ran out of tokens may stop anywhere."""
    try:
        if call.kind == "tools" and answer.finished:
            choice = str(fields["tool_choice"])
            assert answer.calls, "no call"
            assert not answer.text, "text beside the calls"
            assert len(answer.calls) == 1 or fields.get("parallel_tool_calls", True), "several calls"
            for name, arguments in answer.calls:
                jsonschema.validate(arguments, TOOLS[name])
                assert not any(other in choice for other in TOOLS if other != name), "not the named tool"
        if call.kind == "structured" and answer.finished:
            outputs = fields.get("structured_outputs", {})
            if pattern := fields.get("guided_regex", outputs.get("regex")):
                assert re.fullmatch(pattern, answer.text), "not the pattern"
            elif "guided_choice" in fields:
                assert answer.text in fields["guided_choice"], "none of the choices"
            else:
                jsonschema.validate(json.loads(answer.text), fields["response_format"]["json_schema"]["schema"])
    except (AssertionError, ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None
