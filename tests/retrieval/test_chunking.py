"""Chunks cover a text, keep to their limit, overlap as stated, and end where a reader would pause."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from gemify.retrieval.chunking import ChunkSettings, split_section, split_tokens
from gemify.retrieval.documents import Section

TOKENIZER = tiny_models.tokenizer()
TEXTS = st.lists(
    st.sampled_from(["word", "a", "Sentence.", " ", "\n", "\n\n", "é", "🎉", "日本語。", "x" * 30, "  ", "Why? "]),
    max_size=120,
).map("".join)


def offsets(text: str) -> list[tuple[int, int]]:
    return TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


@given(TEXTS | st.text(max_size=300), st.integers(16, 80), st.data())
def test_pieces_cover_the_text_and_keep_to_the_limit(text: str, tokens: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tokens // 4))
    laid_out = offsets(text)
    pieces = split_tokens(text, laid_out, tokens=tokens, overlap=overlap)
    assert bool(pieces) == bool(laid_out)
    if not pieces:
        return
    assert (pieces[0].start, pieces[-1].end) == (0, len(text))
    assert (pieces[0].first, pieces[-1].last) == (0, len(laid_out))
    for piece in pieces:
        assert 0 < piece.last - piece.first <= tokens
        assert all(piece.start <= a and b <= piece.end for a, b in laid_out[piece.first : piece.last])
    for one, two in pairwise(pieces):
        assert one.last - overlap <= two.first <= one.last, "repeats at most the overlap, leaves nothing out"
        assert one.start < two.start <= one.end
        assert one.first < two.first


@given(TEXTS)
def test_the_overlap_is_all_of_it_unless_it_would_begin_inside_a_word(text: str) -> None:
    laid_out = offsets(text)
    pieces = split_tokens(text, laid_out, tokens=40, overlap=10)
    for one, two in pairwise(pieces):
        if two.first > one.last - 10:  # then no place before it would have done, or none at all
            for at in range(one.last - 10, two.first):
                begin = laid_out[at][0]
                inside_a_character = laid_out[at - 1][1] > begin
                assert inside_a_character or not (text[begin].isspace() or text[begin - 1].isspace())


@given(TEXTS)
def test_chunks_are_numbered_and_keep_every_visible_character(text: str) -> None:
    section = Section(text, unit="line")
    got = list(split_section(section, TOKENIZER, ChunkSettings(32, 0, context=False), ordinal=5))
    assert [c.ordinal for c in got] == list(range(5, 5 + len(got)))
    assert "".join("".join(c.text.split()) for c in got) == "".join(text.split())
    for chunk in got:
        assert chunk.text == chunk.text.strip() != ""
        assert chunk.embed_text == chunk.text
        assert chunk.tokens <= 32


def test_cuts_prefer_paragraphs_to_sentences_to_words() -> None:
    first, rest = "One two three. Four five six.", "Seven eight nine ten eleven twelve thirteen. Fourteen."
    got = split_tokens(f"{first}\n\n{rest}", offsets(f"{first}\n\n{rest}"), tokens=40, overlap=0)
    assert f"{first}\n\n{rest}"[: got[0].end].strip() == first
    text = "One two three four five. Six seven eight nine ten eleven"
    got = split_tokens(text, offsets(text), tokens=40, overlap=0)
    assert text[: got[0].end].strip() == "One two three four five."
    text = "one two three four five six seven eight nine ten"
    got = split_tokens(text, offsets(text), tokens=20, overlap=0)
    assert text[: got[0].end].strip() == "one two three four"


def test_context_goes_before_the_words_and_places_follow_the_lines() -> None:
    section = Section("alpha\nbeta\n\ngamma delta epsilon\n", "Title", ("Top", "Sub"), unit="line", first=10)
    got = list(split_section(section, TOKENIZER, ChunkSettings(16, 0)))
    assert [(c.text, c.location) for c in got] == [
        ("alpha\nbeta", "lines 10-11"),
        ("gamma delta", "line 13"),
        ("epsilon", "line 13"),
    ]
    assert got[0].embed_text == "Title > Top > Sub\nalpha\nbeta"
    assert (got[0].title, got[0].heading) == ("Title", "Top > Sub")


@pytest.mark.parametrize(
    ("values", "words"),
    [({"tokens": 8}, "at least 16"), ({"overlap": 65}, "overlap must lie"), ({"overlap": -1}, "0..")],
)
def test_impossible_settings_are_refused(values: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChunkSettings(**values)  # type: ignore[arg-type]
