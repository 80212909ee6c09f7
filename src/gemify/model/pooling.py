"""From hidden states to one vector per row (GEM, Section 3.1). B rows, T positions, K special tokens, D width."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from gemify.paper.tokens import Segment

Pooling = Literal["mean", "concat"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(hidden_BKD: Tensor, pooling: Pooling) -> Tensor:
    """Pool the special tokens' states [B, K, D] to [B, D] (``mean``) or [B, K * D] (``concat``)."""
    return hidden_BKD.mean(dim=1) if pooling == "mean" else hidden_BKD.flatten(1)


def pool_hidden_states(hidden_BTD: Tensor, segments_BT: Tensor, pooling: Pooling) -> Tensor:
    """Pool the hidden states of whole rows.

    Args:
        hidden_BTD: Last hidden states.
        segments_BT: `Segment` codes.
        pooling: How to pool over the special tokens. Rows without any (the SimCSE baseline) give the mean over the
            text, in float32; a text without tokens gives zeros.

    Returns:
        [B, D] or [B, K * D].
    """
    special_BT = segments_BT == Segment.SPECIAL
    if bool(special_BT.any()):
        return pool(hidden_BTD[special_BT].view(hidden_BTD.shape[0], -1, hidden_BTD.shape[-1]), pooling)
    text_BT = segments_BT == Segment.TEXT
    total_BD = hidden_BTD.float().masked_fill(~text_BT[..., None], 0.0).sum(dim=1)
    return total_BD / text_BT.sum(dim=1, keepdim=True).clamp(min=1)
