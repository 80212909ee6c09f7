"""Prefix cache: the KV of prompts and answers that have run, for requests that begin with the same tokens.

A chat's next request begins with the whole conversation before it; requests of one application begin with its system
message. The cache is bounded in bytes and evicts the least recently used. It is exact: equal tokens at equal positions
have equal KV.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from gemify.model.forward import CachedText
from gemify.model.kv_cache import from_key_values, new_full_cache, size_in_bytes, slice_key_values

_MIN_TOKENS = 16  # shorter prefixes are not worth keeping

Key = tuple[str, tuple[int, ...]]


class PrefixCache:
    """KV caches by their token ids.

    Args:
        lm: the model whose caches these are.
        max_bytes: memory for all of them together.
    """

    def __init__(self, lm: PreTrainedModel, max_bytes: int) -> None:
        self._lm, self._max_bytes = lm, max_bytes
        self._entries: OrderedDict[Key, tuple[np.ndarray, CachedText]] = OrderedDict()
        self.nbytes = 0
        """Bytes held now."""

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, ids: Sequence[int], cache_salt: str = "") -> CachedText:
        """Return the longest prefix of ``ids`` that has run, maybe an empty one, never all of ``ids``.

        Args:
            ids: a prompt.
            cache_salt: only entries inserted with the same salt match: others must not learn of each other's requests.
        """
        key, length = self._find(ids, cache_salt)
        if key is None:
            return self._text(new_full_cache(self._lm), 0)
        self._entries.move_to_end(key)
        pairs = slice_key_values(self._entries[key][1].cache, 0, length)
        return self._text(from_key_values(self._lm, pairs, into=new_full_cache(self._lm)), length)

    def would_match_after(self, ids: Sequence[int], others: Sequence[Sequence[int]], cache_salt: str = "") -> bool:
        """Whether a longer prefix of ``ids`` would match once one of the ``others`` has run."""
        longest = max(_MIN_TOKENS - 1, self._find(ids, cache_salt)[1])
        wanted = np.asarray(ids[:-1])
        return any(_common_length(wanted, np.asarray(other)) > longest for other in others)

    def insert(self, ids: Sequence[int], text: CachedText, cache_salt: str = "") -> None:
        """Insert the KV of ``ids``, in place of entries that are prefixes of it."""
        size = size_in_bytes(text.cache)
        if len(ids) < _MIN_TOKENS or size > self._max_bytes:
            return
        new = np.asarray(ids)
        for key, (kept, _) in list(self._entries.items()):
            if key[0] == cache_salt and (common := _common_length(new, kept)) == min(len(new), len(kept)):
                if common == len(new):
                    self._entries.move_to_end(key)
                    return
                self._evict(key)
        self._entries[cache_salt, tuple(ids)] = (new, text)
        self.nbytes += size
        while self.nbytes > self._max_bytes:
            self._evict(next(iter(self._entries)))

    def _find(self, ids: Sequence[int], cache_salt: str) -> tuple[Key | None, int]:
        """Find the entry with the longest common prefix; (None, 0) if no prefix is long enough."""
        wanted = np.asarray(ids[:-1])
        best, length = None, _MIN_TOKENS - 1
        for key, (kept, _) in self._entries.items():
            if key[0] == cache_salt and (common := _common_length(wanted, kept)) > length:
                best, length = key, common
        return (None, 0) if best is None else (best, length)

    def _evict(self, key: Key) -> None:
        self.nbytes -= size_in_bytes(self._entries.pop(key)[1].cache)

    def _text(self, cache: DynamicCache, length: int) -> CachedText:
        return CachedText(cache, torch.ones(1, length, dtype=torch.bool, device=self._lm.device))


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two rows of token ids."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
