"""Types of the public API as a type checker sees them: `mypy` checks this file (pyproject.toml); nothing runs it."""

from __future__ import annotations

from typing import assert_type

import numpy as np
from torch import Tensor

from gemify import GemModel
from gemify.model.embedding_mixin import Matrix, Vector
from gemify.model.prefill import Prefill


def check_embedding(gem: GemModel, texts: list[str]) -> None:
    assert_type(gem.encode("a text"), Vector)
    assert_type(gem.encode("a text", normalize_embeddings=True, truncate_dim=8), Vector)
    assert_type(gem.encode(texts), Matrix)
    assert_type(gem.encode(("a", "tuple"), batch_size=2), Matrix)
    assert_type(gem.encode("a text", convert_to_tensor=True), Tensor)
    assert_type(gem.encode(texts, convert_to_tensor=True), Tensor)
    assert_type(gem.encode("a text").shape, tuple[int])
    assert_type(gem.encode(texts).shape, tuple[int, int])
    assert_type(gem.encode(texts).dtype, np.dtype[np.float32])
    assert_type(gem.encode(texts, output_value="sentence_embedding", device="cpu"), Matrix)
    assert_type(gem.encode(texts, precision="int8"), np.ndarray | Tensor | list[Tensor])
    assert_type(gem.encode(texts, convert_to_numpy=False), np.ndarray | Tensor | list[Tensor])
    gem.encode(texts, batch_sise=2)  # type: ignore[call-overload]


def check_queries_and_documents(gem: GemModel, texts: list[str]) -> None:
    assert_type(gem.encode_query("a text"), Vector)
    assert_type(gem.encode_query(texts, batch_size=2), Matrix)
    assert_type(gem.encode_query(texts, convert_to_tensor=True), Tensor)
    assert_type(gem.encode_document("a text"), Vector)
    assert_type(gem.encode_document(texts), Matrix)
    assert_type(gem.encode_document("a text", convert_to_tensor=True), Tensor)
    assert_type(gem.similarity(gem.encode(texts), gem.encode("a text")), Tensor)


def check_generation(gem: GemModel, texts: list[str], prefill: Prefill) -> None:
    assert_type(gem.generate("a prompt"), str)
    assert_type(gem.generate("a prompt", max_new_tokens=5, do_sample=False), str)
    assert_type(gem.generate(texts), list[str])
    assert_type(gem.generate(prefill), str | list[str])
    assert_type(gem.generate("a prompt", num_return_sequences=2), str | list[str])
    assert_type(gem.chat([{"role": "user", "content": "hello"}]), str)


def check_prefill(gem: GemModel, texts: list[str]) -> None:
    assert_type(gem.prefill("a text"), Prefill)
    assert_type(gem.prefill(texts), Prefill)
    assert_type(gem.prefill_chat([{"role": "user", "content": "hello"}]), Prefill)
    assert_type(gem.embed(gem.prefill(texts)), Tensor)
    assert_type(gem.recover("a text"), str)
    assert_type(gem.recover(texts), list[str])
    assert_type(gem.recover(gem.prefill("a text")), str | list[str])
