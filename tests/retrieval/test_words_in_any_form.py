"""Word search and paths: one word in two Unicode forms is one word; an older word index is named and made anew."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import FTS

from gemify.retrieval.chunking import Chunk
from gemify.retrieval.document_store import Store
from gemify.retrieval.lance import connect
from gemify.retrieval.loaders import find_files
from gemify.retrieval.store_meta import StoreMeta
from gemify.retrieval.store_rows import ChunkRow, FileRecord
from gemify.retrieval.vector_table import TABLE, Corpus, CorpusMeta

WORDS = [
    ("Das Café öffnet in Zürich.", "Zürich"),
    ("Tiếng Việt rất đẹp.", "đẹp"),
    ("데이터베이스 서버 설정", "데이터베이스"),
    ("ガソリンのデータです。", "データ"),
    ("Ångström measured it.", "Ångström"),
    ("فِي المَدِينَةِ", "المدينة"),
    ("The ﬁnal draft", "final"),
    ("ＡＢＣ１２３ 番", "abc123"),
    ("naïve Bayes", "naïve"),
]


def store_of(directory: Path, texts: list[str]) -> Store:
    store = Store.create(directory, StoreMeta("m", "p", 4))
    rows = [ChunkRow("f.txt", "v", Chunk(i, t, "", "", "", 1, t)) for i, t in enumerate(texts)]
    store.append(rows, np.eye(len(texts), 4, dtype="f4") + 1)
    store.commit([FileRecord("f.txt", "h", "v", 1, 1.0, len(texts))])
    store.optimize()
    return store


def corpus_of(directory: Path, texts: list[str]) -> Corpus:
    meta = CorpusMeta("m", "p", 4)
    rows = [{"id": str(i), "title": "", "text": t, "vector": [1.0] * 4} for i, t in enumerate(texts)]
    connect(str(directory)).create_table(TABLE, pa.Table.from_pylist(rows, schema=meta.schema()))
    corpus = Corpus.open(directory)
    corpus.build_indexes()
    return corpus


@pytest.mark.parametrize("query_form", ["NFC", "NFD"])
@pytest.mark.parametrize("text_form", ["NFC", "NFD"])
def test_words_are_found_in_any_unicode_form(tmp_path: Path, text_form: str, query_form: str) -> None:
    texts = [unicodedata.normalize(text_form, text) for text, _ in WORDS]
    store = store_of(tmp_path / "store", texts)
    corpus = corpus_of(tmp_path / "corpus", texts)
    for at, (_, word) in enumerate(WORDS):
        query = unicodedata.normalize(query_form, word)
        assert [hit.text for hit in store.text_search(query, 3)] == [texts[at]], word
        if at not in (5, 6, 7):  # vowel signs and compatibility forms: in stores alone
            assert [hit.text for hit in corpus.text_search(query, 3)] == [texts[at]], word


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("어제 도서관에서 책을 빌렸다.", "도서관 책 도서관에서 빌렸다"),
        ("Die Straße war lang.", "Strasse STRASSE straße"),
        ("ΟΔΟΣ ΑΘΗΝΩΝ", "οδός οδος Αθηνών"),
        ("İstanbul'da", "istanbul İSTANBUL"),
        ("Käuze jagen", "Kauze käuze KÄUZE"),
        ("ذهبت أمس إلى المكتبة", "مكتبة المكتبة والمكتبة"),
        ("أحمد يقرأ", "احمد أحمد"),
        ("Donau\u00addampf\u00adschiff", "Donaudampfschiff"),
        ("می\u200cخواهم", "می\u200cخواهم میخواهم"),
        ("İki ﬁlozof", "filozof"),
    ],
)
def test_words_are_found_as_people_write_them(tmp_path: Path, text: str, queries: str) -> None:
    store = store_of(tmp_path / "store", ["owls hunt at night", text])
    for query in queries.split():
        assert [hit.text for hit in store.text_search(query, 3)] == [text], query


def test_words_indexed_by_an_earlier_version_are_still_found(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", ["owls"])
    store._chunks.update(values={"words": "Die Straße, οδός, المكتبة"})
    store.optimize()
    for query in ("Straße", "οδός", "المكتبة"):
        assert store.text_search(query, 1), query


def test_an_older_word_index_is_named_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_of(tmp_path / "store", ["昨天我去图书馆借了书。", "owls"])
    store._chunks.create_index("words", config=FTS(), replace=True)
    with caplog.at_level(logging.WARNING):
        store = Store.open(tmp_path / "store")
        assert store.text_search("owls", 1)
        assert not store.text_search("图书馆", 1)
    assert [r.getMessage() for r in caplog.records] == [
        f"the word index of {tmp_path / 'store'} is of an older version: run gemify index on its files again"
    ]
    store.optimize()  # as gemify index does
    assert Store.open(tmp_path / "store").text_search("图书馆", 1)
    corpus = corpus_of(tmp_path / "corpus", ["昨天我去图书馆借了书。", "owls"])
    corpus._table.create_index("text", config=FTS(), replace=True)
    assert corpus.build_indexes() == ["text"]
    assert corpus.text_search("图书馆", 1)


@pytest.mark.parametrize("pattern_form", ["NFC", "NFD"])
@pytest.mark.parametrize("name_form", ["NFC", "NFD"])
def test_paths_are_excluded_in_any_unicode_form(tmp_path: Path, name_form: str, pattern_form: str) -> None:
    for name in ("Entwürfe/a.md", "übrig.md"):
        path = tmp_path / unicodedata.normalize(name_form, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    listing = find_files([tmp_path], exclude=[unicodedata.normalize(pattern_form, "Entwürfe/*")])
    assert [unicodedata.normalize("NFC", p.name) for p in listing.files] == ["übrig.md"]
    (tmp_path / ".gitignore").write_text(unicodedata.normalize(pattern_form, "übrig.md\nEntwürfe/"))
    assert not find_files([tmp_path]).files
