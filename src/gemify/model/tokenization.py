"""Texts -> ids: tokenising that never cuts or mistakes a special token. It needs no model library at import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands around every text that is embedded: words that tell the base what is wanted of the text.
#
# The base reads them as it reads any words, so that they help without a weight being trained. ``{text}`` is the text; the
# special tokens come after all of it. Next-token rows, prompts and chats have no template.

TEXT = "{text}"
PLAIN = TEXT
"""No words at all: the paper's way."""
PROMPTEOL = 'This sentence : "{text}" means in one word:"'
"""Of PromptEOL (arXiv 2307.16645)."""


def require_template(template: str, *, k: int) -> None:
    """Refuse what is no template, and one for a model without special tokens: its vector is a mean over the text."""
    if not isinstance(template, str) or template.count(TEXT) != 1:
        raise ValueError(f"template must hold {TEXT} exactly once, got {template!r}")
    if k == 0 and template != PLAIN:
        raise ValueError(f"template {template!r} needs special tokens to read it, there are 0: leave it out")


def split_template(template: str) -> tuple[str, str]:
    """What stands before the text and what after it."""
    before, after = template.split(TEXT)
    return before, after


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for texts to embed: a user's text that spells a special token's name is text, not the token.

    The template's two parts and the text are tokenised apart, so that a text has the same ids under every template.
    """

    tokenizer: PreTrainedTokenizerBase
    special_ids: frozenset[int]
    template: str = PLAIN

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids of the template's words before a text."""
        return self._words(split_template(self.template)[0])

    @cached_property
    def suffix_ids(self) -> list[int]:
        """Ids of the template's words after a text."""
        return self._words(split_template(self.template)[1])

    @property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before every text (a BOS, mostly, or nothing)."""
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = self.tokenizer("a")["input_ids"]
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at]
        return []

    def __call__(self, texts: Sequence[str], *, max_tokens: int | None) -> list[list[int]]:
        """Ids of each text to embed: ``bos_ids``, template and text, of which the text is cut to ``max_tokens`` in all."""
        if not texts:
            return []
        start = self.bos_ids + self.prefix_ids
        room = None if max_tokens is None else max(0, max_tokens - len(start) - len(self.suffix_ids))
        return [start + row + self.suffix_ids for row in self.tokenize_plain(texts, max_tokens=room)]

    def tokenize_plain(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[list[int]]:
        """Ids of each text alone, cut at the end to ``max_tokens``."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for at, row in enumerate(rows):
            if not self.special_ids.isdisjoint(row):
                rows[at] = self.tokenizer(texts[at], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [row[:max_tokens] for row in rows]

    def tokenize_prompts(self, texts: Sequence[str], *, add_special_tokens: bool, vocab_size: int) -> list[list[int]]:
        """Ids of prompts to continue, as the base's own tokenizer reads them.

        An added special token that has no row among the ``vocab_size`` rows means nothing to the base: its name is text.
        """
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]
        for at, row in enumerate(rows):
            if any(i >= vocab_size for i in row):
                rows[at] = (self.bos_ids if add_special_tokens else []) + self.tokenize_plain([texts[at]])[0]
        return rows

    def _words(self, words: str) -> list[int]:
        return self.tokenize_plain([words])[0] if words else []
