"""A model for the index whose vectors are known: every word has a random direction, a text is the sum of its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

import tiny_models


class BagOfWords:
    """Vectors that depend on the text alone, not on what it is embedded with."""

    max_seq_length = 512

    def __init__(self, dimension: int = 32, name: str = "bag") -> None:
        self.dimension, self.fingerprint = dimension, name
        self.tokenizer: Any = tiny_models.tokenizer()
        self.embedded: list[str] = []

    def get_embedding_dim(self) -> int:
        return self.dimension

    def encode_query(self, inputs: str | Sequence[str], **_: Any) -> np.ndarray:
        if isinstance(inputs, str):
            return self._vector(inputs)
        return np.stack([self._vector(text) for text in inputs])

    def encode_document(self, inputs: Sequence[str], **_: Any) -> np.ndarray:
        self.embedded.extend(inputs)
        return self.encode_query(inputs)

    def _vector(self, text: str) -> np.ndarray:
        words = re.findall(r"\w+", text.lower()) or [""]
        seeds = [int.from_bytes(w.encode()[:24].ljust(1), "big") for w in words]
        return np.sum([np.random.default_rng(s).normal(size=self.dimension) for s in seeds], axis=0).astype("f4")
