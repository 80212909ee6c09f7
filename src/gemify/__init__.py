"""gemify: one language model that writes and embeds (GEM, arXiv 2506.04344)."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GemConfig", "GemIndex", "GemModel", "GemRag", "GemTrainer", "RagSettings", "__version__"]

if TYPE_CHECKING:
    from gemify.model.config import GemConfig
    from gemify.model.gem import GemModel
    from gemify.rag.pipeline import GemRag, RagSettings
    from gemify.retrieval.index import GemIndex
    from gemify.training.gem_trainer import GemTrainer

_ROOMS = {
    "GemConfig": "gemify.model.config",
    "GemModel": "gemify.model.gem",
    "GemIndex": "gemify.retrieval.index",
    "GemRag": "gemify.rag.pipeline",
    "GemTrainer": "gemify.training.gem_trainer",
    "RagSettings": "gemify.rag.pipeline",
}


if "OMP_WAIT_POLICY" not in os.environ:
    # Turns for which a thread of GNU's OpenMP waits actively for others; it is read when torch is loaded. Its own
    # default, some milliseconds, costs several times the processor's time beside other work (docs/log/serving.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are needed: `gemify --help` stays quick."""
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'gemify' has no attribute {name!r}")
