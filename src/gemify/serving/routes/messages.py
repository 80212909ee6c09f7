"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.model.answer_parser import AnswerDelta
from gemify.serving.protocol.messages import CountTokensRequest, CreateMessageRequest
from gemify.serving.protocol.requests import CreateChatCompletionRequest
from gemify.serving.protocol.responses import ApiModel, CompletionUsage, CountTokensResponse, MessageObject, StreamEvent
from gemify.serving.request_body import JsonRoute
from gemify.serving.response_builder import ChoiceState
from gemify.serving.routes.chat import answer_chat
from gemify.serving.state import AppState, admit

router = APIRouter(route_class=JsonRoute)
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post(
    "/v1/messages",
    response_model=None,
    responses={200: {"model": MessageObject, "content": {"text/event-stream": {}}}},
    tags=["Anthropic"],
)
async def create_message(body: CreateMessageRequest, request: Request) -> Response:
    """Answer a conversation; with ``stream`` in server-sent events."""
    state = admit(request, body)
    shows_thoughts = body.thinking is None or body.thinking.display != "omitted"
    return await answer_chat(
        _to_chat(state, body),
        request,
        make_builder=lambda tokens: MessageBuilder(state.model, tokens, shows_thoughts=shows_thoughts),
    )


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses={200: {"model": CountTokensResponse}},
    tags=["Anthropic"],
)
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """Count the tokens of a conversation's prompt."""
    state = admit(request, body)
    ids = await state.tokenizer.tokenize_chat(_to_chat(state, body))
    return CountTokensResponse(input_tokens=len(ids)).to_response()


def _to_chat(state: AppState, body: CountTokensRequest) -> CreateChatCompletionRequest:
    form = state.tokenizer.answer_format if state.tokenizer.has_chat else None
    return body.to_chat(
        thinks=form is not None and form.thinks, can_switch_thoughts=form is not None and form.can_switch_thoughts
    )


class MessageBuilder:
    """Builds an answer, or the events of a streamed one (`AnswerBuilder`).

    Args:
        model: the name in the response.
        prompt_tokens: tokens of the prompt.
        shows_thoughts: whether thoughts are among the blocks.
    """

    include_usage = names_events = True

    def __init__(self, model: str, prompt_tokens: int, *, shows_thoughts: bool = True) -> None:
        self._header: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._prompt_tokens, self._shows_thoughts = prompt_tokens, shows_thoughts
        self._kind: str | None = None
        self._num_blocks = 0
        self._ended: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def full(self, choices: Sequence[ChoiceState], usage: CompletionUsage, **fields: Any) -> ApiModel:
        """Build the whole answer."""
        (choice,) = choices
        content: list[dict[str, Any]] = []
        if self._shows_thoughts and (thoughts := "".join(choice.thoughts)):
            content.append({**_THINKING, "thinking": thoughts})
        if choice.text:
            content.append({**_TEXT, "text": choice.text})
        for call in choice.tool_calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
        return MessageObject(**self._header, content=content, **_end_of(choice), usage=_usage(usage))

    def first_chunk(self, index: int, **fields: Any) -> list[StreamEvent]:
        """Build the events that start the answer."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        message = {**self._header, "content": [], **self._ended, "usage": usage}
        return [StreamEvent.make("message_start", message=message), StreamEvent.make("ping")]

    def delta_chunk(self, index: int, delta: AnswerDelta, **fields: Any) -> list[StreamEvent]:
        """Build the events that add to the answer."""
        events: list[StreamEvent] = []
        if delta.reasoning and self._shows_thoughts:
            events += self._begin("thinking", _THINKING)
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            events += self._begin("text", _TEXT)
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        for call in delta.tool_calls:
            events += self._begin(call.id, {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            json_text = json.dumps(_input(call.arguments), ensure_ascii=False)
            events.append(self._delta({"type": "input_json_delta", "partial_json": json_text}))
        return events

    def final_chunk(self, index: int, choice: ChoiceState, **fields: Any) -> list[StreamEvent]:
        """Build the event that ends the last block."""
        self._ended = _end_of(choice)
        return self._end()

    def usage_chunk(self, usage: CompletionUsage) -> list[StreamEvent]:
        """Build the events that end the answer."""
        ended = StreamEvent.make("message_delta", delta=self._ended, usage=_usage(usage))
        return [ended, StreamEvent.make("message_stop")]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[StreamEvent]:
        """Begin a block, unless one of its kind has begun."""
        if self._kind == kind:
            return []
        events = self._end()
        self._kind = kind
        return [*events, StreamEvent.make("content_block_start", index=self._num_blocks, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> StreamEvent:
        return StreamEvent.make("content_block_delta", index=self._num_blocks, delta=delta)

    def _end(self) -> list[StreamEvent]:
        if self._kind is None:
            return []
        self._kind = None
        self._num_blocks += 1
        return [StreamEvent.make("content_block_stop", index=self._num_blocks - 1)]


_TEXT = {"type": "text", "text": ""}
_THINKING = {"type": "thinking", "thinking": "", "signature": ""}


def _end_of(choice: ChoiceState) -> dict[str, Any]:
    reason = choice.finish_reason
    stop = choice.completion.stop if choice.completion is not None and reason == "stop" else None
    return {"stop_reason": _STOP_REASONS[reason] if stop is None else "stop_sequence", "stop_sequence": stop}


def _input(arguments: str) -> dict[str, Any]:
    """Return a call's arguments as an object, which a model that is not held to a schema may not have written."""
    try:
        read = json.loads(arguments)
    except ValueError:
        read = arguments
    return read if isinstance(read, dict) else {"arguments": read}


def _usage(usage: CompletionUsage) -> dict[str, Any]:
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else 0
    fields: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens or 0,
    }
    if (details := usage.completion_tokens_details) is not None:
        fields["output_tokens_details"] = {"thinking_tokens": details.reasoning_tokens}
    return fields
