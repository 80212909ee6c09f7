"""Which weights of a model are trained (`gemify.model.gate` says what each choice does)."""

from __future__ import annotations

from typing import Literal

Tune = Literal["gated", "tokens", "lora", "full"]
TUNES: tuple[Tune, ...] = ("gated", "tokens", "lora", "full")
