"""What has run already: KV caches of prompts and answers, for requests that begin with the same tokens.

A chat's next turn begins with all of the turns before; requests of one application begin with its system message. Kept
in memory up to a budget, the least recently used go first. Exact: equal tokens at equal places have equal KV.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from gemify.model.forward import CachedText
from gemify.model.kv_cache import from_key_values, new_full_cache, size_in_bytes, slice_key_values

_WORTH_KEEPING = 16  # tokens

Key = tuple[str, tuple[int, ...]]


class Prefixes:
    """Caches by the tokens they are of. ``scope`` keeps apart those who must not learn of each other's requests."""

    def __init__(self, lm: PreTrainedModel, budget_bytes: int) -> None:
        self._lm, self._budget = lm, budget_bytes
        self._kept: OrderedDict[Key, tuple[np.ndarray, CachedText]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, ids: Sequence[int], scope: str = "") -> CachedText:
        """The longest beginning of ``ids`` that has run, maybe empty, never all of them."""
        best, length = self._best(ids, scope)
        if best is None:
            return self._text(new_full_cache(self._lm), 0)
        self._kept.move_to_end(best)
        pairs = slice_key_values(self._kept[best][1].cache, 0, length)
        return self._text(from_key_values(self._lm, pairs, into=new_full_cache(self._lm)), length)

    def better_after(self, ids: Sequence[int], others: Sequence[Sequence[int]], scope: str = "") -> bool:
        """Whether more of ``ids`` could be reused once one of the ``others`` has run."""
        most = max(_WORTH_KEEPING - 1, self._best(ids, scope)[1])
        wanted = np.asarray(ids[:-1])
        return any(_shared(wanted, np.asarray(other)) > most for other in others)

    def _best(self, ids: Sequence[int], scope: str) -> tuple[Key | None, int]:
        """What shares the longest beginning with ``ids``, and how long it is; none that is not worth it."""
        wanted = np.asarray(ids[:-1])
        best, length = None, _WORTH_KEEPING - 1
        for key, (kept, _) in self._kept.items():
            if key[0] == scope and (shared := _shared(wanted, kept)) > length:
                best, length = key, shared
        return (None, 0) if best is None else (best, length)

    def keep(self, ids: Sequence[int], text: CachedText, scope: str = "") -> None:
        """Keep what has run of ``ids``, in place of what it goes on from."""
        size = size_in_bytes(text.cache)
        if len(ids) < _WORTH_KEEPING or size > self._budget:
            return
        new = np.asarray(ids)
        for key, (kept, _) in list(self._kept.items()):
            if key[0] == scope and (shared := _shared(new, kept)) == min(len(new), len(kept)):
                if shared == len(new):
                    self._kept.move_to_end(key)
                    return
                self._drop(key)
        self._kept[scope, tuple(ids)] = (new, text)
        self.nbytes += size
        while self.nbytes > self._budget:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        self.nbytes -= size_in_bytes(self._kept.pop(key)[1].cache)

    def _text(self, cache: DynamicCache, length: int) -> CachedText:
        return CachedText(cache, torch.ones(1, length, dtype=torch.bool, device=self._lm.device))


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
