"""Texts to embed as other servers' clients send them: too long, with a named prompt, not scaled; finite or an error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from running_server import Served, serving
from tiny_gems import make_gem

TEXT = "".join(chr(97 + i % 26) for i in range(300))


@pytest.fixture(scope="module")
def served(base_dir: Path, one_thread: None) -> Iterator[Served]:
    with serving(make_gem(base_dir, max_length=65, prompts={"query": "find: "})) as running:
        yield running


def embed(served: Served, given: Any = TEXT, **options: Any) -> tuple[np.ndarray, Any]:
    answer = served.post("/v1/embeddings", {"input": given, "normalize": False, **options})
    assert answer.status_code == 200, answer.text
    return np.array([d["embedding"] for d in answer.json()["data"]]), answer


@pytest.mark.parametrize(
    ("options", "truncate"),
    [
        ({"truncate": True}, "end"),
        ({"truncate": "END"}, "end"),
        ({"truncate": "end"}, "end"),
        ({"truncate": True, "truncation_direction": "Left"}, "start"),
        ({"truncate": "start"}, "start"),
        ({"truncate_prompt_tokens": -1}, "start"),
        ({"truncate": "mean"}, "mean"),
    ],
)
def test_every_servers_words_for_a_long_text(served: Served, options: dict[str, Any], truncate: Any) -> None:
    vectors, answer = embed(served, [TEXT, "a cat"], **options)
    expected = served.gem.encode([TEXT, "a cat"], truncate=truncate)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    assert answer.headers.get("X-Gemify-Truncated") == (None if truncate == "mean" else "1")
    ids = served.gem.tokenizer(TEXT)["input_ids"]
    np.testing.assert_allclose(embed(served, ids, **options)[0][0], expected[0], rtol=1e-4, atol=1e-5)


def test_the_last_tokens_alone(served: Served) -> None:
    vectors, _ = embed(served, truncate_prompt_tokens=7)
    np.testing.assert_allclose(vectors[0], served.gem.encode(TEXT[-7:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"truncate": False}, {"truncate": "NONE"}, {"truncate": "error"}])
def test_a_long_text_is_refused_unless_it_may_be_cut(served: Served, options: dict[str, Any]) -> None:
    for given in (TEXT, served.gem.tokenizer(TEXT)["input_ids"]):
        answer = served.post("/v1/embeddings", {"input": given, **options})
        assert answer.status_code == 400
        assert "300 tokens, this model embeds up to 64" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"truncate": "middle"}, "truncate"),
        ({"truncate": 3}, "truncate"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 5, "truncate": "end"}, "truncate_prompt_tokens"),
        ({"truncation_direction": "Left"}, "truncation_direction"),
        ({"prompt_name": "passage"}, "prompt"),
        ({"input_type": "picture"}, "prompt"),
        ({"prompt_name": "query", "input_type": "query"}, "prompt_name"),
    ],
)
def test_what_cannot_be_honoured_is_refused(served: Served, options: dict[str, Any], named: str) -> None:
    answer = served.post("/v1/embeddings", {"input": "a cat", **options})
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_prompts_and_scaling(served: Served) -> None:
    gem = served.gem
    for options in ({"prompt_name": "query"}, {"input_type": "query"}, {"input_type": "search_query"}):
        np.testing.assert_allclose(embed(served, "a cat", **options)[0][0], gem.encode_query("a cat"), atol=1e-4)
    for options in ({}, {"input_type": "passage"}, {"input_type": "document"}):
        np.testing.assert_allclose(embed(served, "a cat", **options)[0][0], gem.encode("a cat"), atol=1e-4)
    assert math.isclose(np.linalg.norm(embed(served, "a cat", normalize=True)[0]), 1.0, rel_tol=1e-5)


def test_vectors_that_are_not_finite_are_an_error(base_dir: Path, one_thread: None) -> None:
    gem = make_gem(base_dir)
    with serving(gem) as served:
        assert served.post("/v1/embeddings", {"input": "a"}).status_code == 200
        with torch.no_grad():
            gem.lm.get_decoder().layers[0].mlp.down_proj.weight.mul_(torch.inf)
        answer = served.post("/v1/embeddings", {"input": "a cat"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "not_finite"
    assert "load it with float32 or bfloat16" in answer.json()["error"]["message"]
