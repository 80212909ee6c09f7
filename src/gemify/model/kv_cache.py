"""What GEM does with a KV cache: the only file that knows how transformers stores one.

A text's cache is computed once (a `Prefill` holds it). Special tokens and generation go on from a *fork*: a cache object
of its own over the same tensors, which transformers grows by concatenation, so the original is never written to. The
*tail* is a cache of the last k columns alone: all that a suffix may know of a text.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def new_cache(lm: PreTrainedModel) -> DynamicCache:
    """An empty cache with the layer types (full, sliding) that this model wants."""
    return DynamicCache(config=lm.config)


def new_full_cache(lm: PreTrainedModel) -> DynamicCache:
    """An empty cache that keeps all columns. Sliding windows then hide old ones by their mask alone."""
    cache = new_cache(lm)
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache


def fork(cache: DynamicCache, *, layers: int | None = None) -> DynamicCache:
    """A cache that can be continued without touching ``cache``, of its first layers or all. Copies no tensor."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers[:layers]]
    return twin


def tail(lm: PreTrainedModel, cache: DynamicCache, k: int) -> DynamicCache:
    """A new cache that holds the last ``k`` columns of ``cache`` and nothing else. Gradients flow through."""
    kept = new_cache(lm)
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized and layer.keys.numel():  # layers that share another layer's KV hold none
            kept.update(layer.keys[..., -k:, :], layer.values[..., -k:, :], index)
    return kept


def select(cache: DynamicCache, rows: Tensor | list[int]) -> DynamicCache:
    """A cache of some of the rows, in the given order; rows may repeat."""
    index = torch.as_tensor(rows)
    chosen = fork(cache)
    for layer in chosen.layers:
        if layer.is_initialized and layer.keys.numel():
            layer.keys = layer.keys[index.to(layer.keys.device)]
            layer.values = layer.values[index.to(layer.values.device)]
    return chosen


def key_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, heads, T, head_dim] of every layer that holds any."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized and layer.keys.numel()]


def size_in_bytes(cache: DynamicCache) -> int:
    """Memory of the cache's tensors."""
    return sum(t.numel() * t.element_size() for pair in key_values(cache) for t in pair)


def concatenate_rows(lm: PreTrainedModel, caches: list[DynamicCache]) -> DynamicCache:
    """One cache of all rows of caches of equal length, in order."""
    if len(caches) == 1:
        return caches[0]
    joined = new_cache(lm)
    for index, layer in enumerate(caches[0].layers):
        if layer.is_initialized and layer.keys.numel():
            keys = torch.cat([c.layers[index].keys for c in caches])
            joined.update(keys, torch.cat([c.layers[index].values for c in caches]), index)
    return joined


def from_key_values(
    lm: PreTrainedModel, pairs: list[tuple[Tensor, Tensor]], *, into: DynamicCache | None = None
) -> DynamicCache:
    """The cache that `key_values` took apart, in a new cache or ``into`` one. Layers that hold none stay empty."""
    made = new_cache(lm) if into is None else into
    if len(pairs) != len(made.layers):
        raise ValueError(f"a cache of {len(made.layers)} layers is wanted, got {len(pairs)}: it is another model's")
    for index, (keys, values) in enumerate(pairs):
        made.update(keys, values, index)
    return made


def keeps_all_positions(cache: DynamicCache) -> bool:
    """Whether every layer keeps all columns: sliding windows drop old ones."""
    return not any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def slice_key_values(cache: DynamicCache, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of some of the columns; ValueError where sliding windows have dropped any."""
    if not keeps_all_positions(cache):
        raise ValueError("this model's sliding windows drop old columns: its cache cannot be cut")
    return [(keys[..., start:stop, :], values[..., start:stop, :]) for keys, values in key_values(cache)]


class RunningCache(DynamicCache):
    """A cache whose rows come and go: B rows of T columns, each row's own ones at the right.

    Keys and values are views of buffers with room for more rows and columns, so that a step writes one column and a row
    that comes or goes moves one row; `DynamicCache` would copy all of it each time.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(config=lm.config)
        self.layers: list[Any] = [_RoomyLayer() for _ in new_cache(lm).layers]
        self.rows = self.columns = 0

    def join(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Add a row: `key_values` of it alone, [1, heads, its columns, head_dim] each."""
        length = pairs[0][0].shape[-2]
        columns = max(self.columns, length) if self.rows else length
        for layer, pair in zip(self._holding() or self.layers, pairs, strict=True):
            layer.join(pair, self.rows, self.columns, columns)
        self.rows, self.columns = self.rows + 1, columns

    def leave(self, row: int) -> None:
        """Take a row out; the last row takes its place."""
        self.rows -= 1
        for layer in self._holding():
            layer.move(self.rows, row)
        self._show()

    def trim(self, columns: int) -> None:
        """Drop that many columns at the left."""
        for layer in self._holding():
            layer.trim(columns)
        self.columns -= columns
        self._show()

    def row(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the last ``length`` columns of a row, as `join` takes it."""
        return [
            (k[row : row + 1, :, -length:].clone(), v[row : row + 1, :, -length:].clone()) for k, v in key_values(self)
        ]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        out = super().update(*args, **kwargs)
        self.columns = out[0].shape[-2]
        return out

    def _holding(self) -> list[_RoomyLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def _show(self) -> None:
        for layer in self._holding():
            layer.show(self.rows, self.columns)


class _RoomyLayer(DynamicLayer):
    """Buffers [rows, heads, columns, head_dim] with room, and ``keys`` and ``values``, the part of them in use."""

    def join(self, pair: tuple[Tensor, Tensor], rows: int, before: int, columns: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*pair)
            self.buffers = [_buffer(t, 1, _roomy(columns)) for t in pair]
        for at, (buffer, new) in enumerate(zip(self.buffers, pair, strict=True)):
            more_rows, more_columns = rows >= buffer.shape[0], columns > buffer.shape[2]
            if more_rows or more_columns:
                roomy = _buffer(
                    new,
                    rows + 1 + rows // 2 if more_rows else buffer.shape[0],
                    _roomy(columns) if more_columns else buffer.shape[2],
                )
                roomy[:rows, :, columns - before : columns] = buffer[:rows, :, :before] if rows else 0
                self.buffers[at] = buffer = roomy
            elif rows and columns > before:
                buffer[:rows, :, columns - before : columns] = buffer[:rows, :, :before].clone()
            buffer[rows, :, : columns - new.shape[-2]] = 0  # another row's, which may not have been finite
            buffer[rows, :, columns - new.shape[-2] : columns] = new[0]
        self.show(rows + 1, columns)

    def move(self, source: int, target: int) -> None:
        if source != target:
            for buffer in self.buffers:
                buffer[target] = buffer[source]

    def trim(self, columns: int) -> None:
        for at, used in enumerate((self.keys, self.values)):
            kept = used[:, :, columns:]
            self.buffers[at] = _buffer(kept, kept.shape[0], _roomy(kept.shape[2]))
            self.buffers[at][:, :, : kept.shape[2]] = kept

    def show(self, rows: int, columns: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :columns] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, before = self.keys.shape[0], self.keys.shape[-2]
        columns = before + key_states.shape[-2]
        for at, new in enumerate((key_states, value_states)):
            if columns > self.buffers[at].shape[2]:
                roomy = _buffer(new, self.buffers[at].shape[0], _roomy(columns))
                roomy[:rows, :, :before] = self.buffers[at][:rows, :, :before]
                self.buffers[at] = roomy
            self.buffers[at][:rows, :, before:columns] = new
        self.show(rows, columns)
        return self.keys, self.values


def _roomy(columns: int) -> int:
    """Room for half as many columns again."""
    return columns + max(64, columns // 2)


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros: what is masked must be finite."""
    return like.new_zeros(rows, like.shape[1], columns, like.shape[-1])
