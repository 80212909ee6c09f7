"""A decoder's layers compiled for `encode` alone: generation goes on to run the very code that the base runs.

Between its matrix products a layer does a dozen small things (norms, rotations, activations), each of which reads and
writes all of its input; compiled, they are few. All layers are alike, so that one is compiled and the others reuse it.
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
"""How: one graph for batches of any shape."""

_on: ContextVar[bool] = ContextVar("gemify_compiled", default=False)


@contextlib.contextmanager
def compiled(lm: PreTrainedModel) -> Iterator[None]:
    """Run the decoder's layers compiled in this thread, inside. The first passes compile them."""
    _prepare(lm)
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


def _prepare(lm: PreTrainedModel) -> None:
    for layer in layers_of(lm):
        if not hasattr(layer.forward, "gemify_plain"):
            layer.forward = _either(layer.forward)


def _either(plain: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(with_gate(plain), **OPTIONS)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fast(current_gate(), *args, **kwargs) if _on.get() else plain(*args, **kwargs)

    forward.gemify_plain = plain  # type: ignore[attr-defined]
    return forward
