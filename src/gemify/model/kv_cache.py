"""Operations on KV caches: the only file that knows how transformers stores one.

A text's cache is computed once (a `Prefill` holds it). Special tokens and generation continue a *fork*: another cache
object over the same tensors, which transformers grows by concatenation, so the original is never written to. The *tail*
is a cache of the last k positions alone: all that a suffix may know of a text.
"""

from __future__ import annotations

import copy
from typing import Any

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
