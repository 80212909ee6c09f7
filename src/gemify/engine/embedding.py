"""The embedding half of the engine: small batches of texts, one of each request in turn."""

from __future__ import annotations

from collections import deque

from gemify.engine.requests import Closed, EmbeddingJob
from gemify.model.batching import length_groups
from gemify.model.encode import encode_ids
from gemify.model.gem import GemModel

Row = tuple[int, ...]


class Embedding:
    """Texts that wait to be embedded."""

    def __init__(self, gem: GemModel, *, step_tokens: int) -> None:
        self._gem, self._step_tokens = gem, step_tokens
        self.waiting: deque[EmbeddingJob] = deque()
        self.texts = self.tokens = self.failed = self.cancelled = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def counts(self) -> dict[str, int]:
        return {"texts": self.texts, "tokens": self.tokens, "cancelled": self.cancelled, "failed": self.failed}

    def step(self) -> None:
        """Embed texts of up to ``step_tokens`` columns, at least one. A bulk request holds up nobody's single text."""
        self._drop_cancelled()
        taken: list[tuple[EmbeddingJob, Row]] = []
        columns = 0
        while self.waiting:
            job = self.waiting.popleft()
            columns += len(job.waiting[-1]) + self._gem.config.k
            if taken and columns > self._step_tokens:
                self.waiting.appendleft(job)
                break
            taken.append((job, job.waiting.pop()))
            if job.waiting:
                self.waiting.append(job)
        lengths = [len(row) + self._gem.config.k for _, row in taken]
        for group in length_groups(lengths, max_tokens=self._step_tokens):
            self._embed([taken[i] for i in group])

    def drop_all(self, error: Exception) -> None:
        """Forget everything; whoever asked is told why."""
        for job in list(self.waiting):
            self._fail(job, error)

    def _embed(self, some: list[tuple[EmbeddingJob, Row]]) -> None:
        try:
            vectors_BD = encode_ids(self._gem.lm, self._gem.config, [row for _, row in some]).cpu().numpy()
        except Exception as error:
            for job in dict.fromkeys(job for job, _ in some):
                self._fail(job, error)
            return
        for (job, row), vector_D in zip(some, vectors_BD, strict=True):
            job.took(row, vector_D)
            self.texts += 1
            self.tokens += len(row)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.waiting if job.cancelled]:
            self.waiting.remove(job)
            self.cancelled += not job.closed
            job.tell(Closed())

    def _fail(self, job: EmbeddingJob, error: Exception) -> None:
        self.failed += not job.closed
        if job in self.waiting:
            self.waiting.remove(job)
        job.fail(error)
