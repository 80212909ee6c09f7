"""GEMs on tiny random base models, as after a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemify import GemModel
from gemify.retrieval.index import GemIndex
from gemify.training.objective import Objective


def make_gem(base: str | Path, *, seed: int = 1, **options: Any) -> GemModel:
    """A GEM on a base model, its trained weights random and large, so that they matter."""
    gem = GemModel.from_base(str(base), **options)
    if gem.adapter is not None:
        randomize(gem, seed)
    return gem


def save_gem(base: str | Path, directory: Path, **options: Any) -> Path:
    """The directory of such a GEM, saved there."""
    make_gem(base, **options).save_pretrained(directory)
    return directory


def randomize(gem: GemModel, seed: int = 1) -> None:
    """Stand-in for training: random values in every trained weight."""
    assert gem.adapter is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD]:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def make_objective(gem: GemModel, *, frozen: bool, **options: Any) -> Objective:
    """A GEM's training objective, as it is when nothing is trained."""
    tune = gem.config.tune if frozen == gem.config.frozen_base else "gated" if frozen else "lora"
    return Objective(gem.lm, gem.adapter, replace(gem.config, tune=tune), **options).eval()


def store_of(gem: GemModel, root: Path) -> GemIndex:
    """A store of three files with metadata: ``year``, ``lang``, ``tags`` and ``date``."""
    (root / "docs").mkdir()
    for year, lang, tags in ((2024, "de", "even, of"), (2025, "en", "odd, of"), (2026, "en", "even, of")):
        front = f"---\nyear: {year}\nlang: {lang}\ntags: [{tags}]\ndate: {year}-05-01\n---\n"
        (root / "docs" / f"{year}.md").write_text(f"{front}# The cat\n\nThe cat sat on mat {year}.\n")
    index = GemIndex.open(root / "store", gem, tokens=64, overlap=0)
    index.add(root / "docs")
    return index
