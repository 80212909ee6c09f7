"""The starter model behind the server: what a user sees of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from anthropic import Anthropic

from gemify import GemModel
from running_server import serving


@pytest.mark.real
@pytest.mark.usefixtures("one_thread")
def test_the_starter_answers_and_embeds_as_the_library_does(shipped: GemModel) -> None:
    asked: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    expected = shipped.chat(asked, max_new_tokens=12, do_sample=False)
    vector = shipped.embed(shipped.prefill_chat(asked)).numpy()
    texts = ["a cat on a mat", "a feline on a rug", "stock prices fell"]
    vectors = shipped.encode(texts, normalize_embeddings=True)
    with serving(shipped) as served:
        client = served.client()
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=asked,
            max_tokens=12,
            temperature=0,
            extra_body={"gemify": {"return_embedding": True}},
        )
        response = client.responses.create(model="tiny", input=asked, max_output_tokens=12, temperature=0)
        message = Anthropic(base_url=served.url, api_key="no key is needed").messages.create(
            model="tiny", max_tokens=12, messages=asked, extra_body={"temperature": 0}
        )
        embedded = client.embeddings.create(model="tiny", input=texts)
    assert answer.choices[0].message.content == expected
    assert response.output_text == message.content[0].to_dict()["text"] == expected
    assert "Paris" in expected
    np.testing.assert_allclose(answer.gemify["embedding"], vector / np.linalg.norm(vector), atol=1e-5)
    np.testing.assert_allclose([d.embedding for d in embedded.data], vectors, atol=1e-5)
