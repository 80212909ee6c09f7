"""Two views of one text for the contrastive loss (GEM, Section 3.3: "randomly dropping tokens of its prefix").

The paper leaves open how a token is dropped. Four ways, all on token ids:

    delete  the token is taken out of the text: each view is a text of its own, with its own forward pass
    mask    the token stays, but the special tokens may not see it: two views share one forward pass of the text
    span    a random run of tokens is kept, the rest deleted: views from differing parts of the text
    halves  the two views are the two sides of one random cut near the middle: nothing is shared

Where the data holds pairs (an anchor and its positive), these are the two views, and tokens are dropped from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

ViewKind = Literal["delete", "mask", "span", "halves"]
VIEW_KINDS: tuple[ViewKind, ...] = ("delete", "mask", "span", "halves")


@dataclass(frozen=True)
class View:
    """One view: the ids that run through the model, and which of them the special tokens see."""

    ids: tuple[int, ...]
    seen: tuple[bool, ...]
    recurs: bool = True
    """False if the ids were drawn at random: another epoch has others of the same text."""


@dataclass(frozen=True)
class Views:
    """How views are made. ``rate``: share of tokens dropped, in [0, 1). ``both``: drop from both views, else from one.

    At least one token is always left. With rate 0 and a way other than ``halves`` both views are the text itself, and
    only dropout inside the model tells them apart (SimCSE).
    """

    kind: ViewKind = "delete"
    rate: float = 0.1
    both: bool = False

    def __post_init__(self) -> None:
        if self.kind not in VIEW_KINDS:
            raise ValueError(f"unknown view {self.kind!r}: choose one of {', '.join(VIEW_KINDS)}")
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"the drop rate must lie in [0, 1), got {self.rate}")

    def of_text(self, text: Sequence[int], rng: Random) -> tuple[View, View]:
        """Make two views of one non-empty text."""
        if not text:
            raise ValueError("a view needs at least one token, got an empty text")
        if self.kind == "halves":
            return self._halves(text, rng)
        first = self._drop(text, rng) if self.both else full_view(text)
        return first, self._drop(text, rng)

    def of_pair(self, anchor: Sequence[int], positive: Sequence[int], rng: Random) -> tuple[View, View]:
        """Make two views of a pair of non-empty texts: the texts, less dropped tokens. ``halves`` drops nothing."""
        if not anchor or not positive:
            raise ValueError("a view needs at least one token, got an empty text")
        if self.kind == "halves":
            return full_view(anchor), full_view(positive)
        first = self._drop(anchor, rng) if self.both else full_view(anchor)
        return first, self._drop(positive, rng)

    def _drop(self, text: Sequence[int], rng: Random) -> View:
        n = len(text)
        if self.kind == "span":
            length = max(1, round(n * (1.0 - self.rate)))
            start = rng.randrange(n - length + 1)
            return replace(full_view(text[start : start + length]), recurs=length == n)
        kept = [rng.random() >= self.rate for _ in range(n)]
        if not any(kept):
            kept[rng.randrange(n)] = True
        if self.kind == "mask":
            return View(tuple(text), tuple(kept))
        return replace(full_view([t for t, keep in zip(text, kept, strict=True) if keep]), recurs=all(kept))

    @staticmethod
    def _halves(text: Sequence[int], rng: Random) -> tuple[View, View]:
        n = len(text)
        if n == 1:
            return full_view(text), full_view(text)
        low, high = max(1, n // 3), max(1, n - n // 3)
        cut = min(n - 1, rng.randint(low, high))
        return replace(full_view(text[:cut]), recurs=False), replace(full_view(text[cut:]), recurs=False)


def full_view(text: Sequence[int]) -> View:
    """Return the view that is the text itself, all of it seen."""
    return View(tuple(text), (True,) * len(text))
