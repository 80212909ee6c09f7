"""Libraries that take a SentenceTransformer take a GEM: an object (KeyBERT), or a directory's name (Haystack)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemify import GemModel

st = pytest.importorskip("sentence_transformers")


def test_keybert_ranks_a_texts_words_by_its_vectors(gem: GemModel) -> None:
    keybert = pytest.importorskip("keybert")
    from gemify.integrations.sentence_transformers import Gem

    model = st.SentenceTransformer(modules=[Gem(gem)], device="cpu")
    text, words = "a red cat sat on the long river mat", ["red", "cat", "river"]
    found = keybert.KeyBERT(model=model).extract_keywords(text, candidates=words, top_n=3)
    similarities = gem.similarity(gem.encode(words), gem.encode(text))[:, 0].tolist()
    assert dict(found) == pytest.approx(dict(zip(words, similarities, strict=True)), abs=1e-3)  # four places


def test_haystack_embeds_queries_and_documents(gem: GemModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    haystack = pytest.importorskip("haystack")
    gem.save_pretrained(tmp_path)
    device, options = haystack.utils.ComponentDevice.from_str("cpu"), {"progress_bar": False, "trust_remote_code": True}
    query = embedders.SentenceTransformersTextEmbedder(model=str(tmp_path), device=device, **options)
    documents = embedders.SentenceTransformersDocumentEmbedder(model=str(tmp_path), device=device, **options)
    texts = ["a red cat", "the long river"]
    written = documents.run([haystack.Document(content=text) for text in texts])["documents"]
    np.testing.assert_allclose([document.embedding for document in written], gem.encode(texts), atol=2e-5)
    np.testing.assert_allclose(query.run("a cat")["embedding"], gem.encode("a cat"), atol=2e-5)
