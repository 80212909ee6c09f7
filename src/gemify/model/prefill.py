"""From one prefill to both jobs, and to longer prompts: the only file that knows how transformers' `generate` starts.

`generate` runs the prompt once (`_prefill`) and decodes from what that returned. For a `Handle` the prompt has already
run; while `resume` is open, `_prefill` hands back that run's cache (a fork) and last logits. So the continuation goes
through transformers' own code (sampling, stopping, streaming) and equals a plain `generate` to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemify.model.forward import Text, positions_of, special_pass, text_and_special_pass
from gemify.model.kv_cache import fork, keeps_all, new_cache, select, size_in_bytes


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


def prefill(lm: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, *, single: bool) -> Handle:
    """Run left-padded prompts just as `generate` would, and keep the cache and the last logits."""
    none = ids_BT[:, :0]
    return extend(lm, Text(new_cache(lm), mask_BT[:, :0]), none, ids_BT, mask_BT, single=single)


@torch.no_grad()
def extend(
    lm: PreTrainedModel, text: Text, before_BT: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, single: bool
) -> Handle:
    """Run more tokens (padded on the left) after texts that have run. ``text`` stays as it was.

    ``before_BT`` are the ids that ``text`` was made of: the new handle is of both together.
    """
    cache = fork(text.cache)
    whole_BT = torch.cat([text.mask_BT, mask_BT], dim=1)
    out = lm(
        input_ids=ids_BT,
        attention_mask=whole_BT.long(),
        position_ids=positions_of(whole_BT)[:, -ids_BT.shape[1] :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Handle(Text(cache, whole_BT), torch.cat([before_BT, ids_BT], dim=1), out.logits[:, -1], single)


def followed(lm: PreTrainedModel, text: Text, after: Sequence[int]) -> Text:
    """Texts that have run with the same tokens after each. ``text`` stays as it was."""
    if not after:
        return text
    ids_BT = torch.tensor([list(after)] * text.mask_BT.shape[0], device=text.mask_BT.device)
    return extend(lm, text, ids_BT[:, :0], ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), single=False).text


@torch.no_grad()
def embed(
    lm: PreTrainedModel,
    handle: Handle,
    special_ids: Sequence[int],
    *,
    shared_position: bool,
    since: int = 0,
    after: Sequence[int] = (),
) -> Tensor:
    """Last hidden states [B, K, D] of the special tokens on a handle's cache, which stays as it was.

    ``after`` are the ids of a template's words between the text and them. They see the columns from ``since`` on.
    """
    text, columns = handle.text, handle.ids_BT.shape[1]
    if not 0 <= since < max(columns, 1):
        raise ValueError(f"since must be a column of the handle, 0..{columns - 1}, got {since}")
    if after and special_ids and keeps_all(text.cache):
        none, shared = (handle.ids_BT[:, :0], text.mask_BT[:, :0]), shared_position
        return text_and_special_pass(lm, text, *none, special_ids, since=since, shared_position=shared, after=after)[1]
    text = followed(lm, text, after)
    seen_BT = (torch.arange(text.mask_BT.shape[1], device=text.mask_BT.device) >= since)[None] if since else None
    hidden_BKD = special_pass(lm, text, special_ids, shared_position=shared_position, seen_BT=seen_BT).hidden_BKD
    assert hidden_BKD is not None
    return hidden_BKD


@torch.no_grad()
def generate_ids(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    handle: Handle | None,
    ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    never: Sequence[int],
    **options: Any,
) -> Any:
    """What transformers' `generate` returns for left-padded prompts, run already (``handle``) or not.

    ``never`` are ids that must not be emitted: the special tokens'.
    """
    suppressed = sorted({*(options.pop("suppress_tokens", None) or ()), *never})
    table = lm.get_output_embeddings().weight.shape[0]
    options["suppress_tokens"] = [i for i in suppressed if i < table] or None
    if "stop_strings" in options:
        options.setdefault("tokenizer", tokenizer)
    if (config := lm.generation_config).pad_token_id is None:
        ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        options.setdefault("pad_token_id", ends[0] if isinstance(ends, list) else ends)
    with resume(lm, handle) if handle is not None else contextlib.nullcontext():
        return lm.generate(input_ids=ids_BT, attention_mask=mask_BT.long(), **options)


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
