"""Prefill of several prompts in one pass, each after the prefix that has run already.

    prefixes, padded         to run, padded
    . . a a a a a            . . . . b b        a row's tokens, in order, are its prompt: position ids are counted over
    . . . . . . .            c c c c c c        them alone, and its KV is cut out of the batch afterwards
    d d d d d d d            . . e e e e

A short prompt leaves most of a machine idle, as a single token does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gemify.model.forward import left_pad
from gemify.model.kv_cache import (
    CachedText,
    from_key_values,
    keeps_all_positions,
    key_values,
    new_cache,
    new_full_cache,
)
from gemify.model.prefill import Prefill, extend
from gemify.model.rope_shift import has_dynamic_rope


def supports_batched_prefill(lm: PreTrainedModel) -> bool:
    """Whether prompts of differing lengths can share a pass. Sliding windows would be measured over the padding."""
    return keeps_all_positions(new_cache(lm)) and not has_dynamic_rope(lm)


def prefill_batch(
    lm: PreTrainedModel, prefixes: Sequence[CachedText], rows: Sequence[Sequence[int]]
) -> list[tuple[CachedText, Tensor]]:
    """Run token ids after their prefixes, in one pass.

    Args:
        lm: the model.
        prefixes: for each prompt what has run, one row without padding, maybe empty.
        rows: for each prompt the token ids to run.

    Returns:
        For each prompt the text with its KV, and the logits [1, V] of its next token.
    """
    device = lm.device
    ids_BT, mask_BT = (t.to(device) for t in left_pad(rows))
    before = prefixes[0] if len(prefixes) == 1 else _stack(lm, prefixes)
    none_BT = torch.zeros_like(before.mask_BT, dtype=torch.long)
    handle = extend(lm, before, none_BT, ids_BT, mask_BT, single=False)
    if len(prefixes) == 1:
        return [(handle.text, handle.logits_BV)]
    return [(_cut_row(lm, handle, row), handle.logits_BV[row : row + 1]) for row in range(len(prefixes))]


def _stack(lm: PreTrainedModel, texts: Sequence[CachedText]) -> CachedText:
    """Stack texts of one row each into a batch, padded on the left."""
    lengths = [text.mask_BT.shape[1] for text in texts]
    T = max(lengths)
    mask_BT, cache = left_pad([[1] * n for n in lengths])[1].to(lm.device), new_full_cache(lm)
    if T:
        held = [key_values(text.cache) if n else None for text, n in zip(texts, lengths, strict=True)]
        like = next(pairs for pairs in held if pairs)
        layers = []
        for at, pair in enumerate(like):
            parts = ((pairs[at] if pairs else tuple(t[:, :, :0] for t in pair)) for pairs in held)
            padded = [tuple(F.pad(t, (0, 0, T - t.shape[2], 0)) for t in part) for part in parts]
            layers.append((torch.cat([k for k, _ in padded]), torch.cat([v for _, v in padded])))
        cache = from_key_values(lm, layers, into=cache)
    return CachedText(cache, mask_BT)


def _cut_row(lm: PreTrainedModel, handle: Prefill, row: int) -> CachedText:
    seen_T = handle.text.mask_BT[row]
    pairs = [(k[row : row + 1, :, seen_T], v[row : row + 1, :, seen_T]) for k, v in key_values(handle.text.cache)]
    mask_1T = torch.ones(1, int(seen_T.sum()), dtype=torch.bool, device=lm.device)
    return CachedText(from_key_values(lm, pairs, into=new_full_cache(lm)), mask_1T)
