"""What a prompt says of the passages that were found."""

from __future__ import annotations

from typing import Protocol

SYSTEM_PROMPT = "You answer questions from the given passages, in a few words."


class RetrievedPassage(Protocol):
    """A passage that was found (`gemify.retrieval.index.Passage`)."""

    @property
    def text(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def heading(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def location(self) -> str: ...
    @property
    def score(self) -> float: ...


def passage_text(passage: RetrievedPassage) -> str:
    """A passage as the prompt has it."""
    about = passage.heading or passage.title
    return f"{about}: {passage.text}" if about else passage.text
