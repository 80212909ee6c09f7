"""The two losses of GEM (Section 3.3) and their weighted sum. Shapes: B rows, N targets, D width, V vocabulary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemify.paper.tokens import IGNORED

INITIAL_LOG_SCALE = math.log(20.0)
MAX_LOG_SCALE = math.log(100.0)


def next_token_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum the cross-entropy of aligned logits and targets, in float32.

    It is a sum, not a mean: the caller divides by the number of targets of the whole optimizer step, so that eight
    micro-batches of one row weigh exactly as much as one batch of eight.

    Args:
        logits_NV: Logits.
        targets_N: Token ids; IGNORED ones do not count.
    """
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")


class Temperature(nn.Module):
    """``lam = exp(t)``, t learnable, initial value log 20, clamped to [0, log 100] (Section 3.3)."""

    def __init__(self, log_scale: float = INITIAL_LOG_SCALE) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(float(log_scale)))

    def forward(self) -> Tensor:
        """Return lam."""
        # Clamp the parameter itself: a clamp in the graph would have no gradient outside its range.
        with torch.no_grad():
            self.t.clamp_(0.0, MAX_LOG_SCALE)
        return self.t.exp()


def info_nce(
    query_BD: Tensor,
    positive_BD: Tensor,
    scale: Tensor | float,
    negatives_ND: Tensor | None = None,
    *,
    own_index_B: Tensor | None = None,
) -> Tensor:
    """Mean InfoNCE over B pairs (GEM, Section 3.3): the other rows' positives are a row's negatives.

    ``-log( exp(lam s(q, d+)) / sum_d exp(lam s(q, d)) )`` with cosine s. For zero embeddings it is the logarithm of the
    number of candidates.

    Args:
        query_BD: The queries. No query at all gives 0.
        positive_BD: Their positives; more than B where other processes' positives are among them.
        scale: The temperature lam.
        negatives_ND: Further negatives.
        own_index_B: Which positive belongs to which query. None: the one with the same index.
    """
    # Autocast would round the logits to bfloat16: steps of 0.1 to 0.5 at these scales.
    with torch.autocast(query_BD.device.type, enabled=False):
        q_BD = F.normalize(query_BD.float(), dim=-1)
        d_ND = F.normalize(positive_BD.float(), dim=-1)
        if negatives_ND is not None:
            d_ND = torch.cat([d_ND, F.normalize(negatives_ND.float(), dim=-1)])
        target_B = torch.arange(q_BD.shape[0], device=q_BD.device) if own_index_B is None else own_index_B
        logits_BN = scale * (q_BD @ d_ND.T)
        return F.cross_entropy(logits_BN, target_B) if len(target_B) else logits_BN.sum()


def total_loss(ntp: Tensor | None, contrastive: Tensor | None, alpha: float) -> Tensor:
    """Return ``(1 - alpha) L_ntp + alpha L_cl``.

    A part whose weight is 0 may be None. ValueError if another part is.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    parts = [(1.0 - alpha, ntp, "next-token"), (alpha, contrastive, "contrastive")]
    missing = [name for weight, part, name in parts if weight > 0 and part is None]
    if missing:
        raise ValueError(f"alpha = {alpha} needs the {missing[0]} loss, which was not computed")
    terms = [weight * part for weight, part, _ in parts if weight > 0 and part is not None]
    return sum(terms[1:], start=terms[0])
