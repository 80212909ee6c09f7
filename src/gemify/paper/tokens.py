"""Rows: where the special tokens go in a tokenised text, and what each position of a row is.

This file says what a training row *is* (GEM, Sections 3.1 and 3.2). It knows token ids only; which id is a special
token, and how a text becomes ids, is decided elsewhere.

    raw             text
    split           prefix S suffix           the text cut at a random place
    reconstruction  text S text
    summary         context S summary
    soft prompt     prompt S answer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import Literal

RowKind = Literal["raw", "split", "reconstruction", "summary", "soft_prompt"]

IGNORED = -100
"""Label of a position that is no prediction target, as in torch and transformers."""


class Segment(IntEnum):
    """What one position of a row is. The mask (mask.py) is a function of two of these."""

    PAD = 0
    TEXT = 1  # a raw row, or the prefix of a row with special tokens
    HIDDEN = 2  # a prefix token that the special tokens may not see: a contrastive view by masking
    SPECIAL = 3
    SUFFIX = 4


@dataclass(frozen=True)
class Row:
    """One tokenised training row: ``prefix`` ids, then (unless raw) the special tokens, then ``suffix`` ids."""

    kind: RowKind
    prefix: tuple[int, ...]
    suffix: tuple[int, ...] = ()
    learned: tuple[bool, ...] | None = None
    """Which tokens of prefix and suffix are prediction targets. None: all."""

    @property
    def prefix_labels(self) -> list[int]:
        """Ids of the prefix, IGNORED where they are no target."""
        return self._labels(self.prefix, 0)

    @property
    def suffix_labels(self) -> list[int]:
        """Ids of the suffix, IGNORED where they are no target."""
        return self._labels(self.suffix, len(self.prefix))

    def _labels(self, ids: tuple[int, ...], start: int) -> list[int]:
        if self.learned is None:
            return list(ids)
        flags = self.learned[start : start + len(ids)]
        return [token if flag else IGNORED for token, flag in zip(ids, flags, strict=True)]

    @property
    def has_special_tokens(self) -> bool:
        """Whether special tokens stand between prefix and suffix."""
        return self.kind != "raw"


@dataclass(frozen=True)
class RowInputs:
    """A row as model inputs: four lists of equal length T.

    ``labels`` are unshifted, as in transformers: position t holds its own id if that id is to be predicted (at position
    t - 1), else IGNORED. Special tokens are never a target; the first suffix token is one, predicted at the last
    special token.
    """

    ids: list[int]
    segments: list[int]
    positions: list[int]
    labels: list[int]


def raw_row(text: Sequence[int]) -> Row:
    """Return a row of text alone."""
    return Row("raw", tuple(text))


def split_row(text: Sequence[int], at: int) -> Row:
    """Return a row whose suffix starts at token ``at`` of the text; ValueError if prefix or suffix would be empty."""
    if not 0 < at < len(text):
        raise ValueError(f"cannot split {len(text)} tokens at {at}: at must lie in 1..{len(text) - 1}")
    return Row("split", tuple(text[:at]), tuple(text[at:]))


def reconstruction_row(text: Sequence[int], *, bos_ids: Sequence[int] = (), end_ids: Sequence[int] = ()) -> Row:
    """Return the row ``BOS text S text END``: the suffix repeats the prefix."""
    return Row("reconstruction", (*bos_ids, *text), (*text, *end_ids))


def summary_row(context: Sequence[int], summary: Sequence[int]) -> Row:
    """Return the row ``context S summary``."""
    return Row("summary", tuple(context), tuple(summary))


def soft_prompt_row(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    """Return the row ``prompt S answer``."""
    return Row("soft_prompt", tuple(prompt), tuple(answer))


def random_split(length: int, rng: Random) -> int:
    """Draw where to split ``length`` tokens into two non-empty parts, uniformly."""
    return rng.randrange(1, length)


def special_positions(start: int, k: int, *, shared: bool) -> list[int]:
    """Return the position ids of k special tokens after ``start`` tokens.

    Shared (gemify's default): all get ``start``. They do not see each other, so k special tokens equal k separate
    requests ``text s_i``, and an engine that knows nothing of GEM can serve them. Not shared: the paper's consecutive
    ids.
    """
    return [start] * k if shared else list(range(start, start + k))


def suffix_start(prefix_length: int, k: int, *, shared: bool) -> int:
    """Return the position id of the first suffix token: one past the last special token."""
    return prefix_length + (1 if shared else k)


def build_inputs(row: Row, special_ids: Sequence[int], *, shared_position: bool = True) -> RowInputs:
    """Build the inputs of a row for a single masked forward pass (GEM, Section 3.2).

    Args:
        row: The row.
        special_ids: Ids of the k special tokens, which are inserted unless the row is raw.
        shared_position: Give all special tokens the same position id.
    """
    m, k = len(row.prefix), len(special_ids)
    if not row.has_special_tokens:
        return RowInputs(list(row.prefix), [int(Segment.TEXT)] * m, list(range(m)), row.prefix_labels)
    n, start = len(row.suffix), suffix_start(m, k, shared=shared_position)
    return RowInputs(
        ids=[*row.prefix, *special_ids, *row.suffix],
        segments=[int(Segment.TEXT)] * m + [int(Segment.SPECIAL)] * k + [int(Segment.SUFFIX)] * n,
        positions=[*range(m), *special_positions(m, k, shared=shared_position), *range(start, start + n)],
        labels=[*row.prefix_labels, *[IGNORED] * k, *row.suffix_labels],
    )
