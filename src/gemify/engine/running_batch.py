"""Answers that are written together: every step gives each of them its next token; rows come and go between steps.

    columns     0 ... T         a row's own columns are at the right; what is left of them is padding, unseen
    row 0       . . . a a a a
    row 1       . . . . . b b   positions are counted for each row by itself, so a row may start anywhere:
    row 2       c c c c c c c   a text's special tokens alone (recovery) stand at the end of the text

transformers' continuous batching was tried first (docs/log/): no slower than this on a CPU, but it sets the model to an
attention of its own, under which nothing can be embedded beside it, and knows no seed for a single answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemify.model.forward import CachedText
from gemify.model.kv_cache import RunningCache, from_key_values, key_values, new_full_cache

_WORTH_TRIMMING = 64  # columns of padding that all rows share


class Decoding:
    """The rows being written. ``logits_BV`` are of each row's next token."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self._reset()

    def _reset(self) -> None:
        self._cache = RunningCache(self.lm)  # and with it all memory of rows that were
        self._lengths: list[int] = []
        self._positions: list[int] = []
        self.logits_BV = torch.empty(0, 0)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def columns(self) -> int:
        return self._cache.columns if self._lengths else 0

    def join(self, text: CachedText, logits_BV: Tensor, *, position: int | None = None) -> None:
        """Add one text as the last row. Its next token stands at ``position`` (None: after the text)."""
        T = text.mask_BT.shape[1]
        self._cache.join(key_values(text.cache))
        self._lengths.append(T)
        self._positions.append(T if position is None else position)
        self.logits_BV = torch.cat([self.logits_BV, logits_BV]) if len(self) > 1 else logits_BV

    def leave(self, row: int) -> None:
        """Take a row out; the last row takes its number."""
        for listed in (self._lengths, self._positions):
            listed[row] = listed[-1]
            listed.pop()
        if not self._lengths:
            self._reset()
            return
        self._cache.leave(row)
        rows = list(range(len(self) + 1))
        rows[row] = rows[-1]
        self.logits_BV = self.logits_BV[rows[:-1]]
        if (spare := self.columns - max(self._lengths)) >= max(_WORTH_TRIMMING, self.columns // 4):
            self._cache.trim(spare)

    def step(self, tokens: Sequence[int]) -> None:
        """Run one token a row."""
        device = self.lm.device
        lengths_B = torch.tensor(self._lengths, device=device) + 1
        columns = torch.arange(self.columns + 1, device=device)
        out = self.lm(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=(columns >= columns[-1] + 1 - lengths_B[:, None]).long(),
            position_ids=torch.tensor(self._positions, device=device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._lengths = [n + 1 for n in self._lengths]
        self._positions = [p + 1 for p in self._positions]
        self.logits_BV = out.logits[:, -1]

    def text(self, row: int) -> CachedText:
        """A copy of all that a row has run."""
        length = self._lengths[row]
        cache = from_key_values(self.lm, self._cache.row(row, length), into=new_full_cache(self.lm))
        return CachedText(cache, torch.ones(1, length, dtype=torch.bool, device=self.lm.device))
