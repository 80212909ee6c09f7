"""Where the tests of tests/gpu run: a CUDA device, or the CPU to try their code where there is none.

GEMIFY_GPU_TESTS_DEVICE=cpu python -m pytest tests/gpu
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

import pretend_device
import tiny_models
from gemify import GemModel
from gemify.model.base import load_base
from gemify.model.projection import Projection
from tiny_gems import make_gem

DEVICE = os.environ.get("GEMIFY_GPU_TESTS_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")
if DEVICE == pretend_device.NAME:
    with TemporaryDirectory() as first:  # transformers settles at its first load what devices there are
        load_base(str(tiny_models.save(Path(first) / "base")), device="cpu")
    pretend_device.install()
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(),
        reason="no CUDA device: GEMIFY_GPU_TESTS_DEVICE=cpu tries the tests on the CPU",
    ),
    pytest.mark.usefixtures("full_float32"),
]

TEXTS = ["a cat on a mat", "x", "the river is long and red " * 6, "the cat sat", "12 + 3 = 15"]
OWN_PASS: dict[str, Any] = {"tune": "embedding_lora", "special_tokens": 0, "attention": "bidirectional"}
KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "gated-2": {"special_tokens": 2, "shared_position": False, "pooling": "concat"},
    "gated-layer": {"layer": 1},
    "gated-template": {"template": 'say : "{text}" is:"'},
    "tokens": {"tune": "tokens", "special_tokens": 2},
    "lora": {"tune": "lora"},
    "lora-mean": {"tune": "lora", "special_tokens": 0},
    "full": {"tune": "full"},
    "embedding-lora-mean": OWN_PASS,
    "embedding-lora-mean-causal": {**OWN_PASS, "attention": "causal"},
    "embedding-lora-token": {**OWN_PASS, "special_tokens": 1},
    "embedding-lora-token-causal": {"tune": "embedding_lora", "special_tokens": 1},
}


def save_kind(base: Path, directory: Path, kind: str, **options: Any) -> Path:
    """A saved GEM of one of `KINDS` on a base; those with a pass of their own have a projection too."""
    gem = make_gem(base, device="cpu", **{**KINDS[kind], **options})
    if gem.config.tune == "embedding_lora":
        generator = torch.Generator().manual_seed(3)
        gem.config = replace(gem.config, projection_dim=7)
        gem.projection = Projection(torch.randn(7, 32, generator=generator))
    gem.save_pretrained(directory)
    return directory


def on_both(directory: Path, **options: Any) -> tuple[GemModel, GemModel]:
    """A saved GEM on the tested device, and in float32 on the CPU."""
    cpu = {k: v for k, v in options.items() if k != "dtype"}
    return (
        GemModel.from_pretrained(directory, device=DEVICE, **{"dtype": torch.float32, **options}),
        GemModel.from_pretrained(directory, device="cpu", dtype=torch.float32, **cpu),
    )


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine similarity of rows of the same number."""
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))
