"""The running batch: every step gives each sequence its next token; sequences come and go between steps.

    position    0 ... T         a row's tokens stand at the right; what is left of them is padding, masked
    row 0       . . . a a a a
    row 1       . . . . . b b   position ids are counted for each row by itself, so a row may start anywhere:
    row 2       c c c c c c c   a text's special tokens alone (recovery) have the positions after the text

transformers' continuous batching was tried first (docs/log/). It was no faster than this on a CPU. It switches the
model to its own attention, under which nothing can be embedded beside it, and it has no seed for a single sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemify.model.kv_cache import CachedText, RunningCache, cache_argument, from_key_values, key_values, new_full_cache

_MIN_TRIM = 64  # positions of padding in all rows


class RunningBatch:
    """The KV cache and the next-token logits of all running sequences, one row each."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self._reset()

    def _reset(self) -> None:
        self._cache = RunningCache(self.lm)  # a new one: the memory of former rows is free
        self._lengths: list[int] = []
        self._positions: list[int] = []
        self.logits_BV = torch.empty(0, 0)
        """Logits of each row's next token."""

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def padded_length(self) -> int:
        """Positions of the cache, padding included."""
        return self._cache.length if self._lengths else 0

    def add(self, text: CachedText, logits_BV: Tensor, *, position: int | None = None) -> None:
        """Append a row that continues a text.

        Args:
            text: what has run, one row.
            logits_BV: logits of its next token, one row.
            position: position id of its next token; None: right after the text.
        """
        T = text.mask_BT.shape[1]
        self._cache.add_row(key_values(text.cache))
        self._lengths.append(T)
        self._positions.append(T if position is None else position)
        self.logits_BV = torch.cat([self.logits_BV, logits_BV]) if len(self) > 1 else logits_BV

    def remove(self, row: int) -> None:
        """Remove a row; the last row takes its number."""
        for listed in (self._lengths, self._positions):
            listed[row] = listed[-1]
            listed.pop()
        if not self._lengths:
            self._reset()
            return
        self._cache.remove_row(row)
        rows = list(range(len(self) + 1))
        rows[row] = rows[-1]
        self.logits_BV = self.logits_BV[rows[:-1]]
        if (spare := self.padded_length - max(self._lengths)) >= max(_MIN_TRIM, self.padded_length // 4):
            self._cache.trim_left(spare)

    def step(self, tokens: Sequence[int]) -> None:
        """Run one token for each row, and keep the logits of the next ones."""
        device = self.lm.device
        lengths_B = torch.tensor(self._lengths, device=device) + 1
        positions_T = torch.arange(self.padded_length + 1, device=device)
        out = self.lm(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=(positions_T >= positions_T[-1] + 1 - lengths_B[:, None]).long(),
            position_ids=torch.tensor(self._positions, device=device)[:, None],
            **cache_argument(self._cache),
            use_cache=True,
        )
        self._lengths = [n + 1 for n in self._lengths]
        self._positions = [p + 1 for p in self._positions]
        self.logits_BV = out.logits[:, -1]

    def copy_row(self, row: int) -> CachedText:
        """Copy all that a row has run."""
        length = self._lengths[row]
        cache = from_key_values(self.lm, self._cache.copy_row(row, length), into=new_full_cache(self.lm))
        return CachedText(cache, torch.ones(1, length, dtype=torch.bool, device=self.lm.device))
