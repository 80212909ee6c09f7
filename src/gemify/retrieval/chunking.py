"""Sections cut into chunks of a number of tokens, where a reader would pause. Pure: no model, no files.

A cut falls, in this order of preference, at the end of a paragraph, a sentence, a line or a word, in the second half of
the tokens that fit; never inside a character. The next chunk repeats the last tokens of the one before.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemify.retrieval.documents import Section
from gemify.retrieval.metadata import Value

_PAUSES = (  # the group is where a cut may fall: tokens may hold their leading space, or several line ends
    re.compile(r"(\s*\n[^\S\n]*\n\s*)"),
    re.compile(r"[.!?…]['\")\]»”’]*(\s+)|[。！？]()"),
    re.compile(r"([^\S\n]*\n\s*)"),
    re.compile(r"(\s+)"),
)
_CONTEXT = 200  # characters of title and headings put before a text: some 50 tokens


@dataclass(frozen=True)
class ChunkSettings:
    """How texts are cut. Raises ValueError, in one line, for invalid values."""

    tokens: int = 256
    """Maximum tokens of a chunk."""
    overlap: int = 32
    """Tokens that a chunk repeats of the one before. Fewer where the chunk would begin inside a word."""
    context: bool = True
    """Whether title and headings go before the text where it is embedded and searched."""

    def __post_init__(self) -> None:
        if self.tokens < 16:
            raise ValueError(f"chunk tokens must be at least 16, got {self.tokens}")
        if not 0 <= self.overlap <= self.tokens // 4:
            raise ValueError(f"overlap must lie in 0..{self.tokens // 4} (a quarter of a chunk), got {self.overlap}")


@dataclass(frozen=True)
class TokenSpan:
    """A run of a text's tokens, and the characters they cover. Ends are exclusive."""

    first: int
    last: int
    start: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """A part of a file, ready to embed."""

    ordinal: int
    text: str
    title: str
    heading: str
    location: str
    tokens: int
    embed_text: str
    """The text to embed and search: with title and headings before it, if the settings say so."""
    meta: Mapping[str, Value] = field(default_factory=dict)
    """Metadata, by column."""


def split_tokens(text: str, offsets: Sequence[tuple[int, int]], *, tokens: int, overlap: int) -> list[TokenSpan]:
    """Split a text into overlapping spans that together cover all of it.

    Args:
        text: The text.
        offsets: The characters that each token covers, as (start, end).
        tokens: Maximum tokens of a span.
        overlap: Tokens that a span repeats of the one before.

    Returns:
        Spans in the order of the text; none for a text without tokens.
    """
    count = len(offsets)
    if not count:
        return []
    begins = [start for start, _ in offsets]
    whole = [at == 0 or offsets[at - 1][1] <= begins[at] for at in range(count)]  # whether a character begins there
    spans: list[TokenSpan] = []
    first = 0
    while True:
        last = count
        if first + tokens < count:
            last = _pause(text, begins, whole, first + tokens // 2, first + tokens)
        start = 0 if first == 0 else begins[first]
        spans.append(TokenSpan(first, last, start, len(text) if last == count else begins[last]))
        if last == count:
            return spans
        first = _resume(text, begins, whole, last - overlap, last)


def _pause(text: str, begins: Sequence[int], whole: Sequence[bool], low: int, high: int) -> int:
    """The best token to end before, from ``low`` to ``high``."""
    for pattern in _PAUSES:
        for match in reversed(list(pattern.finditer(text, begins[low], begins[high] + 1))):
            start, end = match.span(match.lastindex or 0)
            at = bisect_right(begins, end, low, high + 1) - 1
            if at > low and begins[at] >= start and whole[at]:
                return at
    return next((at for at in range(high, low, -1) if whole[at]), high)


def _resume(text: str, begins: Sequence[int], whole: Sequence[bool], low: int, last: int) -> int:
    """The first token from ``low`` on that begins a word; ``last`` itself if none does."""
    for at in range(low, last):
        begin = begins[at]
        if whole[at] and (text[begin].isspace() or text[begin - 1].isspace()):
            return at
    return next((at for at in range(low, last) if whole[at]), last)


def split_section(section: Section, tokenizer: Any, settings: ChunkSettings, *, ordinal: int = 0) -> Iterator[Chunk]:
    """Split a section into chunks.

    Args:
        section: The section.
        tokenizer: A fast tokenizer of transformers.
        settings: How to cut.
        ordinal: The number of the first chunk.

    Yields:
        Chunks with text, numbered in their order.
    """
    if not section.text.strip():
        return
    encoding = tokenizer(
        section.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    heading = " > ".join(section.headings)
    path = [section.title] if section.title and section.title not in section.headings else []
    context = " > ".join([*path, *section.headings])[:_CONTEXT] if settings.context else ""
    for span in split_tokens(
        section.text, encoding["offset_mapping"], tokens=settings.tokens, overlap=settings.overlap
    ):
        text = section.text[span.start : span.end]
        start = span.start + len(text) - len(text.lstrip())
        text = text.strip()
        if not text:
            continue
        yield Chunk(
            ordinal=ordinal,
            text=text,
            title=section.title,
            heading=heading,
            location=section.location(start, start + len(text)),
            tokens=span.last - span.first,
            embed_text=f"{context}\n{text}" if context else text,
            meta=section.meta,
        )
        ordinal += 1
