"""A GEM with a read-out layer in the engine, where writing and embedding share one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny_models
from engine_client import running
from gemify import GemModel
from tiny_gems import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a cat on a mat", "x", "the river is long and red " * 3]


def test_the_engine_embeds_at_the_layer_and_writes_with_all(tmp_path: Path) -> None:
    base = str(tiny_models.save(tmp_path, num_hidden_layers=4))
    gem, plain = GemModel.from_base(base, layer=2), GemModel.from_base(base)
    for one in (gem, plain):
        randomize(one)
    rows = gem.text_tokenizer(TEXTS, max_tokens=gem.config.max_text_tokens)
    with running(plain) as asker:
        written, remembered = asker.write(rows[0]).text(), asker.recover(rows[0], max_tokens=6).text()
    vectors = gem.encode(TEXTS)
    assert np.abs(vectors - plain.encode(TEXTS)).max() > 0.1
    with running(gem) as asker:
        embedded, heard = asker.embed(rows), asker.write(rows[0], embed_prompt=True)
        assert heard.text() == written
        np.testing.assert_allclose(embedded.vectors(), vectors, atol=1e-5)
        np.testing.assert_allclose(heard.vectors()[0], vectors[0], atol=1e-5)
        assert asker.recover(rows[0], max_tokens=6).text() == remembered
    assert gem.recover(TEXTS[0]) == plain.recover(TEXTS[0])
