"""Rows: where the special tokens go in a tokenised text, and what each column of a row is.

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
ROW_KINDS: tuple[RowKind, ...] = ("raw", "split", "reconstruction", "summary", "soft_prompt")

IGNORED = -100
"""Label of a column that is no prediction target, as in torch and transformers."""


class Segment(IntEnum):
    """What one column of a row is. The mask (mask.py) is a function of two of these."""

    PAD = 0
    TEXT = 1  # a raw row, or the prefix of a row with special tokens
    HIDDEN = 2  # prefix that the special tokens may not see: a contrastive view by masking
    SPECIAL = 3
    SUFFIX = 4


@dataclass(frozen=True)
class Row:
    """One tokenised training row: ``prefix`` ids, then (unless raw) the special tokens, then ``suffix`` ids."""

    kind: RowKind
    prefix: tuple[int, ...]
    suffix: tuple[int, ...] = ()

    @property
    def special(self) -> bool:
        """Whether special tokens stand between prefix and suffix."""
        return self.kind != "raw"


@dataclass(frozen=True)
class RowInputs:
    """A row laid out column by column: four lists of equal length T.

    ``labels`` are unshifted, as transformers wants them: column t holds its own id if that id is to be predicted
    (at column t - 1), else IGNORED. Special tokens are never a target; the first suffix token is, at the last special.
    """

    ids: list[int]
    segments: list[int]
    positions: list[int]
    labels: list[int]


def raw_row(text: Sequence[int]) -> Row:
    return Row("raw", tuple(text))


def split_row(text: Sequence[int], at: int) -> Row:
    """Cut ``text`` before token ``at``; both parts must be non-empty."""
    if not 0 < at < len(text):
        raise ValueError(f"cannot split {len(text)} tokens at {at}: the place must lie in 1..{len(text) - 1}")
    return Row("split", tuple(text[:at]), tuple(text[at:]))


def reconstruction_row(text: Sequence[int], *, head: Sequence[int] = (), end: Sequence[int] = ()) -> Row:
    """``head text S text end``: ``head`` is what the tokenizer puts first (a BOS), ``end`` tells decoding to stop."""
    return Row("reconstruction", (*head, *text), (*text, *end))


def summary_row(context: Sequence[int], summary: Sequence[int]) -> Row:
    return Row("summary", tuple(context), tuple(summary))


def soft_prompt_row(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    return Row("soft_prompt", tuple(prompt), tuple(answer))


def random_split(length: int, rng: Random) -> int:
    """A uniform place to cut ``length`` tokens into two non-empty parts."""
    return rng.randrange(1, length)


def special_positions(start: int, k: int, *, shared: bool) -> list[int]:
    """Position ids of k special tokens after ``start`` tokens.

    Shared (the default of gemify): all get ``start``. As they do not see each other, k tokens then equal k separate
    requests ``text s_i`` exactly, so an engine that knows nothing of GEM can serve them. Consecutive: the paper's
    "run on as usual".
    """
    return [start] * k if shared else list(range(start, start + k))


def suffix_start(prefix_length: int, k: int, *, shared: bool) -> int:
    """Position id of the first suffix token: one past the last special token."""
    return prefix_length + (1 if shared else k)


def build_inputs(row: Row, special_ids: Sequence[int], *, shared_position: bool = True) -> RowInputs:
    """Lay a row out for a single masked forward pass."""
    m, k = len(row.prefix), len(special_ids)
    if not row.special:
        return RowInputs(list(row.prefix), [int(Segment.TEXT)] * m, list(range(m)), list(row.prefix))
    n, start = len(row.suffix), suffix_start(m, k, shared=shared_position)
    return RowInputs(
        ids=[*row.prefix, *special_ids, *row.suffix],
        segments=[int(Segment.TEXT)] * m + [int(Segment.SPECIAL)] * k + [int(Segment.SUFFIX)] * n,
        positions=[*range(m), *special_positions(m, k, shared=shared_position), *range(start, start + n)],
        labels=[*row.prefix, *[IGNORED] * k, *row.suffix],
    )
