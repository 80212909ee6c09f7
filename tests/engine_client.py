"""Asking an engine from a test: listeners that remember, and the answers they heard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gemify import GemModel
from gemify.engine.engine import Engine
from gemify.engine.requests import Completion, Done, EmbeddingOutput, EngineRequest, Event, Failed, TokenDelta
from gemify.engine.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


class Heard:
    """All events of a job."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self.closed = threading.Event()
        self.on_event = on_event

    def __call__(self, event: Event) -> None:
        assert not self.closed.is_set(), "nothing comes after Done"
        self.events.append(event)
        if isinstance(event, Done):
            self.closed.set()
        if self.on_event:
            self.on_event(event)

    def wait(self) -> Heard:
        assert self.closed.wait(60)
        return self

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def text(self, index: int = 0) -> str:
        self.wait()
        assert not self.of(Failed), self.of(Failed)
        return "".join(piece.text for piece in self.of(TokenDelta) if piece.index == index)

    def tokens(self, index: int = 0) -> list[Any]:
        self.wait()
        return [token for piece in self.of(TokenDelta) if piece.index == index for token in piece.tokens]

    def finished(self) -> list[Completion]:
        self.wait()
        return sorted(self.of(Completion), key=lambda event: event.index)

    def vectors(self) -> np.ndarray:
        self.wait()
        (found,) = self.of(EmbeddingOutput)
        return found.vectors_ND


class Asker:
    """Asks an engine, and keeps each job beside what was heard of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def write(self, ids: Sequence[int], sampling: SamplingParams = GREEDY, **options: Any) -> Heard:
        heard = Heard()
        self.request: EngineRequest = self.engine.generate(ids, sampling, heard, **options)
        return heard

    def embed(self, rows: Sequence[Sequence[int]]) -> Heard:
        heard = Heard()
        self.request = self.engine.embed(rows, heard)
        return heard

    def recover(self, ids: Sequence[int], **options: Any) -> Heard:
        heard = Heard()
        self.request = self.engine.recover(ids, heard, **options)
        return heard


@contextmanager
def running(gem: GemModel, **options: Any) -> Iterator[Asker]:
    engine = Engine(gem, **options)
    engine.start()
    try:
        yield Asker(engine)
    finally:
        engine.stop(timeout_s=0)
