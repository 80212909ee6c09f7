"""What GEM does with a KV cache: the only file that knows how transformers stores one.

A text's cache is computed once (a handle holds it). Special tokens and generation go on from a *fork*: a cache object
of its own over the same tensors, which transformers grows by concatenation, so the original is never written to. The
*tail* is a cache of the last k columns alone: all that a suffix may know of a text.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def new_cache(lm: PreTrainedModel) -> DynamicCache:
    """An empty cache with the layer types (full, sliding) that this model wants."""
    return DynamicCache(config=lm.config)


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can be continued without touching ``cache``. Copies no tensor."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
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


def concatenate(lm: PreTrainedModel, caches: list[DynamicCache]) -> DynamicCache:
    """One cache of all rows of caches of equal length, in order."""
    if len(caches) == 1:
        return caches[0]
    joined = new_cache(lm)
    for index, layer in enumerate(caches[0].layers):
        if layer.is_initialized and layer.keys.numel():
            keys = torch.cat([c.layers[index].keys for c in caches])
            joined.update(keys, torch.cat([c.layers[index].values for c in caches]), index)
    return joined


def from_key_values(lm: PreTrainedModel, pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """The cache that `key_values` took apart. Layers that hold none of their own stay empty."""
    made = new_cache(lm)
    if len(pairs) != len(made.layers):
        raise ValueError(f"a cache of {len(made.layers)} layers is wanted, got {len(pairs)}: it is another model's")
    for index, (keys, values) in enumerate(pairs):
        made.update(keys, values, index)
    return made


def keeps_all(cache: DynamicCache) -> bool:
    """Whether every layer keeps all columns: sliding windows drop old ones."""
    return not any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def columns_of(cache: DynamicCache, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of some of the columns; ValueError where sliding windows have dropped any."""
    if not keeps_all(cache):
        raise ValueError("this model's sliding windows drop old columns: its cache cannot be cut")
    return [(keys[..., start:stop, :], values[..., start:stop, :]) for keys, values in key_values(cache)]
