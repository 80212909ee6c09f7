"""A decoder's layers compiled for `encode` alone: generation runs the very code that the base model runs.

Between its matrix products a layer does a dozen small operations (norms, rotations, activations). Each reads and writes
all of its input; compiled, they are fused into a few. All layers are alike, so one is compiled and the others reuse it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel

from gemify.model.adapter import current_gate, with_gate
from gemify.model.early_exit import layers_of

OPTIONS: dict[str, Any] = {"dynamic": True}
"""Options of `torch.compile`: one graph for batches of any shape."""

_enabled: ContextVar[bool] = ContextVar("gemify_compiled", default=False)


@contextlib.contextmanager
def compile_layers(lm: PreTrainedModel) -> Iterator[None]:
    """Run the decoder's layers compiled inside this context, in this thread. The first passes compile them."""
    for layer in layers_of(lm):
        if not hasattr(layer.forward, "gemify_plain"):
            layer.forward = _switchable(layer.forward)
    token = _enabled.set(True)
    try:
        yield
    finally:
        _enabled.reset(token)


def _switchable(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(with_gate(plain), **OPTIONS)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(current_gate(), *args, **kwargs) if _enabled.get() else plain(*args, **kwargs)

    forward.gemify_plain = plain  # type: ignore[attr-defined]
    return forward
