"""A template in what the server reads: texts to embed and questions have it, prompts and chats do not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from gemify.serving.tokenization import RequestTokenizer
from running_server import Served, serving
from tiny_gems import make_gem

WORDS = 'say : "{text}" is:"'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    base = tiny_models.save(tmp_path_factory.mktemp("model") / "base")
    gem = make_gem(base, max_length=64, template=WORDS, prompts={"query": "find: "})
    with serving(gem) as running:
        yield running


def test_texts_have_it(served: Served) -> None:
    texts = ["a cat", "", "<|reserved_0|> and {text}"]
    answer = served.post("/v1/embeddings", {"input": texts}).json()
    got = np.array([d["embedding"] for d in answer["data"]])
    vectors = served.gem.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(got, vectors, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, served.gem.text_tokenizer(texts, max_tokens=None)))
    longest = "x" * served.gem.max_seq_length
    assert served.post("/v1/embeddings", {"input": longest}).status_code == 200
    refused = served.post("/v1/embeddings", {"input": longest + "x"})
    assert refused.status_code == 400
    assert "64 tokens, this model embeds up to 63" in refused.json()["error"]["message"]


def test_prompts_do_not_and_have_no_vector_in_their_cache(served: Served) -> None:
    gem = served.gem
    said = served.post("/v1/completions", {"prompt": "a cat", "max_tokens": 6, "temperature": 0}).json()
    assert said["choices"][0]["text"] == gem.generate("a cat", max_new_tokens=6, do_sample=False)
    assert said["usage"]["prompt_tokens"] == len(gem.tokenizer("a cat")["input_ids"])
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "gemify": {"return_embedding": True}}
    refused = served.post("/v1/chat/completions", chat)
    assert refused.status_code == 400
    assert "has words before the text" in refused.json()["error"]["message"]


def test_a_question_is_cut_and_its_template_is_not(served: Served) -> None:
    gem = served.gem
    prompts = RequestTokenizer(gem)
    try:
        for question in ("who?", "y" * 90):
            row = asyncio.run(prompts.tokenize_query(question))
            assert row == gem.text_tokenizer(["find: " + question], max_tokens=gem.config.max_text_tokens)[0]
            assert row[-4:] == gem.tokenizer('is:"')["input_ids"]
        assert len(row) == gem.config.max_text_tokens
        assert asyncio.run(prompts.tokenize_plain("who?")) == gem.tokenizer("who?")["input_ids"]
    finally:
        prompts.close()


def test_text_comes_back_from_behind_it(served: Served, tmp_path: Path) -> None:
    answer = served.post("/v1/recover", {"input": "a cat", "max_tokens": 6}).json()
    assert answer["output"] == served.gem.recover("a cat", max_new_tokens=6)
    assert answer["input_tokens"] == len(served.gem.tokenizer("a cat")["input_ids"])
