"""What a prompt says of the passages that were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

SYSTEM_PROMPT = "You answer questions from the given passages, in a few words."


class RetrievedPassage(Protocol):
    """A passage that a search returned (`gemify.retrieval.index.Passage`)."""

    @property
    def text(self) -> str:
        """The passage itself."""

    @property
    def title(self) -> str:
        """Title of its file or row; may be empty."""

    @property
    def heading(self) -> str:
        """Heading that it stands under; may be empty."""

    @property
    def file(self) -> str:
        """File or row that it comes from."""

    @property
    def location(self) -> str:
        """Where in the file, such as a page or a line; may be empty."""

    @property
    def score(self) -> float:
        """How well it matches; higher is better."""


class QueryEmbedder(Protocol):
    """A model that embeds questions."""

    def encode_query(self, inputs: str) -> Any:
        """Vector [D] of a question."""


class SearchIndex(Protocol):
    """An index (`gemify.retrieval.index.GemIndex`)."""

    def search(
        self,
        query: str,
        *,
        k: int = 10,
        mode: Any = "vector",
        vector: np.ndarray | None = None,
        where: str | None = None,
    ) -> Sequence[Any]:
        """Return the ``k`` best passages for a question, whose vector [D] may be given; of those that fit a filter."""


def label(number: int) -> str:
    """Return what stands before a passage in a prompt."""
    return f"[{number}] "


def passage_text(passage: RetrievedPassage) -> str:
    """Return a passage as it stands in a prompt: its heading or title, and its text."""
    about = passage.heading or passage.title
    return f"{about}: {passage.text}" if about else passage.text
