"""The files by which sentence-transformers loads a directory: ``modules.json`` and its settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemify.model.config import GemConfig

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
GEM_MODULE = "gemify.integrations.sentence_transformers.Gem"
"""The module that runs a saved GEM as it is, gated ones too."""


def write_sentence_transformers_files(
    directory: Path, config: GemConfig, modules: Sequence[tuple[str, str]] = (("", GEM_MODULE),)
) -> None:
    """Write ``modules.json`` and ``config_sentence_transformers.json``.

    Args:
        directory: Where to write.
        config: The GEM's configuration.
        modules: Path within the directory and class of each module, in their order.
    """
    entries = [{"idx": i, "name": f"{i}", "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    write_json(directory / MODULES_FILE, entries)
    write_json(directory / SETTINGS_FILE, {**prompt_settings(config), "similarity_fn_name": "cosine"})


def prompt_settings(config: GemConfig) -> dict[str, Any]:
    """Return a GEM's prompts as sentence-transformers' settings.

    There ``encode_query`` and ``encode_document`` use no default prompt, so it is named for them too.
    """
    prompts, default = dict(config.prompts), config.default_prompt_name
    if default is not None:
        prompts = {"query": prompts[default], "document": prompts[default], **prompts}
    return {"prompts": prompts, "default_prompt_name": default}


def write_json(path: Path, values: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
