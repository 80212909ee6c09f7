"""One request's answers: asked of the engine, then written whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemify.engine.jobs import Finished, Piece, Vectors
from gemify.engine.sampling import Sampling
from gemify.serving.asking import Asking, while_there
from gemify.serving.choices import Choice, Form, usage
from gemify.serving.errors import bad
from gemify.serving.house import House, house_of, key_of, note
from gemify.serving.streams import EventStream
from gemify.serving.types import ChatRequest, CompletionsRequest

Wish = ChatRequest | CompletionsRequest


@dataclass
class Replies:
    """Answers to the prompts of one request, ``n`` to each."""

    request: Request
    wish: Wish
    form: Form
    prompts: Sequence[Sequence[int]]
    top_logprobs: int | None
    return_embedding: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """What the response says under ``gemify``."""

    @property
    def house(self) -> House:
        return house_of(self.request)

    async def respond(self) -> Response:
        """Ask, and give what is to be sent; the engine's refusals are ApiErrors."""
        self._began = time.perf_counter()
        limits, key, tokens = self.house.limits, key_of(self.request), sum(map(len, self.prompts))
        limits.require_tokens(key, tokens)
        self._choices = [Choice() for _ in range(len(self.prompts) * self._n)]
        timeout = self.house.settings.timeout
        asking = Asking()
        try:
            self._ask(asking)
            limits.add_tokens(key, tokens)
            if self.wish.stream:
                return EventStream(asking, self._stream(asking), timeout=timeout)
        except BaseException:
            asking.__exit__()
            raise
        with asking:
            try:
                await while_there(self.request.receive, self._collect(asking), timeout)
            finally:
                self._count(asking)
        return JSONResponse(self.form.whole(self._choices, self._usage(asking)) | self._gemify())

    @property
    def _n(self) -> int:
        return self.wish.n or 1

    def _ask(self, asking: Asking) -> None:
        engine = self.house.engine
        for ids in self.prompts:
            verb = partial(
                engine.generate,
                ids,
                sampling_of(self.wish, len(ids), self.house, self.top_logprobs),
                n=self._n,
                embed_prompt=self.return_embedding,
                scope=key_of(self.request),
            )
            asking.start(verb)

    async def _collect(self, asking: Asking) -> None:
        async for number, event in asking.events():
            self._take(number, event)

    def _take(self, number: int, event: Piece | Finished | Vectors) -> int:
        """Keep what came; the choice it belongs to."""
        if isinstance(event, Vectors):
            self.facts["embedding"] = unit(event.vectors_ND)[0].tolist()
            return 0
        if not any(choice.pieces for choice in self._choices):
            self.house.metrics.first_token.observe(time.perf_counter() - self._began)
        index = number * self._n + event.index
        self._choices[index].take(event)
        return index

    async def _stream(self, asking: Asking) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks. With an embedding to come, none before it: the first one carries it."""
        with_usage = bool(self.wish.stream_options and self.wish.stream_options.include_usage)
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        held: list[dict[str, Any]] = []
        if self.form.kind == "chat":
            held = [self.form.opening(i) for i in range(len(self._choices))]
        waiting = self.return_embedding
        try:
            for chunk in self._ready(held, waiting, extra):
                yield chunk
            async for number, event in asking.events():
                index = self._take(number, event)
                if isinstance(event, Vectors):
                    waiting = False
                elif isinstance(event, Finished):
                    held.append(self.form.ending(index, event))
                else:
                    held.append(self.form.piece(index, event))
                for chunk in self._ready(held, waiting, extra):
                    yield chunk
            if with_usage:
                yield self.form.chunk([]) | {"usage": self._usage(asking)}
        finally:
            self._count(asking)

    def _ready(self, held: list[dict[str, Any]], waiting: bool, extra: dict[str, Any]) -> list[dict[str, Any]]:
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

    def _usage(self, asking: Asking) -> dict[str, Any]:
        return usage(asking.prompt_tokens, asking.reused_tokens, self._completion_tokens)

    @property
    def _completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self._choices)

    def _count(self, asking: Asking) -> None:
        """To the key's account and the log, however it ended."""
        self.house.limits.add_tokens(key_of(self.request), self._completion_tokens)
        note(
            self.request,
            prompt_tokens=asking.prompt_tokens,
            reused_tokens=asking.reused_tokens,
            completion_tokens=self._completion_tokens,
        )


def sampling_of(wish: Wish, prompt_tokens: int, house: House, top_logprobs: int | None) -> Sampling:
    """The engine's words for a request's wishes."""
    longest = (wish.max_completion_tokens if isinstance(wish, ChatRequest) else None) or wish.max_tokens
    if longest is None:
        longest = 16 if isinstance(wish, CompletionsRequest) else house.settings.default_max_tokens
        if house.engine.limit is not None:
            longest = max(1, min(longest, house.engine.limit - prompt_tokens))
    try:
        return Sampling(
            max_tokens=longest,
            temperature=1.0 if wish.temperature is None else wish.temperature,
            top_p=1.0 if wish.top_p is None else wish.top_p,
            seed=wish.seed,
            stop=wish.stop,
            presence_penalty=wish.presence_penalty or 0.0,
            frequency_penalty=wish.frequency_penalty or 0.0,
            logit_bias=wish.logit_bias,
            top_logprobs=top_logprobs,
        )
    except ValueError as error:
        raise bad(str(error)) from error


def unit(vectors_ND: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Vectors cut to so many numbers and scaled to length 1, as OpenAI's are; zeros stay zeros."""
    cut_ND = np.asarray(vectors_ND, dtype=np.float32)[:, :dimensions]
    lengths_N1 = np.linalg.norm(cut_ND, axis=1, keepdims=True)
    return (cut_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)).astype(np.float32)
