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
from transformers import PreTrainedModel

from gemify.model.forward import CachedText
from gemify.model.kv_cache import from_key_values, new_full_cache, size_in_bytes, slice_key_values

Key = tuple[str, tuple[int, ...]]


class PrefixCache:
    """KV caches by their token ids.

    Args:
        lm: the model whose caches these are.
        max_bytes: memory for all of them together. None: no limit.
        min_tokens: shorter prefixes are neither kept nor matched.
    """

    def __init__(self, lm: PreTrainedModel, max_bytes: int | None = None, *, min_tokens: int = 16) -> None:
        self._lm, self._max_bytes, self._min_tokens = lm, max_bytes, min_tokens
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
            return empty_text(self._lm)
        self._entries.move_to_end(key)
        return take_prefix(self._lm, self._entries[key][1], length)

    def would_match_after(self, ids: Sequence[int], others: Sequence[Sequence[int]], cache_salt: str = "") -> bool:
        """Whether a longer prefix of ``ids`` would match once one of the ``others`` has run."""
        longest = max(self._min_tokens - 1, self._find(ids, cache_salt)[1])
        wanted = np.asarray(ids[:-1])
        return any(common_prefix_length(wanted, np.asarray(other)) > longest for other in others)

    def insert(self, ids: Sequence[int], text: CachedText, cache_salt: str = "") -> None:
        """Insert the KV of ``ids``, in place of entries that are prefixes of it."""
        size = size_in_bytes(text.cache)
        if len(ids) < self._min_tokens or (self._max_bytes is not None and size > self._max_bytes):
            return
        new = np.asarray(ids)
        for key, (kept, _) in list(self._entries.items()):
            if key[0] == cache_salt and (common := common_prefix_length(new, kept)) == min(len(new), len(kept)):
                if common == len(new):
                    self._entries.move_to_end(key)
                    return
                self._evict(key)
        self._entries[cache_salt, tuple(ids)] = (new, text)
        self.nbytes += size
        while self._max_bytes is not None and self.nbytes > self._max_bytes:
            self._evict(next(iter(self._entries)))

    def _find(self, ids: Sequence[int], cache_salt: str) -> tuple[Key | None, int]:
        """Find the entry with the longest common prefix; (None, 0) if no prefix is long enough."""
        wanted = np.asarray(ids[:-1])
        best, length = None, self._min_tokens - 1
        for key, (kept, _) in self._entries.items():
            if key[0] == cache_salt and (common := common_prefix_length(wanted, kept)) > length:
                best, length = key, common
        return (None, 0) if best is None else (best, length)

    def _evict(self, key: Key) -> None:
        self.nbytes -= size_in_bytes(self._entries.pop(key)[1].cache)


def empty_text(lm: PreTrainedModel) -> CachedText:
    """A text of no tokens, whose cache keeps all positions."""
    return CachedText(new_full_cache(lm), torch.ones(1, 0, dtype=torch.bool, device=lm.device))


def take_prefix(lm: PreTrainedModel, text: CachedText, length: int) -> CachedText:
    """The first ``length`` tokens of a text of one row, with a cache that keeps all positions. Copies no tensor."""
    if not length:
        return empty_text(lm)
    pairs = slice_key_values(text.cache, 0, length)
    return CachedText(from_key_values(lm, pairs, into=new_full_cache(lm)), text.mask_BT[:, :length])


def common_prefix_length(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Number of tokens with which two rows of token ids both begin."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
