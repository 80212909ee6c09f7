"""From a row's columns to one vector (GEM, Section 3.1). B rows, T columns, K special tokens, D width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gemify.paper.tokens import Segment

Pooling = Literal["mean", "concat"]
POOLINGS: tuple[Pooling, ...] = ("mean", "concat")


def pool(hidden_BKD: Tensor, pooling: Pooling) -> Tensor:
    """[B, K, D] -> [B, D] (mean) or [B, K * D] (concatenation)."""
    return hidden_BKD.mean(dim=1) if pooling == "mean" else hidden_BKD.flatten(1)


def pool_hidden_states(hidden_BTD: Tensor, segments_BT: Tensor, pooling: Pooling) -> Tensor:
    """The vectors of rows that have run whole, [B, D] or [B, K * D].

    Pools over the special tokens; in rows without any (the SimCSE baseline) it is the mean over the text, in float32. A
    text without tokens then gives zeros.
    """
    special_BT = segments_BT == Segment.SPECIAL
    if bool(special_BT.any()):
        return pool(hidden_BTD[special_BT].view(hidden_BTD.shape[0], -1, hidden_BTD.shape[-1]), pooling)
    text_BT = segments_BT == Segment.TEXT
    total_BD = hidden_BTD.float().masked_fill(~text_BT[..., None], 0.0).sum(dim=1)
    return total_BD / text_BT.sum(dim=1, keepdim=True).clamp(min=1)
