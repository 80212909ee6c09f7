"""What the tests of vLLM share: tiny models that its CPU attention takes, and a python that has it."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_models
from gemify import GemModel
from tiny_gems import make_gem

SOURCE = Path(__file__).parents[3] / "src"


@functools.cache
def vllm_python() -> str:
    """A python that has vLLM and gemify's plugin."""
    python = os.environ.get("GEMIFY_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else "")
    if not python:
        pytest.skip(
            "vLLM is not here: set GEMIFY_VLLM_PYTHON to a python that has it, and gemify (docs/how-to/engines.md)"
        )
    return python


def child_environment() -> dict[str, str]:
    """This source tree's plugin, one thread, and no message to vLLM's makers."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(SOURCE)}


def save_base(directory: Path, kind: str = "llama", **more: Any) -> Path:
    """A tiny random model with heads as wide as vLLM's CPU attention takes, weights large enough to attend."""
    torch.manual_seed(0)
    settings = (
        tiny_models.ARCHITECTURES["llama"][1] | {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32} | more
    )
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    lm.save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)
    return directory


def make_saved_gem(base: Path, directory: Path, **options: Any) -> GemModel:
    """A GEM on that base, as after a training, and saved."""
    gem = make_gem(base, device="cpu", dtype=torch.float32, **options)
    gem.save_pretrained(directory)
    return gem
