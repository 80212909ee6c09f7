"""POST /v1/responses, as OpenAI has it, without anything stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.model.answer_parser import AnswerDelta
from gemify.serving.protocol.create_response import CreateResponseRequest
from gemify.serving.protocol.responses import ApiModel, CompletionUsage, ResponseObject, StreamEvent
from gemify.serving.request_body import JsonRoute
from gemify.serving.response_builder import ChoiceState
from gemify.serving.routes.chat import answer_chat
from gemify.serving.state import admit

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/responses",
    response_model=None,
    responses={200: {"model": ResponseObject, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_response(body: CreateResponseRequest, request: Request) -> Response:
    """Answer a conversation; with ``stream`` in server-sent events. Nothing is stored."""
    state = admit(request, body)
    return await answer_chat(body.to_chat(), request, make_builder=lambda _: ResponseObjectBuilder(state.model, body))


class ResponseObjectBuilder:
    """Builds a response, or the events of a streamed one (`AnswerBuilder`).

    Args:
        model: the name in the response.
        body: the request, of which the response repeats fields.
    """

    include_usage = names_events = True

    def __init__(self, model: str, body: CreateResponseRequest) -> None:
        given = body.model_dump(by_alias=True, exclude_none=True)
        self._facts: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "background": False,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **given.get("text", {})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
        }
        self._output: list[dict[str, Any]] = []
        self._num_events = 0
        self._is_open = False
        """Whether the last item may get more."""
        self._status = "completed"

    def full(self, choices: Sequence[ChoiceState], usage: CompletionUsage, **fields: Any) -> ApiModel:
        """Build the whole response."""
        (choice,) = choices
        self.delta_chunk(0, AnswerDelta(choice.text, "".join(choice.thoughts), tuple(choice.tool_calls)))
        self.final_chunk(0, choice)
        return ResponseObject(**self._response(self._status, usage))

    def first_chunk(self, index: int, **fields: Any) -> list[StreamEvent]:
        """Build the events that start the response."""
        return [
            self._event(f"response.{name}", response=self._response("in_progress", None))
            for name in ("created", "in_progress")
        ]

    def delta_chunk(self, index: int, delta: AnswerDelta, **fields: Any) -> list[StreamEvent]:
        """Build the events that add to the response."""
        events: list[StreamEvent] = []
        if delta.reasoning:
            events += self._add_text("reasoning", delta.reasoning)
        if delta.text:
            events += self._add_text("message", delta.text)
        for call in delta.tool_calls:
            facts = {"id": f"fc_{secrets.token_hex(12)}", "call_id": call.id, "name": call.name, "arguments": ""}
            events += self._begin({"type": "function_call", **facts})
            self._output[-1]["arguments"] = call.arguments
            events.append(self._item_event("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def final_chunk(self, index: int, choice: ChoiceState, **fields: Any) -> list[StreamEvent]:
        """Build the events that end the last item."""
        self._status = "incomplete" if choice.finish_reason == "length" else "completed"
        return self._end(self._status)

    def usage_chunk(self, usage: CompletionUsage) -> list[StreamEvent]:
        """Build the event that ends the response."""
        return [self._event(f"response.{self._status}", response=self._response(self._status, usage))]

    def _add_text(self, kind: str, text: str) -> list[StreamEvent]:
        """Add to the last item, or begin one, of which the text is the only part."""
        events: list[StreamEvent] = []
        if not self._is_open or self._output[-1]["type"] != kind:
            events += self._begin(_new_item(kind))
            part = _new_part(kind)
            events.append(self._item_event("response.content_part.added", content_index=0, part=dict(part)))
            self._output[-1]["content"].append(part)
        part = self._output[-1]["content"][0]
        part["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        events.append(self._item_event(f"response.{part['type']}.delta", content_index=0, delta=text, **logprobs))
        return events

    def _begin(self, item: dict[str, Any]) -> list[StreamEvent]:
        events = self._end("completed")
        self._output.append(item | {"status": "in_progress"})
        self._is_open = True
        return [*events, self._item_event("response.output_item.added", names_id=False, item=_copy(self._output[-1]))]

    def _end(self, status: str) -> list[StreamEvent]:
        """End the last item."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = item["arguments"]
            events = [self._item_event("response.function_call_arguments.done", arguments=arguments)]
        else:
            (part,) = item["content"]
            logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            done = {"content_index": 0, "text": part["text"], **logprobs}
            events = [
                self._item_event(f"response.{part['type']}.done", **done),
                self._item_event("response.content_part.done", content_index=0, part=part),
            ]
        return [*events, self._item_event("response.output_item.done", names_id=False, item=item)]

    def _item_event(self, name: str, *, names_id: bool = True, **fields: Any) -> StreamEvent:
        """Build an event of the last item."""
        item_id = {"item_id": self._output[-1]["id"]} if names_id else {}
        return self._event(name, output_index=len(self._output) - 1, **item_id, **fields)

    def _event(self, name: str, **fields: Any) -> StreamEvent:
        self._num_events += 1
        return StreamEvent.make(name, sequence_number=self._num_events - 1, **fields)

    def _response(self, status: str, usage: CompletionUsage | None) -> dict[str, Any]:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        ended = {"status": status, "incomplete_details": incomplete, "output": list(self._output)}
        return {**self._facts, **ended, "usage": None if usage is None else _usage(usage)}


def _new_item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": kind, "id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": []}
    return {"type": kind, "id": f"msg_{secrets.token_hex(12)}", "role": "assistant", "content": []}


def _new_part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in item.items()}


def _usage(usage: CompletionUsage) -> dict[str, Any]:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": prompt.cached_tokens if prompt else 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens or 0,
        "output_tokens_details": {"reasoning_tokens": completion.reasoning_tokens if completion else 0},
        "total_tokens": usage.total_tokens,
    }
