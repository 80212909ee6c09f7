"""Chats and vectors of a GEM with an embedding pass of its own, side by side in one engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine_client import GREEDY, running
from tiny_gems import make_gem

TEXTS = ["a cat on a mat", "x", "the river is long and red " * 3]


def test_one_engine_writes_and_embeds(base_dir: Path) -> None:
    gem = make_gem(base_dir, tune="embedding_lora", special_tokens=0, attention="bidirectional")
    prompt = gem.tokenizer("the cat sat")["input_ids"]
    expected, text = gem.encode(TEXTS), gem.generate("the cat sat", max_new_tokens=12, do_sample=False)
    rows = gem.text_tokenizer(TEXTS, max_tokens=gem.config.max_text_tokens)
    with running(gem) as asker:
        for _ in range(3):
            chat, vectors = asker.write(prompt, GREEDY), asker.embed(rows)
            assert chat.text() == text
            np.testing.assert_allclose(vectors.vectors(), expected, atol=1e-6)
