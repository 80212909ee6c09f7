"""One request's answers: asked of the engine, then written whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gemify.engine.requests import Completion, EmbeddingOutput, PromptStart, TokenDelta
from gemify.engine.sampling import SamplingParams, TokenLogprob
from gemify.io.vectors import normalize
from gemify.serving.dispatch import ClientDisconnected, EngineClient, run_until_disconnect
from gemify.serving.errors import ApiError, bad_request, error_body, from_engine_error
from gemify.serving.protocol.requests import CreateChatCompletionRequest, CreateCompletionRequest
from gemify.serving.state import AppState, add_log_fields, get_key_name, get_state

# Answers as OpenAI writes them: whole or in chunks, of chats or of completions.

_LEAST = -9999.0  # JSON has no -infinity
Kind = Literal["chat", "completion"]


@dataclass
class ChoiceState:
    """One answer, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    pieces: int = 0
    finished: Completion | None = None

    def add(self, event: TokenDelta | Completion) -> None:
        if isinstance(event, Completion):
            self.finished = event
        else:
            self.texts.append(event.text)
            self.tokens += event.tokens
            self.pieces += 1

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def completion_tokens(self) -> int:
        """Tokens so far; of an unfinished answer, at least nearly."""
        return self.finished.completion_tokens if self.finished else self.pieces


class ResponseBuilder:
    """How one response's answers are written."""

    def __init__(self, kind: Kind, model: str, *, logprobs: bool) -> None:
        self.kind, self.model, self.logprobs = kind, model, logprobs
        self.id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}

    def full(self, choices: Sequence[ChoiceState], usage: dict[str, Any]) -> dict[str, Any]:
        """The response with everything in it."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._around(name, [self._choice(i, c) for i, c in enumerate(choices)]) | {"usage": usage}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """A chat chunk that says who speaks."""
        return self.chunk([self._part(index, {"role": "assistant", "content": "", "refusal": None})])

    def delta_chunk(self, index: int, delta: TokenDelta) -> dict[str, Any]:
        part = self._part(index, {"content": delta.text}) if self.kind == "chat" else self._part(index, delta.text)
        if self.logprobs:
            part["logprobs"] = self._logprobs(delta.tokens, self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + sum(len(t.text) for t in delta.tokens)
        return self.chunk([part])

    def final_chunk(self, index: int, finished: Completion) -> dict[str, Any]:
        return self.chunk([self._part(index, {} if self.kind == "chat" else "", reason=finished.reason)])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._around("chat.completion.chunk" if self.kind == "chat" else "text_completion", choices)

    def _around(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _part(self, index: int, said: dict[str, Any] | str, *, reason: str | None = None) -> dict[str, Any]:
        name = "delta" if self.kind == "chat" else "text"
        return {"index": index, name: said, "logprobs": None, "finish_reason": reason}

    def _choice(self, index: int, choice: ChoiceState) -> dict[str, Any]:
        said: dict[str, Any] = {"text": choice.text}
        if self.kind == "chat":
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        logprobs = self._logprobs(choice.tokens, 0) if self.logprobs else None
        reason = choice.finished.reason if choice.finished else "length"
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
        if self.kind == "chat":
            content = [_token(t) | {"top_logprobs": [_token(other) for other in t.top]} for t in tokens]
            return {"content": content, "refusal": None}
        listed = list(tokens)
        offsets = [offset]
        for token in listed:
            offsets.append(offsets[-1] + len(token.text))
        return {
            "tokens": [_name(t) for t in listed],
            "token_logprobs": [_finite(t.logprob) for t in listed],
            "top_logprobs": [{_name(other): _finite(other.logprob) for other in t.top} for t in listed],
            "text_offset": offsets[:-1],
        }


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _name(token: TokenLogprob) -> str:
    """A token's text; its bytes where it is a part of a character, its id where it is nothing: different ones differ."""
    if not token.data:
        return f"token_id:{token.id}"
    if "\N{REPLACEMENT CHARACTER}" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST


# Server-sent events: an answer in pieces, ended with ``[DONE]``, given up when the client goes away.

logger = logging.getLogger("gemify.serving")


class EventStreamResponse(Response):
    """Sends chunks as they are made; cancels their jobs at the end, whatever the end is."""

    media_type = "text/event-stream"

    def __init__(self, client: EngineClient, chunks: AsyncGenerator[dict[str, Any], None], *, timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._client, self._chunks, self._timeout = client, chunks, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._client:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await run_until_disconnect(receive, self._send(send), self._timeout)
            except ClientDisconnected:
                scope.setdefault("gemify.notes", {})["gone"] = True
            except Exception as error:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):  # a client that reads nothing is not waited for
                        await _say(send, _told(error, scope), last=True)
            finally:
                await self._chunks.aclose()

    async def _send(self, send: Send) -> None:
        async for chunk in self._chunks:
            await _say(send, json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode("utf-8"))
        await _say(send, b"[DONE]", last=True)


async def _say(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": not last})


def _told(error: Exception, scope: Scope) -> bytes:
    """An error as an event: the status has been sent already."""
    with contextlib.suppress(Exception):
        error = from_engine_error(error)
    if not isinstance(error, ApiError):
        logger.error("stream failed", exc_info=error, extra={"request": scope.get("gemify.id")})
        return error_body(500, "the server failed at this request: see its log", code="internal_error")
    scope.setdefault("gemify.notes", {})["error"] = error.code or error.status_code
    return error.body


GenerationBody = CreateChatCompletionRequest | CreateCompletionRequest


@dataclass
class CompletionHandler:
    """Answers to the prompts of one request, ``n`` to each."""

    request: Request
    body: GenerationBody
    builder: ResponseBuilder
    prompts: Sequence[Sequence[int]]
    top_logprobs: int | None
    return_embedding: bool = False
    start: PromptStart | None = None
    """What of the prompt, there is one then, has run."""
    charged_tokens: int = 0
    """Prompt tokens that were charged for when they ran."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the response says under ``gemify``."""

    @property
    def state(self) -> AppState:
        return get_state(self.request)

    async def respond(self) -> Response:
        """Ask, and give what is to be sent; the engine's refusals are ApiErrors."""
        self._began = time.perf_counter()
        limiter, key, tokens = (
            self.state.rate_limiter,
            get_key_name(self.request),
            sum(map(len, self.prompts)) - self.charged_tokens,
        )
        limiter.check_tokens(key, tokens)
        self._choices = [ChoiceState() for _ in range(len(self.prompts) * self._n)]
        timeout = self.state.settings.timeout
        client = EngineClient()
        try:
            self._ask(client)
            limiter.add_tokens(key, tokens)
            if self.body.stream:
                return EventStreamResponse(client, self._stream(client), timeout=timeout)
        except BaseException:
            client.__exit__()
            raise
        with client:
            try:
                await run_until_disconnect(self.request.receive, self._collect(client), timeout)
            finally:
                self._count(client)
        return JSONResponse(self.builder.full(self._choices, self._usage(client)) | self._gemify())

    @property
    def _n(self) -> int:
        return self.body.n or 1

    def _ask(self, client: EngineClient) -> None:
        engine = self.state.engine
        for ids in self.prompts:
            verb = partial(
                engine.generate,
                ids,
                to_sampling_params(self.body, len(ids), self.state, self.top_logprobs),
                n=self._n,
                embed_prompt=self.return_embedding,
                cache_salt=get_key_name(self.request),
                start=self.start,
            )
            client.submit(verb)

    async def _collect(self, client: EngineClient) -> None:
        async for number, event in client.events():
            self.on_event(number, event)

    def on_event(self, number: int, event: TokenDelta | Completion | EmbeddingOutput) -> int:
        """Keep what came; the choice it belongs to."""
        if isinstance(event, EmbeddingOutput):
            self.facts["embedding"] = normalize(event.vectors_ND)[0].tolist()
            return 0
        if not any(choice.pieces for choice in self._choices):
            self.state.metrics.first_token.observe(time.perf_counter() - self._began)
        index = number * self._n + event.index
        self._choices[index].add(event)
        return index

    async def _stream(self, client: EngineClient) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks. With an embedding to come, none before it: the first one carries it."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        held: list[dict[str, Any]] = []
        if self.builder.kind == "chat":
            held = [self.builder.first_chunk(i) for i in range(len(self._choices))]
        waiting = self.return_embedding
        try:
            for chunk in self.flush(held, waiting, extra):
                yield chunk
            async for number, event in client.events():
                index = self.on_event(number, event)
                if isinstance(event, EmbeddingOutput):
                    waiting = False
                elif isinstance(event, Completion):
                    held.append(self.builder.final_chunk(index, event))
                else:
                    held.append(self.builder.delta_chunk(index, event))
                for chunk in self.flush(held, waiting, extra):
                    yield chunk
            if with_usage:
                yield self.builder.chunk([]) | {"usage": self._usage(client)}
        finally:
            self._count(client)

    def flush(self, held: list[dict[str, Any]], waiting: bool, extra: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks that may go now, and `facts` with the first of them."""
        if waiting or not held:
            return []
        ready = [chunk | extra for chunk in held]
        ready[0] |= self._gemify()
        self.facts = {}
        held.clear()
        return ready

    def _gemify(self) -> dict[str, Any]:
        return {"gemify": {"object": "gemify", **self.facts}} if self.facts else {}

    def _usage(self, client: EngineClient) -> dict[str, Any]:
        return usage(client.prompt_tokens, client.cached_tokens, self._completion_tokens)

    @property
    def _completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    def _count(self, client: EngineClient) -> None:
        """To the key's account and the log, however it ended."""
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
    """The engine's words for a request's wishes."""
    longest = (body.max_completion_tokens if isinstance(body, CreateChatCompletionRequest) else None) or body.max_tokens
    if longest is None:
        longest = 16 if isinstance(body, CreateCompletionRequest) else state.settings.default_max_tokens
        if state.engine.max_model_len is not None:
            longest = max(1, min(longest, state.engine.max_model_len - prompt_tokens))
    try:
        return SamplingParams(
            max_tokens=longest,
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
