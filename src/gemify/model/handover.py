"""From one prefill to both jobs: the only file that knows how transformers' `generate` starts.

`generate` runs the prompt once (`_prefill`) and decodes from what that returned. For a `Handle` the prompt has already
run; while `resume` is open, `_prefill` hands back that run's cache (a fork) and last logits. So the continuation goes
through transformers' own code (sampling, stopping, streaming) and equals a plain `generate` to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemify.model.cache import fork, new_cache, select, size_in_bytes
from gemify.model.passes import Text, positions_of


@dataclass(frozen=True)
class Handle:
    """A batch of texts that has run once. `GemModel.embed` and `GemModel.generate` both go on from it."""

    text: Text
    ids_BT: Tensor
    """Token ids, padded on the left."""
    logits_BV: Tensor
    """Next-token logits after each text."""
    single: bool
    """Whether one string was given (results then come without the batch dimension)."""

    @property
    def nbytes(self) -> int:
        """Memory of the KV cache."""
        return size_in_bytes(self.text.cache)


_resumed: ContextVar[Handle | None] = ContextVar("gemify_handle", default=None)


@torch.no_grad()
def prefill(lm: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, *, single: bool) -> Handle:
    """Run left-padded prompts just as `generate` would, and keep the cache and the last logits."""
    cache = new_cache(lm)
    out = lm(
        input_ids=ids_BT,
        attention_mask=mask_BT.long(),
        position_ids=positions_of(mask_BT),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Handle(Text(cache, mask_BT), ids_BT, out.logits[:, -1], single)


@contextlib.contextmanager
def resume(lm: PreTrainedModel, handle: Handle) -> Iterator[None]:
    """While open (in this thread), `lm.generate` starts from ``handle`` instead of running the prompt."""
    _install(lm)
    token = _resumed.set(handle)
    try:
        yield
    finally:
        _resumed.reset(token)


def _install(lm: PreTrainedModel) -> None:
    ordinary = lm._prefill
    if getattr(ordinary, "gemify", False):
        return

    def start(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        handle = _resumed.get()
        if handle is None:
            return ordinary(input_ids, *args, **kwargs)
        logits_BV, cache = handle.logits_BV, handle.text.cache
        if input_ids.shape[0] == handle.ids_BT.shape[0]:
            return CausalLMOutputWithPast(logits=logits_BV[:, None], past_key_values=fork(cache))
        # beams, or several answers a prompt: transformers has repeated each row
        rows = torch.arange(handle.ids_BT.shape[0]).repeat_interleave(input_ids.shape[0] // handle.ids_BT.shape[0])
        return CausalLMOutputWithPast(
            logits=logits_BV[rows.to(logits_BV.device), None], past_key_values=select(cache, rows)
        )

    start.gemify = True  # type: ignore[attr-defined]
    lm._prefill = start
