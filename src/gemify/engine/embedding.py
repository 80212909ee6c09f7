"""The embedding scheduler: small batches of texts, taken from the waiting requests in turn."""

from __future__ import annotations

from collections import deque

from gemify.engine.requests import Done, EmbeddingRequest
from gemify.model.encode import encode_ids
from gemify.model.forward import length_groups
from gemify.model.gem import GemModel

_Scheduled = tuple[EmbeddingRequest, tuple[int, ...]]
"""A request and one of its texts."""


class EmbeddingScheduler:
    """Texts that wait to be embedded.

    Args:
        gem: the model.
        max_num_batched_tokens: most tokens that one step embeds.
    """

    def __init__(self, gem: GemModel, *, max_num_batched_tokens: int) -> None:
        self._gem, self._max_num_batched_tokens = gem, max_num_batched_tokens
        self.waiting: deque[EmbeddingRequest] = deque()
        self._counts = dict.fromkeys(("texts", "tokens", "cancelled", "failed"), 0)

    @property
    def busy(self) -> bool:
        """Whether a text waits."""
        return bool(self.waiting)

    def counts(self) -> dict[str, int]:
        """Counters since the start."""
        return dict(self._counts)

    def step(self) -> None:
        """Embed waiting texts of up to ``max_num_batched_tokens`` tokens, at least one text."""
        self._remove_cancelled()
        scheduled = self._schedule()
        lengths = [len(row) + self._gem.config.k for _, row in scheduled]
        for group in length_groups(lengths, max_tokens=self._max_num_batched_tokens):
            self._embed([scheduled[i] for i in group])

    def abort_all(self, error: Exception) -> None:
        """Drop all requests; each emits the error."""
        for request in list(self.waiting):
            self._fail(request, error)

    def _schedule(self) -> list[_Scheduled]:
        """Choose one text of each request in turn: a request of many texts does not hold up one of a single text."""
        scheduled: list[_Scheduled] = []
        num_tokens = 0
        while self.waiting:
            request = self.waiting.popleft()
            num_tokens += len(request.waiting[-1]) + self._gem.config.k
            if scheduled and num_tokens > self._max_num_batched_tokens:
                self.waiting.appendleft(request)
                break
            scheduled.append((request, request.waiting.pop()))
            if request.waiting:
                self.waiting.append(request)
        return scheduled

    def _embed(self, scheduled: list[_Scheduled]) -> None:
        try:
            vectors_BD = encode_ids(self._gem.lm, self._gem.config, [row for _, row in scheduled]).cpu().numpy()
        except Exception as error:
            for request in dict.fromkeys(request for request, _ in scheduled):
                self._fail(request, error)
            return
        for (request, row), vector_D in zip(scheduled, vectors_BD, strict=True):
            request.set_embedding(row, vector_D)
            self._counts["texts"] += 1
            self._counts["tokens"] += len(row)

    def _remove_cancelled(self) -> None:
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            self._counts["cancelled"] += not request.done
            request.emit(Done())

    def _fail(self, request: EmbeddingRequest, error: Exception) -> None:
        self._counts["failed"] += not request.done
        if request in self.waiting:
            self.waiting.remove(request)
        request.fail(error)
