"""Requests to the engine, and the events it answers with. Events come in the engine's thread; `Done` is always last."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from gemify.engine.sampling import SamplingParams, TokenLogprob
from gemify.model.kv_cache import CachedText


@dataclass(frozen=True)
class TokenDelta:
    """New text of one sequence, maybe empty. ``tokens`` is filled only if log probabilities were asked for."""

    index: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """The prompt's tokens in order, each with its log probability; of the first one, which has none, it is NaN."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Completion:
    """One of the request's ``n`` sequences is complete."""

    index: int
    reason: Literal["stop", "length"]
    completion_tokens: int
    stop: str | None = None
    """The stop string that ended it."""


@dataclass(frozen=True)
class EmbeddingOutput:
    """Embeddings [N, D], float32, not normalised, in the order of the texts."""

    vectors_ND: np.ndarray


@dataclass(frozen=True)
class PrefillOutput:
    """A prompt that has run, without an answer: `Engine.generate` goes on from it."""

    text: CachedText
    """KV of the whole prompt."""
    logits_BV: Tensor
    """Logits [1, V] of the next token."""


@dataclass(frozen=True)
class PromptStart:
    """The first tokens of a prompt, which have run before the request is made.

    Args:
        text: their KV, one row without padding; a cache that keeps all positions.
        cached_tokens: how many of them were not run for this client, such as those of a kept cache.
        is_exact: whether the KV is what running the tokens gives. KV that is not goes into no prefix cache.
    """

    text: CachedText
    cached_tokens: int = 0
    is_exact: bool = True


@dataclass(frozen=True)
class Failed:
    """The request failed. A ValueError is the client's fault, any other error is the server's."""

    error: Exception


@dataclass(frozen=True)
class Done:
    """The last event of every request, also of a cancelled one."""


Event = TokenDelta | Completion | PromptLogprobs | EmbeddingOutput | PrefillOutput | Failed | Done
Listener = Callable[[Event], None]


class QueueFullError(Exception):
    """Too many texts and sequences are waiting already.

    Args:
        waiting: how many are waiting.
        retry_after: seconds after which another try may succeed.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} texts and answers are waiting: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class EngineStoppingError(Exception):
    """The engine finishes the requests it has and accepts no more."""

    def __init__(self) -> None:
        super().__init__("the server is stopping: ask again when it is back")


class EngineRequest:
    """One request, on its way through the engine.

    Args:
        listener: called with each event, in the engine's thread.
    """

    prompt_tokens = 0
    cached_tokens = 0
    """Prompt tokens taken from the prefix cache instead of being run. Final once the request is done."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.cancelled = self.done = False
        self._submitted = time.perf_counter()
        self.queue_seconds: float | None = None
        """Seconds that it waited for its first pass. None: it waits still."""

    @property
    def num_items(self) -> int:
        """Texts or sequences it still waits for: its size in the queue."""
        return 1

    def start(self) -> None:
        """End its time in the queue, at its first pass."""
        if self.queue_seconds is None:
            self.queue_seconds = time.perf_counter() - self._submitted

    def cancel(self) -> None:
        """Stop working on the request, from any thread. Its memory is free at the engine's next step."""
        self.cancelled = True

    def emit(self, event: Event) -> None:
        """Hand an event to the listener, unless the request is done."""
        if self.done:
            return
        self.done = isinstance(event, Done)
        try:
            self._listener(event)
        except Exception:  # the client is gone
            self.cancelled = True

    def fail(self, error: Exception) -> None:
        """Emit the error and end the request. Its sequences leave the batch at the next step."""
        self.emit(Failed(error))
        self.emit(Done())
        self.cancel()


class GenerationRequest(EngineRequest):
    """``n`` sequences that continue one prompt.

    Args:
        ids: the prompt.
        sampling: how tokens are chosen.
        listener: called with each event.
        n: how many sequences. 0: the prompt's prefill is all that is wanted.
        embed_from: also compute the prompt's embedding, from the same prefill; its special tokens see the positions
            from this one on. None: no embedding.
        is_recovery: ``ids`` is a text; generate from the KV of its special tokens alone.
        cache_salt: only requests with equal salts share prefixes.
        start: what of the prompt has run. None: what the prefix cache knows.
    """

    def __init__(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        listener: Listener,
        *,
        n: int,
        embed_from: int | None = None,
        is_recovery: bool = False,
        cache_salt: str = "",
        start: PromptStart | None = None,
    ) -> None:
        super().__init__(listener)
        self.ids, self.sampling, self.n, self.cache_salt = tuple(ids), sampling, n, cache_salt
        self.embed_from, self.is_recovery = embed_from, is_recovery
        self.prompt_tokens = len(ids)
        self.prefilled = None if start is None else start.text
        """The part of the prompt that has run. None: not known yet."""
        self.cached_tokens = 0 if start is None else start.cached_tokens
        self.is_exact = start is None or start.is_exact
        self.num_unfinished = n
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the tokens that have run, if the sampling parameters ask for them."""

    @property
    def num_items(self) -> int:
        """How many sequences it asks for; a prefill alone counts as one."""
        return max(1, self.n)

    @property
    def num_prefilled(self) -> int:
        """Tokens of the prompt that have run."""
        return 0 if self.prefilled is None else self.prefilled.mask_BT.shape[1]


class EmbeddingRequest(EngineRequest):
    """Texts to embed. A text that occurs twice is computed once.

    Args:
        rows: token ids of each text.
        listener: called with each event.
    """

    def __init__(self, rows: Sequence[Sequence[int]], listener: Listener) -> None:
        super().__init__(listener)
        self.rows = [tuple(row) for row in rows]
        self.prompt_tokens = sum(map(len, self.rows))
        self.waiting = sorted(set(self.rows), key=len)
        """Texts that are not computed yet, the longest last."""
        self._vectors: dict[tuple[int, ...], np.ndarray] = {}
        self._num_distinct = len(self.waiting)

    @property
    def num_items(self) -> int:
        """How many texts are not computed yet."""
        return len(self.waiting)

    def set_embedding(self, row: tuple[int, ...], vector_D: np.ndarray) -> None:
        """Store one text's embedding; the last one ends the request."""
        self._vectors[row] = vector_D
        if len(self._vectors) == self._num_distinct:
            self.emit(EmbeddingOutput(np.stack([self._vectors[row] for row in self.rows])))
            self.emit(Done())
