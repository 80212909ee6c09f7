"""Texts to token ids: templates, and tokenising that never cuts or mistakes a special token.

A template is what stands around every text that is embedded: words that tell the base model what is wanted of the text.
The base reads them as any words, so they help without a trained weight. ``{text}`` is the text; the special tokens
follow all of it. Next-token rows, prompts and chats have no template.

This file imports no model library, so that configurations can be read without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from gemify.io.rows import replace_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncate = Literal["error", "end", "start", "mean"]
"""What becomes of a text that is too long: an error, cut at its end or its start, or the mean of its parts' vectors."""
TRUNCATIONS: tuple[Truncate, ...] = get_args(Truncate)
TEXT = "{text}"
PLAIN = TEXT
"""The template without words, as in the paper."""
PROMPTEOL = 'This sentence : "{text}" means in one word:"'
"""The template of PromptEOL (arXiv 2307.16645)."""


def require_template(template: str, *, k: int) -> None:
    """Check a template.

    Args:
        template: The text with ``{text}`` in it.
        k: Number of special tokens. A model without any averages over the text, so it can have no template.

    Raises:
        ValueError: ``{text}`` does not occur exactly once, or there are words but no special token to read them.
    """
    if not isinstance(template, str) or template.count(TEXT) != 1:
        raise ValueError(f"template must hold {TEXT} exactly once, got {template!r}")
    if k == 0 and template != PLAIN:
        raise ValueError(f"template {template!r} needs special tokens to read it, there are 0: leave it out")


def require_truncate(truncate: str) -> None:
    """Raise ValueError for an unknown policy."""
    if truncate not in TRUNCATIONS:
        raise ValueError(f"unknown truncate {truncate!r}: choose one of {', '.join(TRUNCATIONS)}")


def truncate_row(row: Sequence[int], limit: int, truncate: Truncate, *, head: int = 0) -> list[list[int]]:
    """Make a text fit.

    Args:
        row: Its token ids.
        limit: Most tokens.
        truncate: How. ``mean`` gives several parts; ``error`` leaves the row as it is.
        head: So many first tokens (those of a prompt) stand before every part.

    Returns:
        Token ids of each part: one, but with ``mean``.
    """
    if len(row) <= limit or truncate == "error":
        return [list(row)]
    if truncate == "end" or limit <= head:
        return [list(row[:limit])]
    first, rest, size = list(row[:head]), row[head:], limit - head
    if truncate == "start":
        return [first + list(rest[-size:])]
    return [first + list(rest[at : at + size]) for at in range(0, len(rest), size)]


def split_template(template: str) -> tuple[str, str]:
    """Return a template's prefix and suffix: the words before the text and after it."""
    prefix, suffix = template.split(TEXT)
    return prefix, suffix


def too_long(tokens: int, limit: int) -> str:
    """Say that a text is too long."""
    return (
        f"a text has {tokens:,} tokens, this model embeds up to {limit:,}: cut it up, or set truncate to end, start or"
        " mean"
    )


_PROBE = "\n"
"""Stands before words that continue a text."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for texts to embed. A control token's name in a user's text is read as text, not as the token.

    Template and text are tokenised apart, so that a text has the same ids under every template.

    Attributes:
        tokenizer: The base model's tokenizer.
        special_ids: Ids that no text may contain.
        template: The template around every text.
    """

    tokenizer: PreTrainedTokenizerBase
    special_ids: frozenset[int]
    template: str = PLAIN

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids of the template's words before a text."""
        return self._template_ids(split_template(self.template)[0])

    @cached_property
    def suffix_ids(self) -> list[int]:
        """Ids of the template's words after a text."""
        return self._template_ids(split_template(self.template)[1], behind=True)

    @property
    def bos_ids(self) -> list[int]:
        """Ids that the tokenizer puts before every text: a BOS token in most models, or none."""
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []

    @property
    def overhead(self) -> int:
        """How many tokens of a row are not the text's."""
        return len(self.bos_ids) + len(self.prefix_ids) + len(self.suffix_ids)

    def __call__(self, texts: Sequence[str], *, max_tokens: int | None) -> list[list[int]]:
        """Tokenise texts to embed: BOS, prefix, text, suffix.

        Args:
            texts: The texts.
            max_tokens: Most tokens of a row; the text is cut at its end to fit. None: no limit.

        Returns:
            Ids of each text.
        """
        if not texts:
            return []
        start = self.bos_ids + self.prefix_ids
        limit = None if max_tokens is None else max(0, max_tokens - len(start) - len(self.suffix_ids))
        return [start + row + self.suffix_ids for row in self.tokenize_plain(texts, max_tokens=limit)]

    def split(
        self, texts: Sequence[str], *, max_tokens: int, truncate: Truncate, prompt: str = ""
    ) -> tuple[list[list[list[int]]], list[bool]]:
        """Tokenise texts to embed, and make them fit.

        Args:
            texts: The texts.
            max_tokens: Most tokens of a row.
            truncate: What becomes of a longer text.
            prompt: What the texts begin with; it stands before every part.

        Returns:
            The rows of each text (several with ``mean``, else one), and which texts were too long.

        Raises:
            ValueError: A text is too long, and ``truncate`` is ``error``.
        """
        require_truncate(truncate)
        start = self.bos_ids + self.prefix_ids
        limit = max(0, max_tokens - len(start) - len(self.suffix_ids))
        plain = self.tokenize_plain([prompt + text for text in texts])
        head = len(self.tokenize_plain([prompt])[0]) if prompt else 0
        long = [len(row) > limit for row in plain]
        if truncate == "error" and any(long):
            raise ValueError(too_long(len(plain[long.index(True)]), limit))
        parts = [truncate_row(row, limit, truncate, head=head) for row in plain]
        return [[start + part + self.suffix_ids for part in rows] for rows in parts], long

    def tokenize_plain(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[list[int]]:
        """Tokenise texts alone, without BOS and template.

        Args:
            texts: The texts.
            max_tokens: Most tokens of a text, which is cut at its end. None: no limit.

        Returns:
            Ids of each text.
        """
        if not texts:
            return []
        behind = bool(split_template(self.template)[0])
        rows = self._tokenize([replace_surrogates(text) for text in texts], behind=behind, split_special_tokens=True)
        return [row[:max_tokens] for row in rows]

    def _tokenize(self, texts: Sequence[str], *, behind: bool, **options: Any) -> list[list[int]]:
        """Ids of texts. ``behind`` other words the tokenizer puts no space before a text that has none."""
        options = {"add_special_tokens": False, "verbose": False, **options}
        alone: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"]
        if not (behind and self._puts_space_before):
            return alone
        probe = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        joined = self.tokenizer([_PROBE + text for text in texts], **options)["input_ids"]
        return [
            row[len(probe) :] if row[: len(probe)] == probe else own for row, own in zip(joined, alone, strict=True)
        ]

    @cached_property
    def _puts_space_before(self) -> bool:
        """Whether the tokenizer puts a space before whatever it gets, as that of Llama 2 does."""
        probe, joined, alone = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_PROBE, _PROBE + "a", "a")
        )
        return bool(joined[: len(probe)] == probe and joined[len(probe) :] != alone)

    def tokenize_prompts(self, texts: Sequence[str], *, add_special_tokens: bool, vocab_size: int) -> list[list[int]]:
        """Tokenise prompts to continue, as the base's own tokenizer does.

        Args:
            texts: The prompts.
            add_special_tokens: Add what the tokenizer puts around a text.
            vocab_size: Rows of the embedding table. A special token beyond it means nothing to the base, so that its
                name is read as text.

        Returns:
            Ids of each prompt.
        """
        rows: list[list[int]] = self.tokenizer(
            [replace_surrogates(text) for text in texts], add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        for index, row in enumerate(rows):
            if any(i >= vocab_size for i in row):
                rows[index] = (self.bos_ids if add_special_tokens else []) + self.tokenize_plain([texts[index]])[0]
        return rows

    def _template_ids(self, words: str, *, behind: bool = False) -> list[int]:
        """Ids of the template's own words. Control tokens in it are control tokens, but for the special tokens."""
        if not words:
            return []
        ids = self._tokenize([words], behind=behind)[0]
        if self.special_ids.isdisjoint(ids):
            return ids
        return self._tokenize([words], behind=behind, split_special_tokens=True)[0]
