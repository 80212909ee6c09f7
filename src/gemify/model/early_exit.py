"""A read-out layer below the last: passes that are made for their vectors alone need not run what lies above it.

A decoder runs its list of layers from the first to the last and then its final norm. While `early_exit` is open in a
thread, that list ends earlier for this thread: the final norm then reads the state after layer n, which keeps the
vectors' scale what it is for the last layer (intermediate states have a few very large channels). The weights are the
model's own, and other threads, such as one that generates with the same model, run all layers as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

_until: ContextVar[int | None] = ContextVar("gemify_layers", default=None)
_ready: WeakSet[nn.Module] = WeakSet()


class Layers(nn.ModuleList):
    """A decoder's layers as its forward reads them: where the thread's context says so, the first ones only.

    What walks the modules themselves (weights, hooks, devices) sees all of them.
    """

    def __len__(self) -> int:
        return len(self._modules) if (until := _until.get()) is None else min(until, len(self._modules))

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._modules.values())[: _until.get()])

    def __getitem__(self, at: Any) -> Any:
        return nn.ModuleList(list(self)[at]) if isinstance(at, slice) else super().__getitem__(at)


def active_layers() -> int | None:
    """How many layers a pass in this thread runs; None: all."""
    return _until.get()


@contextlib.contextmanager
def early_exit(lm: PreTrainedModel, layer: int | None) -> Iterator[None]:
    """Run the decoder's first ``layer`` layers and its final norm alone, in this thread, inside. None: all of them."""
    if layer is not None and lm not in _ready:
        enable_early_exit(lm, layer)
    token = _until.set(layer)
    try:
        yield
    finally:
        _until.reset(token)


def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
    """The list that holds the decoder's layers."""
    depth = layer_count(lm)
    lists = [m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m._modules) == depth]
    if not lists:
        raise ValueError(f"{type(lm).__name__} has no list of its {depth} layers: use it without layer and compile")
    return lists[0]


def layer_count(lm: PreTrainedModel) -> int:
    """How many layers the decoder has."""
    return int(lm.config.get_text_config().num_hidden_layers)


def enable_early_exit(lm: PreTrainedModel, layer: int) -> None:
    """Make a model ready for `early_exit`, and try it. ValueError if it has no such layer, or runs all in any case."""
    depth = layer_count(lm)
    if not 1 <= layer <= depth:
        raise ValueError(f"layer must lie in 1..{depth}, the layers of this model, got {layer}")
    layers = layers_of(lm)
    if type(layers) is nn.ModuleList:
        layers.__class__ = Layers
    _ready.add(lm)
    if layer < depth and _last_layer_runs(lm, layers, layer):
        raise ValueError(f"{type(lm).__name__} runs all its layers in a way of its own: leave layer out")


@torch.no_grad()
def _last_layer_runs(lm: PreTrainedModel, layers: nn.ModuleList, layer: int) -> bool:
    """Whether one token, run with `early_exit` open, reaches the last layer."""
    ran: list[bool] = []
    handle = layers[-1].register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with early_exit(lm, layer):
            lm.get_decoder()(input_ids=torch.ones(1, 1, dtype=torch.long, device=lm.device), use_cache=False)
    finally:
        handle.remove()
    return bool(ran)


def truncate_layers(lm: PreTrainedModel, layer: int) -> None:
    """Take the layers above ``layer`` out of a model for good, and out of its configuration."""
    depth, config = layer_count(lm), lm.config.get_text_config()
    layers = layers_of(lm)
    layers.__class__ = nn.ModuleList
    del layers[layer:]
    config.num_hidden_layers = layer
    for name, value in list(vars(config).items()):  # such as every layer's kind of attention
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:layer])
