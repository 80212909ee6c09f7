"""Forward passes of GEM over a language model: the text, the special tokens on its KV cache, the suffix on theirs.

With frozen base weights the text's states are constants (no text token sees a special token). So the text runs once
without gradients, k special tokens run on its KV cache with gradients, and the suffix runs on the special tokens' KV
cache alone: "cache surgery". It equals the single masked pass (`masked_pass`) and needs no backward pass through the
text.

Texts are padded on the left here, so that a special token stands right after its text and a suffix right after its
special tokens, and sliding windows measure true distances. B rows, T positions, K special tokens, D width, V
vocabulary.

`length_groups` makes batches of texts of similar length, so that little padding is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gemify.model.adapter import gate
from gemify.model.attention import bidirectional_mask, gem_mask
from gemify.model.config import GemConfig
from gemify.model.early_exit import active_layers
from gemify.model.kv_cache import (
    CachedText,
    cache_argument,
    concatenate_rows,
    fork,
    from_key_values,
    new_cache,
    new_full_cache,
    select,
    slice_key_values,
    tail,
)
from gemify.paper.tokens import IGNORED, RowInputs, Segment


@dataclass(frozen=True)
class Specials:
    """The special tokens of a batch of texts after their pass."""

    hidden_BKD: Tensor | None
    """Last hidden states, the embedding before pooling. None if the pass was made for its logits."""
    logits_BV: Tensor | None
    """Logits at the last special token, which predict the first suffix token. None if the pass was made for hidden
    states."""
    cache: DynamicCache
    """KV cache of the special tokens alone."""
    next_position_B: Tensor
    """Position id of the first suffix token."""


def left_pad(texts: Sequence[Sequence[int]], *, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pad texts on the left with ``fill``. Returns ids [B, T] and a mask [B, T], False at padding."""
    T = max((len(t) for t in texts), default=0)
    ids = [[fill] * (T - len(t)) + list(t) for t in texts]
    mask = [[False] * (T - len(t)) + [True] * len(t) for t in texts]
    return torch.tensor(ids, dtype=torch.long).view(len(texts), T), torch.tensor(mask, dtype=torch.bool).view(
        len(texts), T
    )


def right_pad(texts: Sequence[Sequence[int]], *, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pad texts on the right with ``fill``. Returns ids [B, T] and a mask [B, T], False at padding."""
    ids_BT, mask_BT = left_pad([t[::-1] for t in texts], fill=fill)
    return ids_BT.flip(-1), mask_BT.flip(-1)


def positions_of(mask_BT: Tensor) -> Tensor:
    """Return the position ids [B, T] of padded rows: padding does not count."""
    return (mask_BT.long().cumsum(-1) - 1).clamp_(min=0)


def text_pass(lm: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, *, cache: DynamicCache | None = None) -> CachedText:
    """Run left-padded texts [B, T] through the decoder, without the output head, and keep their KV cache.

    Args:
        lm: The model.
        ids_BT: The texts.
        mask_BT: False at padding.
        cache: An empty cache to fill. None: the model's own, whose sliding windows drop old positions.
    """
    cache = new_cache(lm) if cache is None else cache
    if ids_BT.shape[1]:
        lm.get_decoder()(
            input_ids=ids_BT,
            attention_mask=mask_BT.long(),
            position_ids=positions_of(mask_BT),
            **cache_argument(cache),
            use_cache=True,
        )
    return CachedText(cache, mask_BT)


def special_pass(
    lm: PreTrainedModel,
    text: CachedText,
    special_ids: Sequence[int],
    *,
    shared_position: bool = True,
    seen_BT: Tensor | None = None,
    with_logits: bool = False,
) -> Specials:
    """Run the special tokens on a text's KV cache, with the trained weights on (GEM, Section 3.1).

    Args:
        lm: The model.
        text: The texts; their cache is not changed.
        special_ids: Ids of the K special tokens.
        shared_position: Give all special tokens the same position id.
        seen_BT: False where the special tokens may not look: a contrastive view. None: they see the whole text.
        with_logits: Run the output head on the last special token, instead of keeping hidden states.

    Raises:
        ValueError: There are no special tokens.
    """
    B, K = text.mask_BT.shape[0], len(special_ids)
    if K == 0:
        raise ValueError("this model has no special tokens: nothing to recover a text from, and to embed use encode")
    device = text.mask_BT.device
    start_B1 = text.mask_BT.sum(-1)[:, None]
    step_K = torch.zeros(K, dtype=torch.long, device=device) if shared_position else torch.arange(K, device=device)
    visible_BT = text.mask_BT if seen_BT is None else text.mask_BT & seen_BT
    ones_BK = torch.ones(B, K, dtype=torch.bool, device=device)
    cache = fork(text.cache, layers=active_layers())
    inputs = {
        "input_ids": torch.tensor([list(special_ids)] * B, device=device),
        "attention_mask": torch.cat([visible_BT, ones_BK], dim=1).long(),
        "position_ids": start_B1 + step_K,
        **cache_argument(cache),
        "use_cache": True,
    }
    masked: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if K > 1:  # special tokens do not see each other
        segments_BT = torch.cat([text.mask_BT.long() * Segment.TEXT, ones_BK.long() * Segment.SPECIAL], dim=1)
        masked = gem_mask(segments_BT, shared_position=shared_position)
    with gate(ones_BK), masked:
        if with_logits:
            logits_BV = lm(**inputs, logits_to_keep=1).logits[:, -1]
            hidden_BKD = None
        else:
            logits_BV = None
            hidden_BKD = lm.get_decoder()(**inputs).last_hidden_state
    return Specials(hidden_BKD, logits_BV, tail(lm, cache, K), start_B1[:, 0] + (1 if shared_position else K))


def text_and_special_pass(
    lm: PreTrainedModel,
    before: CachedText,
    ids_BT: Tensor,
    mask_BT: Tensor,
    special_ids: Sequence[int],
    *,
    start: int,
    shared_position: bool,
    suffix_ids: Sequence[int] = (),
) -> tuple[CachedText, Tensor]:
    """Run more text, a template's suffix and the special tokens in one pass.

    Inside `early_exit` no more text can be given: the layers above would lack it.

    Args:
        lm: A model whose caches keep all positions (`keeps_all_positions`).
        before: Texts that have run; their cache is not changed.
        ids_BT: More text, padded on the left.
        mask_BT: False at padding of ``ids_BT``.
        special_ids: Ids of the K special tokens.
        start: The first position that the special tokens see.
        shared_position: Give all special tokens the same position id.
        suffix_ids: The template's words between text and special tokens.

    Returns:
        The text up to ``suffix_ids``, and the special tokens' last hidden states [B, K, D].
    """
    assert active_layers() is None or not ids_BT.shape[1]
    kept = before.mask_BT.shape[1] + ids_BT.shape[1]
    if suffix_ids:
        suffix_BT = torch.tensor([list(suffix_ids)] * ids_BT.shape[0], device=ids_BT.device)
        ids_BT, mask_BT = torch.cat([ids_BT, suffix_BT], 1), torch.cat([mask_BT, torch.ones_like(suffix_BT).bool()], 1)
    B, K, device = ids_BT.shape[0], len(special_ids), ids_BT.device
    whole_BT = torch.cat([before.mask_BT, mask_BT], dim=1)
    T, new = whole_BT.shape[1], ids_BT.shape[1]
    ones_BK = torch.ones(B, K, dtype=torch.bool, device=device)
    step_K = torch.zeros(K, dtype=torch.long, device=device) if shared_position else torch.arange(K, device=device)
    position_BT = torch.cat([positions_of(whole_BT)[:, T - new :], whole_BT.sum(-1)[:, None] + step_K], dim=1)
    cache = fork(before.cache)
    masked: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if start or K > 1:
        segments_BT = torch.cat([whole_BT.long() * Segment.TEXT, ones_BK.long() * Segment.SPECIAL], dim=1)
        segments_BT[:, :start] *= int(Segment.HIDDEN)  # padding stays padding
        masked = gem_mask(segments_BT, shared_position=shared_position)
    with gate(torch.cat([torch.zeros_like(mask_BT), ones_BK], dim=1)), masked:
        hidden_BTD = lm.get_decoder()(
            input_ids=torch.cat([ids_BT, torch.tensor([list(special_ids)] * B, device=device)], dim=1),
            attention_mask=torch.cat([whole_BT, ones_BK], dim=1).long(),
            position_ids=position_BT,
            **cache_argument(cache),
            use_cache=True,
        ).last_hidden_state
    text = from_key_values(lm, slice_key_values(cache, 0, kept), into=new_full_cache(lm))
    return CachedText(text, whole_BT[:, :kept]), hidden_BTD[:, -K:]


def suffix_pass(
    lm: PreTrainedModel, specials: Specials, ids_BT: Tensor, mask_BT: Tensor, *, body_only: bool = False
) -> Tensor:
    """Run suffixes that know of their text only the KV cache of its special tokens (GEM, Section 3.2).

    Args:
        lm: The model.
        specials: The special tokens of each row.
        ids_BT: The suffixes, padded on the right.
        mask_BT: False at padding.
        body_only: Leave the output head out.

    Returns:
        Logits [B, T, V], or with ``body_only`` last hidden states [B, T, D].
    """
    K = specials.cache.get_seq_length()
    ones_BK = torch.ones(ids_BT.shape[0], K, dtype=torch.long, device=ids_BT.device)
    inputs = {
        "input_ids": ids_BT,
        "attention_mask": torch.cat([ones_BK, mask_BT.long()], dim=1),
        "position_ids": specials.next_position_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device),
        **cache_argument(fork(specials.cache)),
        "use_cache": True,
    }
    return lm.get_decoder()(**inputs).last_hidden_state if body_only else lm(**inputs).logits


@dataclass(frozen=True)
class MaskedBatch:
    """Inputs of one masked forward pass: rows padded on the right, all tensors [B, T]."""

    ids_BT: Tensor
    segments_BT: Tensor
    positions_BT: Tensor
    labels_BT: Tensor
    shared_position: bool = True

    @staticmethod
    def of(
        rows: Sequence[RowInputs], *, shared_position: bool = True, device: torch.device | str = "cpu"
    ) -> MaskedBatch:
        """Pad rows on the right."""
        padded = [
            right_pad([r.ids for r in rows])[0],
            right_pad([r.segments for r in rows], fill=int(Segment.PAD))[0],
            right_pad([r.positions for r in rows])[0],
            right_pad([r.labels for r in rows], fill=IGNORED)[0],
        ]
        ids_BT, segments_BT, positions_BT, labels_BT = torch.stack(padded).to(device)  # one copy to a GPU
        return MaskedBatch(ids_BT, segments_BT, positions_BT, labels_BT, shared_position)

    @property
    def attention_mask(self) -> Tensor:
        """1 at tokens, 0 at padding."""
        return (self.segments_BT != Segment.PAD).long()


def masked_pass(lm: PreTrainedModel, batch: MaskedBatch, *, body_only: bool = False) -> Tensor:
    """Run whole rows in one forward pass under the GEM mask (GEM, Fig. 3).

    Where the GEM mask equals the causal one (raw rows, or one special token at the end) the pass has no GEM mask. With
    ``body_only`` it then has no mask at all: padding is on the right, where no token looks.

    Args:
        lm: The model.
        batch: The rows.
        body_only: Leave the output head out.

    Returns:
        Logits [B, T, V], or with ``body_only`` last hidden states [B, T, D].
    """
    special_BT = batch.segments_BT == Segment.SPECIAL
    beyond_causal_BT = (batch.segments_BT == Segment.SUFFIX) | (batch.segments_BT == Segment.HIDDEN)
    masked = contextlib.ExitStack()
    causal = True
    if bool(special_BT.any()):
        masked.enter_context(gate(special_BT))
        causal = not bool(beyond_causal_BT.any()) and int(special_BT.sum(-1).max()) == 1
        if not causal:
            masked.enter_context(gem_mask(batch.segments_BT, shared_position=batch.shared_position))
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT, "use_cache": False}
    if not (causal and body_only):  # positions count from 0 then, and a kernel that needs no mask is the fastest
        inputs["attention_mask"] = batch.attention_mask
        inputs["position_ids"] = batch.positions_BT
    with masked:
        if body_only:
            return lm.get_decoder()(**inputs).last_hidden_state
        return lm(**inputs).logits


def embedding_pass(lm: PreTrainedModel, batch: MaskedBatch, config: GemConfig) -> Tensor:
    """Run whole rows for their vectors.

    With ``embedding_lora`` the adapter acts at every token of this pass, and at none of any other pass.

    Args:
        lm: The model.
        batch: The rows: texts, and special tokens if there are any.
        config: The GEM's configuration: tuning scope and attention.

    Returns:
        Last hidden states [B, T, D].
    """
    if config.tune != "embedding_lora":
        return masked_pass(lm, batch, body_only=True)
    special_BT = batch.segments_BT == Segment.SPECIAL
    with contextlib.ExitStack() as stack:
        stack.enter_context(gate(torch.ones_like(special_BT), special_BT=special_BT))
        if config.attention == "bidirectional":
            stack.enter_context(bidirectional_mask())
        elif config.k > 1:
            stack.enter_context(gem_mask(batch.segments_BT, shared_position=batch.shared_position))
        hidden_BTD: Tensor = lm.get_decoder()(
            input_ids=batch.ids_BT,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions_BT,
            use_cache=False,
        ).last_hidden_state
    return hidden_BTD


def concatenate_specials(lm: PreTrainedModel, parts: Sequence[Specials]) -> Specials:
    """Return the special tokens of several batches as one batch, in order."""

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return torch.cat(present) if present else None

    return Specials(
        cat([p.hidden_BKD for p in parts]),
        cat([p.logits_BV for p in parts]),
        concatenate_rows(lm, [p.cache for p in parts]),
        torch.cat([p.next_position_B for p in parts]),
    )


def select_specials(specials: Specials, rows: Sequence[int]) -> Specials:
    """Return some rows of a batch of special tokens."""
    index = torch.tensor(list(rows), device=specials.next_position_B.device)
    return Specials(
        None if specials.hidden_BKD is None else specials.hidden_BKD[index],
        None if specials.logits_BV is None else specials.logits_BV[index],
        select(specials.cache, index),
        specials.next_position_B[index],
    )


PASS_OVERHEAD_TOKENS = 12.0
"""What a forward pass costs beside its tokens, in tokens. Measured on two CPU cores: see "Groups that cost least" in
docs/log/training-speed.md."""


def length_groups(
    lengths: Sequence[int], *, max_tokens: int, pass_overhead_tokens: float = PASS_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Partition rows into groups of similar length that together cost least.

    A group costs its tokens (rows times longest row) plus ``pass_overhead_tokens``. In order of length the best groups
    are neighbours, so the least cost of the first n rows follows from that of fewer rows.

    Args:
        lengths: Length of each row, in tokens.
        max_tokens: Most tokens of a group, padding included. A longer single row is a group of its own.
        pass_overhead_tokens: 0 never pads; as many as ``max_tokens`` gives the fewest groups.

    Returns:
        Row numbers of each group, the longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    lengths_N = np.array([max(1, lengths[i]) for i in order])
    cost_N, start_N = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    first = 0  # the first row of the longest group that ends here
    for end in range(1, len(order) + 1):
        while first < end - 1 and lengths_N[first] * (end - first) > max_tokens:
            first += 1
        cost = cost_N[first:end] + lengths_N[first:end] * np.arange(end - first, 0, -1)
        best = int(cost.argmin())
        cost_N[end], start_N[end] = cost[best] + pass_overhead_tokens, first + best
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[start_N[end] : end])
        end = int(start_N[end])
    return groups[::-1]
