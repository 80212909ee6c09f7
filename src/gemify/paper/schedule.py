"""Step -> alpha and learning rate. A pure function of the step number, so that a resumed run needs nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
