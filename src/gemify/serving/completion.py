"""Answers to chats and completions: requested from the engine, then sent whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from gemify.engine.grammar import Grammar
from gemify.engine.requests import Completion, EmbeddingOutput, PromptLogprobs, PromptStart, TokenDelta
from gemify.engine.sampling import SamplingParams, TokenLogprob
from gemify.io.vectors import normalize
from gemify.model.answer_parser import AnswerDelta, AnswerParser
from gemify.serving.dispatch import EngineClient, run_until_disconnect
from gemify.serving.errors import bad_request
from gemify.serving.event_stream import EventStreamResponse
from gemify.serving.protocol.requests import CreateChatCompletionRequest, CreateCompletionRequest
from gemify.serving.protocol.responses import (
    ApiModel,
    CompletionUsage,
    GemifyFields,
)
from gemify.serving.response_builder import AnswerBuilder, ChoiceState, Kind, ResponseBuilder, build_usage
from gemify.serving.state import AppState, add_log_fields, get_key_name, get_state

T = TypeVar("T")
logger = logging.getLogger("gemify.serving")

GenerationBody = CreateChatCompletionRequest | CreateCompletionRequest
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


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
    grammar: str | None = None
    """What the answers follow, as llguidance writes it."""
    parser: Callable[[], AnswerParser | None] | None = None
    """Makes a parser for each answer."""
    builder: AnswerBuilder | None = None
    """Builds the response. None: in OpenAI's form of chats and completions."""
    echoed: Sequence[str] | None = None
    """Text of each prompt, to be put before its answers."""

    def __post_init__(self) -> None:
        options = self.body.stream_options
        self.state = get_state(self.request)
        self._builder: AnswerBuilder = self.builder or ResponseBuilder(
            self.kind,
            self.state.model,
            logprobs=self.top_logprobs is not None,
            include_usage=bool(options and options.include_usage),
        )
        self._n = self.body.n or 1
        self._choices = [ChoiceState() for _ in range(len(self.prompts) * self._n)]
        self._awaits_embedding = self.return_embedding
        if self.parser is not None:
            for choice in self._choices:
                choice.parser = self.parser()
        self._held: list[tuple[int, AnswerDelta | Completion | None]] = []
        """Events that no chunk has been built of; None: the start of an answer."""
        self._has_begun = False
        if self.echoed is not None and self.top_logprobs is None:
            for number in range(len(self.prompts)):
                self._echo(number, ())

    async def respond(self) -> Response:
        """Submit the prompts and return the response; ApiError if the engine refuses."""
        self._start = time.perf_counter()
        limiter, key = self.state.rate_limiter, get_key_name(self.request)
        num_tokens = sum(map(len, self.prompts)) - self.charged_tokens
        limiter.check_tokens(key, num_tokens)
        compiled = await self._compile()
        timeout_s = self.state.settings.timeout
        client = EngineClient()
        try:
            self._submit(client, compiled)
            limiter.add_tokens(key, num_tokens)
            if self.body.stream:
                names = self._builder.names_events
                keep_alive_s = self.state.settings.sse_keep_alive_seconds
                return EventStreamResponse(
                    client,
                    self._stream(client),
                    timeout_s=timeout_s,
                    keep_alive_s=keep_alive_s,
                    names_events=names,
                )
        except BaseException:
            client.cancel()
            raise
        with client:
            try:
                await run_until_disconnect(self.request.receive, self._collect(client), timeout_s)
            finally:
                self._count_tokens(client)
        return self._builder.full(self._choices, self._usage(client), **self._take_gemify_fields()).to_response()

    async def _compile(self) -> Grammar | None:
        if self.grammar is None:
            return None
        try:
            waiting = _result(self.state.grammars.submit(self.grammar))
            return await run_until_disconnect(self.request.receive, waiting, self.state.settings.timeout)
        except ValueError as error:
            raise bad_request(str(error)) from error

    def _submit(self, client: EngineClient, grammar: Grammar | None) -> None:
        parsed = any(choice.parser is not None for choice in self._choices)
        for ids in self.prompts:
            params = self._sampling_params(len(ids))
            if parsed:
                params = replace(params, skip_special_tokens=False)
            client.submit(
                partial(
                    self.state.engine.generate,
                    ids,
                    replace(params, grammar=grammar),
                    n=self._n,
                    embed_prompt=self.return_embedding,
                    cache_salt=get_key_name(self.request),
                    start=self.start,
                )
            )

    async def _collect(self, client: EngineClient) -> None:
        async for number, event in client.events():
            self.on_event(number, event)

    def _sampling_params(self, prompt_tokens: int) -> SamplingParams:
        echoed = self.top_logprobs if self.echoed is not None else None
        return to_sampling_params(self.body, prompt_tokens, self.state, self.top_logprobs, prompt_logprobs=echoed)

    def _echo(self, number: int, tokens: tuple[TokenLogprob, ...]) -> None:
        """Put prompt ``number`` before its answers."""
        assert self.echoed is not None
        for index in range(number * self._n, (number + 1) * self._n):
            delta = AnswerDelta(self.echoed[number], tokens=tokens)
            self._choices[index].add_delta(delta)
            self._held.append((index, delta))

    def on_event(self, number: int, event: TokenDelta | Completion | EmbeddingOutput | PromptLogprobs) -> None:
        """Keep what the engine has emitted for prompt ``number``, for the response and for the next `flush`."""
        if isinstance(event, PromptLogprobs):
            self._echo(number, event.tokens)
            return
        if isinstance(event, EmbeddingOutput):
            self.gemify_fields["embedding"] = normalize(event.vectors_ND)[0].tolist()
            self._awaits_embedding = False
            return
        index = number * self._n + event.index
        self._measure(self._choices[index], event)
        if self.body.max_tokens == 0:  # the engine generates at least one token
            if isinstance(event, TokenDelta):
                return
            event = Completion(event.index, "length", 0)
        self._held += [(index, delta) for delta in self._choices[index].add(event)]
        if isinstance(event, Completion):
            self._held.append((index, event))

    def _measure(self, choice: ChoiceState, event: TokenDelta | Completion) -> None:
        """Observe how long the first token of all answers took, and the further ones of each answer."""
        now, metrics = time.perf_counter(), self.state.metrics
        if not self._has_begun:
            self._has_begun = True
            metrics.time_to_first_token.observe(now - self._start)
        if choice.first_token_at is None:
            choice.first_token_at = now
        if isinstance(event, Completion) and event.completion_tokens > 1:
            metrics.time_per_output_token.observe((now - choice.first_token_at) / (event.completion_tokens - 1))

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
                for chunk in self._builder.usage_chunk(self._usage(client)):
                    yield chunk
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
                chunks += self._builder.first_chunk(index, **fields)
            elif isinstance(event, Completion):
                chunks += self._builder.final_chunk(index, self._choices[index], **fields)
            else:
                chunks += self._builder.delta_chunk(index, event, **fields)
        self._held.clear()
        return chunks

    def _take_gemify_fields(self) -> dict[str, GemifyFields]:
        """Return the field ``gemify`` if there is anything in it, once."""
        if not self.gemify_fields:
            return {}
        fields, self.gemify_fields = GemifyFields(object="gemify", **self.gemify_fields), {}
        return {"gemify": fields}

    def _usage(self, client: EngineClient) -> CompletionUsage:
        parsed = any(choice.parser is not None for choice in self._choices)
        reasoning = sum(choice.reasoning_tokens for choice in self._choices) if parsed else None
        return build_usage(client.prompt_tokens, client.cached_tokens, self._completion_tokens, reasoning)

    @property
    def _completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    def _count_tokens(self, client: EngineClient) -> None:
        """Charge the answers' tokens to the key and log them, however the request ended."""
        self.state.rate_limiter.add_tokens(get_key_name(self.request), self._completion_tokens)
        for waited in (request.queue_seconds for request in client.requests):
            if waited is not None:
                self.state.metrics.queue_time.observe(waited)
        add_log_fields(
            self.request,
            prompt_tokens=client.prompt_tokens,
            cached_tokens=client.cached_tokens,
            completion_tokens=self._completion_tokens,
        )


async def _result(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)


def to_sampling_params(
    body: GenerationBody,
    prompt_tokens: int,
    state: AppState,
    top_logprobs: int | None,
    *,
    prompt_logprobs: int | None = None,
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
            max_tokens=max(1, max_tokens),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stop,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.logit_bias,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            typical_p=1.0 if body.typical_p is None else body.typical_p,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            skip_special_tokens=body.skip_special_tokens is not False,
        )
    except ValueError as error:
        raise bad_request(str(error)) from error
