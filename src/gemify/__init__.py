"""gemify: one language model that writes and embeds (GEM, arXiv 2506.04344)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GemConfig", "GemModel", "__version__"]

if TYPE_CHECKING:
    from gemify.model.config import GemConfig
    from gemify.model.gem import GemModel


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are needed: `gemify --help` stays quick."""
    if name == "GemModel":
        from gemify.model.gem import GemModel

        return GemModel
    if name == "GemConfig":
        from gemify.model.config import GemConfig

        return GemConfig
    raise AttributeError(f"module 'gemify' has no attribute {name!r}")
