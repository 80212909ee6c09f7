"""The two losses of GEM (Section 3.3) and their weighted sum. Shapes: B rows, N targets, D width, V vocabulary.

`Schedule` gives alpha and the learning rate of a step. It is a pure function of the step number, so that a resumed run
needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemify.paper.tokens import IGNORED


@dataclass(frozen=True)
class Schedule:
    """``alpha`` is 0 for ``ntp_steps`` steps, then rises to ``alpha_final`` over ``ramp_steps`` (0: a jump).

    The learning rate is ``lr`` while alpha is 0 and ``contrastive_lr`` from then on, times a linear warm-up and a
    cosine over all ``max_steps`` (GEM, Section 4.2: 100 steps, 1e-4 and 1e-5 of 1,000 steps).
    """

    max_steps: int
    ntp_steps: int = 100
    ramp_steps: int = 0
    alpha_final: float = 1.0
    lr: float = 1e-4
    contrastive_lr: float = 1e-5
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        for name in ("ntp_steps", "ramp_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.alpha_final <= 1.0:
            raise ValueError(f"alpha_final must lie in [0, 1], got {self.alpha_final}")
        for name in ("lr", "contrastive_lr"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")

    def alpha(self, step: int) -> float:
        """Weight of the contrastive loss at ``step`` (counted from 0)."""
        if step < self.ntp_steps:
            return 0.0
        if self.ramp_steps == 0:
            return self.alpha_final
        return self.alpha_final * min(1.0, (step - self.ntp_steps + 1) / self.ramp_steps)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update made at ``step`` (counted from 0)."""
        peak = self.lr if self.alpha(step) == 0.0 else self.contrastive_lr
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.max_steps)))
        return peak * warm * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * cosine)


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
    excluded_BN: Tensor | None = None,
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
        excluded_BN: True where a positive or negative is no negative of a query, as it holds an equal text.
    """
    # Autocast would round the logits to bfloat16: steps of 0.1 to 0.5 at these scales.
    with torch.autocast(query_BD.device.type, enabled=False):
        q_BD = F.normalize(query_BD.float(), dim=-1)
        d_ND = F.normalize(positive_BD.float(), dim=-1)
        if negatives_ND is not None:
            d_ND = torch.cat([d_ND, F.normalize(negatives_ND.float(), dim=-1)])
        target_B = torch.arange(q_BD.shape[0], device=q_BD.device) if own_index_B is None else own_index_B
        logits_BN = scale * (q_BD @ d_ND.T)
        if excluded_BN is not None:
            logits_BN = logits_BN.masked_fill(excluded_BN, -math.inf)
        return F.cross_entropy(logits_BN, target_B) if len(target_B) else logits_BN.sum()


FILLER = -1
"""Stands for a text that takes a missing negative's place: no row contrasts with it."""


def equal_texts(keys_BK: Tensor, own_index_B: Tensor) -> Tensor:
    """Return which candidates are no negatives of a row: they hold an equal text, or belong to an equal id.

    Args:
        keys_BK: Numbers of each row's id, anchor, positive and negatives: equal for equal texts, `FILLER` for a text
            that only fills up.
        own_index_B: Which rows are queries.

    Returns:
        [B, N], True where a candidate is left out: the positives of all rows, then their negatives.
    """
    pair_B3, own_B3 = keys_BK[:, :3], keys_BK[own_index_B, :3]
    positives_BN = (own_B3[:, None, :, None] == pair_B3[None, :, None, :]).flatten(2).any(-1)
    positives_BN[torch.arange(len(own_index_B)), own_index_B] = False
    negatives_N = keys_BK[:, 3:].flatten()
    negatives_BN = (own_B3[:, 1:, None] == negatives_N).any(1) | (negatives_N == FILLER)
    return torch.cat([positives_BN, negatives_BN], dim=1)


def cosine_loss(vectors_NP: Tensor, targets_NP: Tensor) -> Tensor:
    """Return the mean over N texts of 1 - cosine between vectors and a teacher's vectors."""
    return 1.0 - F.cosine_similarity(vectors_NP.float(), targets_NP.float(), dim=-1).mean()


def similarity_loss(
    vectors_NP: Tensor, targets_NP: Tensor, *, scale: float = 1.0 / 0.05, excluded_NN: Tensor | None = None
) -> Tensor:
    """Return the mean KL divergence of in-batch similarity rows from a teacher's.

    A row holds the softmax over the other N - 1 texts of ``scale`` times the cosines. Fewer than three texts give 0.

    Args:
        vectors_NP: The vectors that learn.
        targets_NP: The teacher's vectors of the same texts.
        scale: The inverse of the temperature.
        excluded_NN: True where a text is left out of a row's softmax, as it equals the row's own.
    """
    N = len(vectors_NP)
    if N < 3:
        return vectors_NP.sum() * 0.0
    others_NN = ~torch.eye(N, dtype=torch.bool, device=vectors_NP.device)

    def rows(x_NP: Tensor) -> Tensor:
        unit_NP = F.normalize(x_NP.float(), dim=-1)
        logits_NN = scale * (unit_NP @ unit_NP.T)
        if excluded_NN is not None:
            logits_NN = logits_NN.masked_fill(excluded_NN, torch.finfo(torch.float32).min / 2)  # -inf would give NaN
        return logits_NN[others_NN].view(N, N - 1).log_softmax(-1)

    return F.kl_div(rows(vectors_NP), rows(targets_NP), reduction="batchmean", log_target=True)


def cosent_loss(first_ND: Tensor, second_ND: Tensor, scores_N: Tensor, *, scale: float = 20.0) -> Tensor:
    """Return the CoSENT loss of N pairs with scores: pairs of a higher score shall have a higher cosine.

    ``log(1 + sum exp(scale (cos_j - cos_i)))`` over all i and j where pair i has the higher score, as in
    sentence-transformers' ``CoSENTLoss``. Pairs of one score give 0.

    Args:
        first_ND: Vectors of the pairs' first texts.
        second_ND: Vectors of their second texts.
        scores_N: Scores, on any scale.
        scale: The inverse of the temperature.
    """
    cosines_N = scale * F.cosine_similarity(first_ND.float(), second_ND.float(), dim=-1)
    differences_NN = (cosines_N[None, :] - cosines_N[:, None])[scores_N[:, None] > scores_N[None, :]]
    return torch.cat([differences_NN, differences_NN.new_zeros(1)]).logsumexp(0)


def matryoshka_loss(loss: Callable[[int], Tensor], dims: Sequence[int], width: int) -> Tensor:
    """Return the mean of a loss over vectors cut to each of some dimensions, and over whole ones (arXiv 2205.13147).

    Args:
        loss: The loss of vectors cut to their first numbers, by how many these are.
        dims: Dimensions to cut to.
        width: Dimensions of a whole vector.
    """
    return torch.stack([loss(dim) for dim in sorted({*dims, width})]).mean() if dims else loss(width)


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
