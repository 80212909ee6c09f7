"""Operations on KV caches: the only file that knows how transformers stores one.

A text's cache is computed once (a `Prefill` holds it). Special tokens and generation continue a *fork*: another cache
object over the same tensors, which transformers grows by concatenation, so the original is never written to. The *tail*
is a cache of the last k positions alone: all that a suffix may know of a text.

The prefix cache holds the KV of prompts and answers that have run, for requests that begin with the same tokens. A
chat's next request begins with the whole conversation before it; requests of one application begin with its system
message. The cache is bounded in bytes and evicts the least recently used. It is exact: equal tokens at equal positions
have equal KV.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The cache in transformers' arguments and outputs: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on."""


def cache_argument(cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return the keyword argument that gives a cache to a model's forward, to `generate` or to a model output."""
    return {CACHE_NAME: cache}


def output_cache(output: Any) -> DynamicCache:
    """Return the cache in a model's output or in that of `generate`."""
    cache: DynamicCache = output[CACHE_NAME]
    return cache


def new_cache(lm: PreTrainedModel) -> DynamicCache:
    """Return an empty cache with the model's layer types (full, sliding)."""
    return DynamicCache(config=lm.config)


def new_full_cache(lm: PreTrainedModel) -> DynamicCache:
    """Return an empty cache that keeps all positions. Sliding windows then hide old ones by their mask alone."""
    cache = new_cache(lm)
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache


def fork(cache: DynamicCache, *, layers: int | None = None) -> DynamicCache:
    """Return a cache that grows without changing ``cache``, of its first layers or all. Copies no tensor."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers[:layers]]
    return twin


def tail(lm: PreTrainedModel, cache: DynamicCache, k: int) -> DynamicCache:
    """Return a new cache of the last ``k`` positions of ``cache``. Gradients flow through."""
    kept = new_cache(lm)
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized and layer.keys.numel():  # layers that share another layer's KV hold none
            kept.update(layer.keys[..., -k:, :], layer.values[..., -k:, :], index)
    return kept


def select(cache: DynamicCache, rows: Tensor | list[int]) -> DynamicCache:
    """Return a cache of some of the rows, in the given order; rows may repeat."""
    index = torch.as_tensor(rows)
    chosen = fork(cache)
    for layer in chosen.layers:
        if layer.is_initialized and layer.keys.numel():
            layer.keys = layer.keys[index.to(layer.keys.device)]
            layer.values = layer.values[index.to(layer.values.device)]
    return chosen


def key_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values, [B, heads, T, head_dim] each, of every layer that holds any."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized and layer.keys.numel()]


def size_in_bytes(cache: DynamicCache) -> int:
    """Return the memory of the cache's tensors, in bytes."""
    return sum(t.numel() * t.element_size() for pair in key_values(cache) for t in pair)


def concatenate_rows(lm: PreTrainedModel, caches: list[DynamicCache]) -> DynamicCache:
    """Return one cache of all rows of several caches of equal length, in order."""
    if len(caches) == 1:
        return caches[0]
    joined = new_cache(lm)
    for index, layer in enumerate(caches[0].layers):
        if layer.is_initialized and layer.keys.numel():
            keys = torch.cat([c.layers[index].keys for c in caches])
            joined.update(keys, torch.cat([c.layers[index].values for c in caches]), index)
    return joined


def join_rows(
    lm: PreTrainedModel, parts: Sequence[tuple[Sequence[int], list[tuple[Tensor, Tensor]]]], rows: int, length: int
) -> DynamicCache:
    """Return one cache of all rows of several caches, padded on the left with zeros. It keeps all positions.

    The parts are emptied layer by layer, so that memory holds them once.

    Args:
        lm: The model.
        parts: The numbers of each part's rows in the whole, and its `key_values`.
        rows: Rows of the whole.
        length: Positions of the longest row.
    """
    joined = new_full_cache(lm)
    device = parts[0][1][0][0].device
    numbered = [(torch.tensor(numbers).to(device), pairs) for numbers, pairs in parts]  # a GPU waits once a part
    for layer in joined.layers:
        if not parts[0][1]:  # an early exit: the later layers have no KV
            break
        whole = [t.new_zeros(rows, t.shape[1], length, t.shape[-1]) for t in parts[0][1][0]]
        for index_N, pairs in numbered:
            for joint, part in zip(whole, pairs.pop(0), strict=True):
                joint[index_N, :, length - part.shape[-2] :] = part
        layer.lazy_initialization(*whole)
        layer.keys, layer.values = whole
    return joined


def from_key_values(
    lm: PreTrainedModel, pairs: list[tuple[Tensor, Tensor]], *, into: DynamicCache | None = None
) -> DynamicCache:
    """Return the cache of which `key_values` gave the tensors.

    Args:
        lm: The model.
        pairs: Keys and values of every layer.
        into: An empty cache to fill. None: a new one.

    Raises:
        ValueError: The number of layers is not this model's.
    """
    made = new_cache(lm) if into is None else into
    if len(pairs) != len(made.layers):
        raise ValueError(f"a cache of {len(made.layers)} layers is wanted, got {len(pairs)}: it is another model's")
    for index, (keys, values) in enumerate(pairs):
        made.update(keys, values, index)
    return made


def keeps_all_positions(cache: DynamicCache) -> bool:
    """Return whether every layer keeps all positions. Sliding windows drop old ones."""
    return not any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def slice_key_values(cache: DynamicCache, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of the positions from ``start`` to ``stop``.

    ValueError if sliding windows drop old ones.
    """
    if not keeps_all_positions(cache):
        raise ValueError("this model's sliding windows drop old positions: its cache cannot be sliced")
    return [(keys[..., start:stop, :], values[..., start:stop, :]) for keys, values in key_values(cache)]


class RunningCache(DynamicCache):
    """A cache whose rows come and go: B rows of T positions, each row's own ones at the right.

    Keys and values are views of buffers with capacity for more rows and positions. A step writes one position, and a
    row that is added or removed moves one row; `DynamicCache` would copy all of it each time.

    Attributes:
        rows: B, the number of rows.
        length: T, the length of the longest row.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(config=lm.config)
        self.layers: list[Any] = [_GrowingLayer() for _ in new_cache(lm).layers]
        self.rows = self.length = 0

    @classmethod
    def continuing(cls, lm: PreTrainedModel, cache: DynamicCache) -> RunningCache:
        """Return a copy of a cache that keeps all positions, with room for more of them."""
        running = cls(lm)
        for layer, filled in zip(running.layers, cache.layers, strict=True):
            if filled.is_initialized and filled.keys.numel():
                layer.fill((filled.keys, filled.values))
                running.rows, running.length = filled.keys.shape[0], filled.keys.shape[-2]
        return running

    def add_row(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Add a row, given by its `key_values`: [1, heads, its length, head_dim] each."""
        row_length = pairs[0][0].shape[-2]
        length = max(self.length, row_length) if self.rows else row_length
        for layer, pair in zip(self._initialized() or self.layers, pairs, strict=True):
            layer.add_row(pair, self.rows, self.length, length)
        self.rows, self.length = self.rows + 1, length

    def remove_row(self, row: int) -> None:
        """Remove a row. The last row takes its place."""
        self.rows -= 1
        for layer in self._initialized():
            layer.move_row(self.rows, row)
        self._update_views()

    def trim_left(self, count: int) -> None:
        """Drop the first ``count`` positions."""
        for layer in self._initialized():
            layer.trim_left(count)
        self.length -= count
        self._update_views()

    def copy_row(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Return a copy of a row's last ``length`` positions, as `add_row` takes it."""
        return [
            (k[row : row + 1, :, -length:].clone(), v[row : row + 1, :, -length:].clone()) for k, v in key_values(self)
        ]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Append a step's keys and values to a layer, as `DynamicCache` does."""
        out = super().update(*args, **kwargs)
        self.length = out[0].shape[-2]
        return out

    def _initialized(self) -> list[_GrowingLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def _update_views(self) -> None:
        for layer in self._initialized():
            layer.update_views(self.rows, self.length)


class _GrowingLayer(DynamicLayer):
    """Buffers [rows, heads, positions, head_dim] with spare capacity. ``keys`` and ``values`` are the parts in use."""

    def fill(self, pair: tuple[Tensor, Tensor]) -> None:
        rows, _, length, _ = pair[0].shape
        self.lazy_initialization(*pair)
        self.buffers = [_buffer(t, rows, _capacity(length)) for t in pair]
        for buffer, new in zip(self.buffers, pair, strict=True):
            buffer[:, :, :length] = new
        self.update_views(rows, length)

    def add_row(self, pair: tuple[Tensor, Tensor], rows: int, old_length: int, length: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*pair)
            self.buffers = [_buffer(t, 1, _capacity(length)) for t in pair]
        for index, (buffer, new) in enumerate(zip(self.buffers, pair, strict=True)):
            more_rows, longer = rows >= buffer.shape[0], length > buffer.shape[2]
            if more_rows or longer:
                larger = _buffer(
                    new,
                    rows + 1 + rows // 2 if more_rows else buffer.shape[0],
                    _capacity(length) if longer else buffer.shape[2],
                )
                larger[:rows, :, length - old_length : length] = buffer[:rows, :, :old_length] if rows else 0
                self.buffers[index] = buffer = larger
            elif rows and length > old_length:
                buffer[:rows, :, length - old_length : length] = buffer[:rows, :, :old_length].clone()
            buffer[rows, :, : length - new.shape[-2]] = 0  # a former row's values may not have been finite
            buffer[rows, :, length - new.shape[-2] : length] = new[0]
        self.update_views(rows + 1, length)

    def move_row(self, source: int, target: int) -> None:
        if source != target:
            for buffer in self.buffers:
                buffer[target] = buffer[source]

    def trim_left(self, count: int) -> None:
        for index, used in enumerate((self.keys, self.values)):
            kept = used[:, :, count:]
            self.buffers[index] = _buffer(kept, kept.shape[0], _capacity(kept.shape[2]))
            self.buffers[index][:, :, : kept.shape[2]] = kept

    def update_views(self, rows: int, length: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, old_length = self.keys.shape[0], self.keys.shape[-2]
        if self.keys.data_ptr() != self.buffers[0].data_ptr():  # rows chosen or repeated by transformers: no view
            self.fill((self.keys, self.values))
        length = old_length + key_states.shape[-2]
        for index, new in enumerate((key_states, value_states)):
            if length > self.buffers[index].shape[2]:
                larger = _buffer(new, self.buffers[index].shape[0], _capacity(length))
                larger[:rows, :, :old_length] = self.buffers[index][:rows, :, :old_length]
                self.buffers[index] = larger
            self.buffers[index][:rows, :, old_length:length] = new
        self.update_views(rows, length)
        return self.keys, self.values


def _capacity(length: int) -> int:
    """Positions to allocate for ``length`` in use: half as many again."""
    return length + max(64, length // 2)


def _buffer(like: Tensor, rows: int, length: int) -> Tensor:
    """Zeros: masked values must be finite."""
    return like.new_zeros(rows, like.shape[1], length, like.shape[-1])


@dataclass(frozen=True)
class CachedText:
    """A batch of texts that has run."""

    cache: DynamicCache
    mask_BT: Tensor
    """False at padding, [B, T]."""

    def rows(self, rows: Sequence[int]) -> CachedText:
        """Return some of the texts, in the given order; a text may repeat."""
        index = torch.tensor(list(rows), device=self.mask_BT.device)
        return CachedText(select(self.cache, index), self.mask_BT[index])


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
