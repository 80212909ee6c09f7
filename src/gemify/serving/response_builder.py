"""Builds the responses of chats and completions: whole ones, and the chunks of a stream."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from gemify.engine.requests import Completion, TokenDelta
from gemify.engine.sampling import TokenLogprob
from gemify.model.answer_parser import AnswerDelta, AnswerParser, ToolCall
from gemify.serving.protocol.responses import (
    ApiModel,
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    ChatToolCall,
    ChoiceDelta,
    CompletionChoice,
    CompletionLogprobs,
    CompletionTokensDetails,
    CompletionUsage,
    CreateChatCompletionResponse,
    CreateCompletionResponse,
    FinishReason,
    PromptTokensDetails,
    ToolCallDelta,
    TopLogprob,
)

Kind = Literal["chat", "completion"]
_MIN_LOGPROB = -9999.0  # JSON has no -infinity


@dataclass
class ChoiceState:
    """One answer, as far as it has been generated."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    num_deltas: int = 0
    completion: Completion | None = None
    thoughts: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    reasoning_tokens: int = 0
    """Tokens that had text of thoughts."""
    first_token_at: float | None = None
    """By `time.perf_counter`."""
    parser: AnswerParser | None = None
    """None: all of the answer is text."""

    def add(self, event: TokenDelta | Completion) -> list[AnswerDelta]:
        """Add what the engine has emitted. Return what it adds to the answer."""
        if isinstance(event, Completion):
            self.completion = event
            deltas = [] if self.parser is None else self.parser.finish()
        else:
            self.num_deltas += 1
            parsed = [AnswerDelta(event.text)] if self.parser is None else self.parser.feed(event.text)
            self.reasoning_tokens += any(delta.reasoning for delta in parsed)
            deltas = parsed or ([AnswerDelta()] if event.tokens else [])
            if event.tokens:
                deltas[0] = replace(deltas[0], tokens=event.tokens)
        for delta in deltas:
            self.add_delta(delta)
        return deltas

    def add_delta(self, delta: AnswerDelta) -> None:
        """Add a part of the answer."""
        self.texts.append(delta.text)
        self.thoughts.append(delta.reasoning)
        self.tool_calls += delta.tool_calls
        self.tokens += delta.tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended."""
        reason = self.completion.reason if self.completion is not None else "length"
        return "tool_calls" if self.tool_calls and reason == "stop" else reason

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    @property
    def completion_tokens(self) -> int:
        """Tokens so far; of an unfinished answer a lower bound."""
        return self.completion.completion_tokens if self.completion else self.num_deltas


class AnswerBuilder(Protocol):
    """Builds the response to one request, whole or as the chunks of a stream, in the form of one API."""

    include_usage: bool
    """Whether a stream ends with `usage_chunk`."""
    names_events: bool
    """Whether chunks are events with names."""

    def full(self, choices: Sequence[ChoiceState], usage: CompletionUsage, **fields: Any) -> ApiModel:
        """Build the whole response; ``fields`` are further fields of it."""
        ...

    def first_chunk(self, index: int, **fields: Any) -> Sequence[ApiModel]:
        """Build what starts an answer."""
        ...

    def delta_chunk(self, index: int, delta: AnswerDelta, **fields: Any) -> Sequence[ApiModel]:
        """Build what adds to an answer."""
        ...

    def final_chunk(self, index: int, choice: ChoiceState, **fields: Any) -> Sequence[ApiModel]:
        """Build what ends an answer."""
        ...

    def usage_chunk(self, usage: CompletionUsage) -> Sequence[ApiModel]:
        """Build the end of the stream."""
        ...


class ResponseBuilder:
    """Builds the objects of one response in OpenAI's form of chats and completions.

    Args:
        kind: a chat's or a completion's.
        model: the name in the response.
        logprobs: whether the request asked for log probabilities.
        include_usage: whether chunks have a field ``usage``, which is null in all but the last.
    """

    names_events = False

    def __init__(self, kind: Kind, model: str, *, logprobs: bool, include_usage: bool = False) -> None:
        self.kind, self.include_usage = kind, include_usage
        self._logprobs = logprobs
        self._header: dict[str, Any] = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._offsets: dict[int, int] = {}
        self._num_calls: dict[int, int] = {}

    def full(self, choices: Sequence[ChoiceState], usage: CompletionUsage, **fields: Any) -> ApiModel:
        """Build the whole response; ``fields`` are further fields of it."""
        fields |= {"usage": usage, **self._header}
        if self.kind == "chat":
            chat_choices = [
                ChatChoice(
                    index=index,
                    message=_message(choice),
                    logprobs=self._chat_logprobs(choice.tokens),
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ]
            return CreateChatCompletionResponse(object="chat.completion", choices=chat_choices, **fields)
        completion_choices = [
            CompletionChoice(
                index=index,
                text=choice.text,
                logprobs=self._completion_logprobs(choice.tokens, 0),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return CreateCompletionResponse(object="text_completion", choices=completion_choices, **fields)

    def first_chunk(self, index: int, **fields: Any) -> list[ApiModel]:
        """Build a chat's chunk that names the role of an answer."""
        delta = ChoiceDelta(role="assistant", content="", refusal=None)
        return self._chunk([ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)], fields)

    def delta_chunk(self, index: int, delta: AnswerDelta, **fields: Any) -> list[ApiModel]:
        """Build a chunk that adds to an answer."""
        if self.kind == "chat":
            logprobs = self._chat_logprobs(delta.tokens)
            added = self._chat_delta(index, delta)
            return self._chunk(
                [ChatChunkChoice(index=index, delta=added, logprobs=logprobs, finish_reason=None)], fields
            )
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(token.text) for token in delta.tokens)
        logprobs_of_text = self._completion_logprobs(delta.tokens, offset)
        return self._chunk(
            [CompletionChoice(index=index, text=delta.text, logprobs=logprobs_of_text, finish_reason=None)], fields
        )

    def final_chunk(self, index: int, choice: ChoiceState, **fields: Any) -> list[ApiModel]:
        """Build a chunk that ends an answer."""
        reason = choice.finish_reason
        if self.kind == "chat":
            delta = ChoiceDelta()
            return self._chunk([ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason)], fields)
        return self._chunk([CompletionChoice(index=index, text="", logprobs=None, finish_reason=reason)], fields)

    def usage_chunk(self, usage: CompletionUsage) -> list[ApiModel]:
        """Build the last chunk, without answers."""
        return self._chunk([], {"usage": usage})

    def _chunk(self, choices: list[Any], fields: dict[str, Any]) -> list[ApiModel]:
        if self.include_usage:
            fields = {"usage": None} | fields
        if self.kind == "chat":
            return [ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._header, **fields)]
        return [CreateCompletionResponse(object="text_completion", choices=choices, **self._header, **fields)]

    def _chat_delta(self, index: int, delta: AnswerDelta) -> ChoiceDelta:
        added: dict[str, Any] = {}
        if delta.reasoning:
            added["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            number = self._num_calls.get(index, 0)
            self._num_calls[index] = number + len(delta.tool_calls)
            added["tool_calls"] = [
                ToolCallDelta(index=at, **_call_fields(call)) for at, call in enumerate(delta.tool_calls, number)
            ]
        return ChoiceDelta(**added) if added and not delta.text else ChoiceDelta(content=delta.text, **added)

    def _chat_logprobs(self, tokens: Iterable[TokenLogprob]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content = [
            ChatTokenLogprob(
                **_logprob_fields(token), top_logprobs=[TopLogprob(**_logprob_fields(t)) for t in token.top]
            )
            for token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _completion_logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token.text))
        return CompletionLogprobs(
            tokens=[_unique_name(token) for token in tokens],
            token_logprobs=[None if math.isnan(token.logprob) else _to_finite(token.logprob) for token in tokens],
            top_logprobs=[
                None if math.isnan(token.logprob) else {_unique_name(t): _to_finite(t.logprob) for t in token.top}
                for token in tokens
            ],
            text_offset=offsets[:-1],
        )


def build_usage(
    prompt_tokens: int, cached_tokens: int, completion_tokens: int, reasoning_tokens: int | None = None
) -> CompletionUsage:
    """Build the usage of a request that generated text. ``reasoning_tokens`` None: nothing looked for thoughts."""
    details: dict[str, Any] = {}
    if reasoning_tokens is not None:
        details["completion_tokens_details"] = CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        **details,
    )


def _message(choice: ChoiceState) -> AssistantMessage:
    fields: dict[str, Any] = {"content": choice.text}
    if any(choice.thoughts):
        fields["reasoning_content"] = "".join(choice.thoughts)
    if choice.tool_calls:
        fields["content"] = choice.text or None
        fields["tool_calls"] = [ChatToolCall(**_call_fields(call)) for call in choice.tool_calls]
    return AssistantMessage(role="assistant", refusal=None, **fields)


def _call_fields(call: ToolCall) -> dict[str, Any]:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return {"id": call.id, "type": "function", "function": function}


def _logprob_fields(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _to_finite(token.logprob), "bytes": list(token.data)}


def _unique_name(token: TokenLogprob) -> str:
    """Return a token's text; its bytes if it is a part of a character; its id if it has no text."""
    if not token.data:
        return f"token_id:{token.id}"
    if "\N{REPLACEMENT CHARACTER}" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _to_finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _MIN_LOGPROB
