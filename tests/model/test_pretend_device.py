"""Tests of tests/gpu on an accelerator that is none: it raises where CPU and device meet, and counts what waits for it.

All of them: ``GEMIFY_GPU_TESTS_DEVICE=pretend python -m pytest tests/gpu``. Not tried there: export (its tensors have
no storage to write) and transformers' Trainer, which does not know it. Quantized layers are refused, as on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHOSEN = (
    "waits or no_text or one_pass or quantized or gated-None or mean-None"
    " or (two_passes and llama and True) or (closed and llama-gated-float32-sdpa) or (written_on and llama)"
    " or (come_and_go and llama) or (vectors_are and llama-gated-2)"
)


def test_passes_gate_engine_and_objectives_keep_to_their_device() -> None:
    """In a process of its own: the device stays once it is there."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "tests/gpu", "-k", CHOSEN],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "GEMIFY_GPU_TESTS_DEVICE": "pretend"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
