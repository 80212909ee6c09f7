"""Early exit: passes made for their vectors alone stop at the layer that the embedding is read from.

A decoder runs its list of layers from the first to the last and then its final norm. Inside `early_exit` that list ends
earlier for the current thread. The final norm then reads the state after layer n, which gives vectors the scale they
have at the last layer (intermediate states have a few very large channels). The weights are the model's own. Other
threads, such as one that generates with the same model, run all layers.
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

_limit: ContextVar[int | None] = ContextVar("gemify_layers", default=None)
_enabled: WeakSet[nn.Module] = WeakSet()


class Layers(nn.ModuleList):
    """A decoder's layers as its forward reads them: only the first ones inside `early_exit`.

    Code that walks the modules themselves (weights, hooks, devices) sees all of them.
    """

    def __len__(self) -> int:
        return len(self._modules) if (limit := _limit.get()) is None else min(limit, len(self._modules))

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._modules.values())[: _limit.get()])

    def __getitem__(self, at: Any) -> Any:
        return nn.ModuleList(list(self)[at]) if isinstance(at, slice) else super().__getitem__(at)


def active_layers() -> int | None:
    """Return how many layers a pass in this thread runs. None: all."""
    return _limit.get()


@contextlib.contextmanager
def early_exit(lm: PreTrainedModel, layer: int | None) -> Iterator[None]:
    """Run only the decoder's first ``layer`` layers and its final norm inside this context, in this thread.

    None: all layers.
    """
    if layer is not None and lm not in _enabled:
        enable_early_exit(lm, layer)
    token = _limit.set(layer)
    try:
        yield
    finally:
        _limit.reset(token)


def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
    """Return the list that holds the decoder's layers; ValueError if the model has no such list."""
    num_layers = layer_count(lm)
    lists = [m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m._modules) == num_layers]
    if not lists:
        raise ValueError(
            f"{type(lm).__name__} has no list of its {num_layers} layers: use it without layer and compile"
        )
    return lists[0]


def layer_count(lm: PreTrainedModel) -> int:
    """Return how many layers the decoder has."""
    return int(lm.config.get_text_config().num_hidden_layers)


def enable_early_exit(lm: PreTrainedModel, layer: int) -> None:
    """Prepare a model for `early_exit`, and try it with one token.

    Raises:
        ValueError: The model has no such layer, or runs its layers in a way that cannot be stopped.
    """
    num_layers = layer_count(lm)
    if not 1 <= layer <= num_layers:
        raise ValueError(f"layer must lie in 1..{num_layers}, the layers of this model, got {layer}")
    layers = layers_of(lm)
    if type(layers) is nn.ModuleList:
        layers.__class__ = Layers
    _enabled.add(lm)
    if layer < num_layers and _last_layer_runs(lm, layers, layer):
        raise ValueError(f"{type(lm).__name__} runs all its layers in a way of its own: leave layer out")


@torch.no_grad()
def _last_layer_runs(lm: PreTrainedModel, layers: nn.ModuleList, layer: int) -> bool:
    """Whether one token reaches the last layer inside `early_exit`."""
    ran: list[bool] = []
    handle = layers[-1].register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with early_exit(lm, layer):
            lm.get_decoder()(input_ids=torch.ones(1, 1, dtype=torch.long, device=lm.device), use_cache=False)
    finally:
        handle.remove()
    return bool(ran)


def truncate_layers(lm: PreTrainedModel, layer: int) -> None:
    """Remove the layers above ``layer`` from a model and from its configuration, in place."""
    num_layers, config = layer_count(lm), lm.config.get_text_config()
    layers = layers_of(lm)
    layers.__class__ = nn.ModuleList
    del layers[layer:]
    config.num_hidden_layers = layer
    for name, value in list(vars(config).items()):  # such as the attention type of every layer
        if isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, value[:layer])
