"""From k special tokens to one vector (GEM, Section 3.1)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Pooling = Literal["mean", "concat"]
POOLINGS: tuple[Pooling, ...] = ("mean", "concat")


def pool(hidden_BKD: Tensor, pooling: Pooling) -> Tensor:
    """[B, K, D] -> [B, D] (mean) or [B, K * D] (concatenation)."""
    return hidden_BKD.mean(dim=1) if pooling == "mean" else hidden_BKD.flatten(1)
