"""What the engine is asked for, and what it answers with: events, in the engine's thread, `Closed` always last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemify.engine.sampling import Sampling, TokenLogprob
from gemify.model.forward import CachedText


@dataclass(frozen=True)
class Piece:
    """More of an answer. ``tokens`` only where log probabilities were asked for; the text may be empty then."""

    index: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """One of the answers is complete."""

    index: int
    reason: Literal["stop", "length"]
    completion_tokens: int


@dataclass(frozen=True)
class Vectors:
    """Embeddings [N, D], float32, not normalised, in the order of the texts."""

    vectors_ND: np.ndarray


@dataclass(frozen=True)
class Failed:
    """Nothing more will come: ValueError is the asker's fault, anything else ours."""

    error: Exception


@dataclass(frozen=True)
class Closed:
    """The last event of every job, cancelled ones too."""


Event = Piece | Finished | Vectors | Failed | Closed
Listener = Callable[[Event], None]


class QueueFull(Exception):
    """Too much is waiting already."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} texts and answers are waiting: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Stopping(Exception):
    """The engine finishes what it has and takes no more."""

    def __init__(self) -> None:
        super().__init__("the server is stopping: ask again when it is back")


class Job:
    """Something asked of the engine."""

    prompt_tokens = 0
    reused_tokens = 0
    """Of the prompt's tokens, those that had run before for another request. Final when closed."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.cancelled = self.closed = False

    @property
    def units(self) -> int:
        """How many texts or answers it is."""
        return 1

    def cancel(self) -> None:
        """Stop working on it, from any thread: what it holds is free at the engine's next step."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        if self.closed:
            return
        self.closed = isinstance(event, Closed)
        try:
            self._listener(event)
        except Exception:  # whoever listened is gone
            self.cancelled = True

    def fail(self, error: Exception) -> None:
        """Tell what went wrong, and end. Rows that it has are free at the next step."""
        self.tell(Failed(error))
        self.tell(Closed())
        self.cancel()


class WritingJob(Job):
    """Answers to one prompt, or with ``recovering`` what its special tokens remember of a text."""

    def __init__(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        listener: Listener,
        *,
        n: int,
        embed_prompt: bool,
        recovering: bool,
        scope: str,
    ) -> None:
        super().__init__(listener)
        self.ids, self.sampling, self.n, self.scope = tuple(ids), sampling, n, scope
        self.embed_prompt, self.recovering = embed_prompt, recovering
        self.prompt_tokens = len(ids)
        self.read: CachedText | None = None
        """As much of the prompt as has run."""
        self.unfinished = n

    @property
    def units(self) -> int:
        return self.n


class EmbeddingJob(Job):
    """Texts to embed. A text that occurs twice is computed once."""

    def __init__(self, rows: Sequence[Sequence[int]], listener: Listener) -> None:
        super().__init__(listener)
        self.rows = [tuple(row) for row in rows]
        self.prompt_tokens = sum(map(len, self.rows))
        self.waiting = sorted(set(self.rows), key=len)
        """Texts yet to be computed, the longest last."""
        self.vectors: dict[tuple[int, ...], np.ndarray] = {}
        self._distinct = len(self.waiting)

    @property
    def units(self) -> int:
        return len(self.waiting)

    def took(self, row: tuple[int, ...], vector_D: np.ndarray) -> None:
        self.vectors[row] = vector_D
        if len(self.vectors) == self._distinct:
            self.tell(Vectors(np.stack([self.vectors[row] for row in self.rows])))
            self.tell(Closed())
