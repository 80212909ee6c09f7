"""Libraries that take a SentenceTransformer take a GEM. They are in no extra, so the tests may skip."""

from __future__ import annotations

import pytest

from gemify import GemModel

st = pytest.importorskip("sentence_transformers")


def test_keybert_ranks_a_texts_words_by_its_vectors(gem: GemModel) -> None:
    keybert = pytest.importorskip("keybert", reason="KeyBERT is not installed: pip install keybert")
    from gemify.integrations.sentence_transformers import Gem

    model = st.SentenceTransformer(modules=[Gem(gem)], device="cpu")
    text, words = "a red cat sat on the long river mat", ["red", "cat", "river"]
    found = keybert.KeyBERT(model=model).extract_keywords(text, candidates=words, top_n=3)
    similarities = gem.similarity(gem.encode(words), gem.encode(text))[:, 0].tolist()
    assert dict(found) == pytest.approx(dict(zip(words, similarities, strict=True)), abs=1e-3)  # four places
