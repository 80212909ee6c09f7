"""Answers to chats and completions: requested from the engine, then sent whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemify.engine.requests import Completion, EmbeddingOutput, PromptStart, TokenDelta
from gemify.engine.sampling import SamplingParams, TokenLogprob
from gemify.io.vectors import normalize
from gemify.serving.dispatch import ClientDisconnectedError, EngineClient, run_until_disconnect
from gemify.serving.errors import ApiError, bad_request, error_body, from_engine_error
from gemify.serving.protocol.requests import CreateChatCompletionRequest, CreateCompletionRequest
from gemify.serving.protocol.responses import (
    ApiModel,
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    ChoiceDelta,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    CreateChatCompletionResponse,
    CreateCompletionResponse,
    GemifyFields,
    PromptTokensDetails,
    TopLogprob,
)
from gemify.serving.state import AppState, add_log_fields, get_key_name, get_request_state, get_state

logger = logging.getLogger("gemify.serving")

GenerationBody = CreateChatCompletionRequest | CreateCompletionRequest
Kind = Literal["chat", "completion"]
_MIN_LOGPROB = -9999.0  # JSON has no -infinity
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


@dataclass
class ChoiceState:
    """One answer, as far as it has been generated."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    num_deltas: int = 0
    completion: Completion | None = None

    def add(self, event: TokenDelta | Completion) -> None:
        """Add what the engine has emitted."""
        if isinstance(event, Completion):
            self.completion = event
        else:
            self.texts.append(event.text)
            self.tokens += event.tokens
            self.num_deltas += 1

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    @property
    def completion_tokens(self) -> int:
        """Tokens so far; of an unfinished answer a lower bound."""
        return self.completion.completion_tokens if self.completion else self.num_deltas


class ResponseBuilder:
    """Builds the objects of one response.

    Args:
        kind: a chat's or a completion's.
        model: the name in the response.
        logprobs: whether the request asked for log probabilities.
        include_usage: whether chunks have a field ``usage``, which is null in all but the last.
    """

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

    def full(self, choices: Sequence[ChoiceState], usage: CompletionUsage, **fields: Any) -> ApiModel:
        """Build the whole response; ``fields`` are further fields of it."""
        fields |= {"usage": usage, **self._header}
        if self.kind == "chat":
            chat_choices = [
                ChatChoice(
                    index=index,
                    message=AssistantMessage(role="assistant", content=choice.text, refusal=None),
                    logprobs=self._chat_logprobs(choice.tokens),
                    finish_reason=_finish_reason(choice),
                )
                for index, choice in enumerate(choices)
            ]
            return CreateChatCompletionResponse(object="chat.completion", choices=chat_choices, **fields)
        completion_choices = [
            CompletionChoice(
                index=index,
                text=choice.text,
                logprobs=self._completion_logprobs(choice.tokens, 0),
                finish_reason=_finish_reason(choice),
            )
            for index, choice in enumerate(choices)
        ]
        return CreateCompletionResponse(object="text_completion", choices=completion_choices, **fields)

    def first_chunk(self, index: int, **fields: Any) -> ApiModel:
        """Build a chat's chunk that names the role of an answer."""
        delta = ChoiceDelta(role="assistant", content="", refusal=None)
        return self._chunk([ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)], fields)

    def delta_chunk(self, index: int, delta: TokenDelta, **fields: Any) -> ApiModel:
        """Build a chunk that adds to an answer."""
        if self.kind == "chat":
            logprobs = self._chat_logprobs(delta.tokens)
            added = ChoiceDelta(content=delta.text)
            return self._chunk(
                [ChatChunkChoice(index=index, delta=added, logprobs=logprobs, finish_reason=None)], fields
            )
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(token.text) for token in delta.tokens)
        logprobs_of_text = self._completion_logprobs(delta.tokens, offset)
        return self._chunk(
            [CompletionChoice(index=index, text=delta.text, logprobs=logprobs_of_text, finish_reason=None)], fields
        )

    def final_chunk(self, index: int, completion: Completion, **fields: Any) -> ApiModel:
        """Build a chunk that ends an answer."""
        reason = completion.reason
        if self.kind == "chat":
            delta = ChoiceDelta()
            return self._chunk([ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason)], fields)
        return self._chunk([CompletionChoice(index=index, text="", logprobs=None, finish_reason=reason)], fields)

    def usage_chunk(self, usage: CompletionUsage) -> ApiModel:
        """Build the last chunk, without answers."""
        return self._chunk([], {"usage": usage})

    def _chunk(self, choices: list[Any], fields: dict[str, Any]) -> ApiModel:
        if self.include_usage:
            fields = {"usage": None} | fields
        if self.kind == "chat":
            return ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._header, **fields)
        return CreateCompletionResponse(object="text_completion", choices=choices, **self._header, **fields)

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
            token_logprobs=[_to_finite(token.logprob) for token in tokens],
            top_logprobs=[{_unique_name(t): _to_finite(t.logprob) for t in token.top} for token in tokens],
            text_offset=offsets[:-1],
        )


def build_usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> CompletionUsage:
    """Build the usage of a request that generated text."""
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def _finish_reason(choice: ChoiceState) -> Literal["stop", "length"]:
    return choice.completion.reason if choice.completion else "length"


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


class EventStreamResponse(Response):
    """Server-sent events: chunks, then ``[DONE]``. However it ends, the engine's requests are cancelled then.

    Args:
        client: the engine's requests.
        chunks: what is sent.
        timeout_s: seconds that the response may take.
    """

    media_type = "text/event-stream"

    def __init__(self, client: EngineClient, chunks: AsyncGenerator[ApiModel, None], *, timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._client, self._chunks, self._timeout_s = client, chunks, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        with self._client:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await run_until_disconnect(receive, self._send_chunks(send), self._timeout_s)
            except ClientDisconnectedError:
                get_request_state(scope).log_fields["disconnected"] = True
            except Exception as error:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):  # do not wait for a client that reads nothing
                        await _send_event(send, _to_error_body(error, scope), last=True)
            finally:
                await self._chunks.aclose()

    async def _send_chunks(self, send: Send) -> None:
        async for chunk in self._chunks:
            await _send_event(send, chunk.to_json())
        await _send_event(send, b"[DONE]", last=True)


async def _send_event(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": not last})


def _to_error_body(error: Exception, scope: Scope) -> bytes:
    """Return the event of an error; the response's status has been sent already."""
    request = get_request_state(scope)
    with contextlib.suppress(Exception):
        error = from_engine_error(error)
    if not isinstance(error, ApiError):
        logger.error("stream failed", exc_info=error, extra={"fields": {"request": request.id}})
        return error_body(500, "the server failed at this request: see its log", code="internal_error")
    request.log_fields["error"] = error.code or error.status_code
    return error.body


@dataclass
class CompletionHandler:
    """Generates the answers to the prompts of one request, ``n`` to each, and responds."""

    request: Request
    body: GenerationBody
    kind: Kind
    prompts: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    top_logprobs: int | None
    return_embedding: bool = False
    start: PromptStart | None = None
    """The part of the prompt that has run, if there is one prompt."""
    charged_tokens: int = 0
    """Prompt tokens that were charged to the key when they ran."""
    gemify_fields: dict[str, Any] = field(default_factory=dict)
    """The response's field ``gemify``."""

    def __post_init__(self) -> None:
        options = self.body.stream_options
        self.state = get_state(self.request)
        self._builder = ResponseBuilder(
            self.kind,
            self.state.model,
            logprobs=self.top_logprobs is not None,
            include_usage=bool(options and options.include_usage),
        )
        self._n = self.body.n or 1
        self._choices = [ChoiceState() for _ in range(len(self.prompts) * self._n)]
        self._awaits_embedding = self.return_embedding
        self._held: list[tuple[int, TokenDelta | Completion | None]] = []
        """Events that no chunk has been built of; None: the start of an answer."""

    async def respond(self) -> Response:
        """Submit the prompts and return the response; ApiError if the engine refuses."""
        self._start = time.perf_counter()
        limiter, key = self.state.rate_limiter, get_key_name(self.request)
        num_tokens = sum(map(len, self.prompts)) - self.charged_tokens
        limiter.check_tokens(key, num_tokens)
        timeout_s = self.state.settings.timeout
        client = EngineClient()
        try:
            self._submit(client)
            limiter.add_tokens(key, num_tokens)
            if self.body.stream:
                return EventStreamResponse(client, self._stream(client), timeout_s=timeout_s)
        except BaseException:
            client.cancel()
            raise
        with client:
            try:
                await run_until_disconnect(self.request.receive, self._collect(client), timeout_s)
            finally:
                self._count_tokens(client)
        return self._builder.full(self._choices, self._usage(client), **self._take_gemify_fields()).to_response()

    def _submit(self, client: EngineClient) -> None:
        for ids in self.prompts:
            client.submit(
                partial(
                    self.state.engine.generate,
                    ids,
                    to_sampling_params(self.body, len(ids), self.state, self.top_logprobs),
                    n=self._n,
                    embed_prompt=self.return_embedding,
                    cache_salt=get_key_name(self.request),
                    start=self.start,
                )
            )

    async def _collect(self, client: EngineClient) -> None:
        async for number, event in client.events():
            self.on_event(number, event)

    def on_event(self, number: int, event: TokenDelta | Completion | EmbeddingOutput) -> None:
        """Keep what the engine has emitted for prompt ``number``, for the response and for the next `flush`."""
        if isinstance(event, EmbeddingOutput):
            self.gemify_fields["embedding"] = normalize(event.vectors_ND)[0].tolist()
            self._awaits_embedding = False
            return
        if not any(choice.num_deltas for choice in self._choices):
            self.state.metrics.time_to_first_token.observe(time.perf_counter() - self._start)
        index = number * self._n + event.index
        self._choices[index].add(event)
        self._held.append((index, event))

    async def _stream(self, client: EngineClient) -> AsyncGenerator[ApiModel, None]:
        """Yield chunks; none before the prompt's embedding, which the first one carries."""
        if self.kind == "chat":
            self._held = [(index, None) for index in range(len(self._choices))]
        try:
            for chunk in self.flush():
                yield chunk
            async for number, event in client.events():
                self.on_event(number, event)
                for chunk in self.flush():
                    yield chunk
            if self._builder.include_usage:
                yield self._builder.usage_chunk(self._usage(client))
        finally:
            self._count_tokens(client)

    def flush(self) -> list[ApiModel]:
        """Build the chunks that may be sent now. The first one of all carries the field ``gemify``."""
        if self._awaits_embedding:
            return []
        chunks: list[ApiModel] = []
        for index, event in self._held:
            fields = self._take_gemify_fields()
            if event is None:
                chunks.append(self._builder.first_chunk(index, **fields))
            elif isinstance(event, Completion):
                chunks.append(self._builder.final_chunk(index, event, **fields))
            else:
                chunks.append(self._builder.delta_chunk(index, event, **fields))
        self._held.clear()
        return chunks

    def _take_gemify_fields(self) -> dict[str, GemifyFields]:
        """Return the field ``gemify`` if there is anything in it, once."""
        if not self.gemify_fields:
            return {}
        fields, self.gemify_fields = GemifyFields(object="gemify", **self.gemify_fields), {}
        return {"gemify": fields}

    def _usage(self, client: EngineClient) -> CompletionUsage:
        return build_usage(client.prompt_tokens, client.cached_tokens, self._completion_tokens)

    @property
    def _completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    def _count_tokens(self, client: EngineClient) -> None:
        """Charge the answers' tokens to the key and log them, however the request ended."""
        self.state.rate_limiter.add_tokens(get_key_name(self.request), self._completion_tokens)
        add_log_fields(
            self.request,
            prompt_tokens=client.prompt_tokens,
            cached_tokens=client.cached_tokens,
            completion_tokens=self._completion_tokens,
        )


def to_sampling_params(
    body: GenerationBody, prompt_tokens: int, state: AppState, top_logprobs: int | None
) -> SamplingParams:
    """Return a request's sampling parameters, with this server's defaults."""
    max_tokens, default = body.max_tokens, _DEFAULT_COMPLETION_TOKENS
    if isinstance(body, CreateChatCompletionRequest):
        max_tokens, default = body.max_completion_tokens or max_tokens, state.settings.default_max_tokens
    if max_tokens is None:
        max_tokens = default
        if state.engine.max_model_len is not None:
            max_tokens = max(1, min(max_tokens, state.engine.max_model_len - prompt_tokens))
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stop,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.logit_bias,
            top_logprobs=top_logprobs,
        )
    except ValueError as error:
        raise bad_request(str(error)) from error
