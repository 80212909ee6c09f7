"""`config_gemify.json` as it was written before: GEMs saved then load today, other entries are an error in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemify.model.config import CONFIG_FILE, SHIPPED, GemConfig, resolve_directory

SAVED: dict[str, Any] = {
    "tune": "lora",
    "base": "org/model",
    "base_revision": "main",
    "base_fingerprint": "b5ceccaf44c9ba28",
    "special_tokens": ["<repo_name>", "<reponame>"],
    "special_ids": [3, 4],
    "pooling": "concat",
    "shared_position": False,
    "max_length": 256,
    "template": '"{text}" means:',
    "layer": 5,
    "prompts": {"query": "Find: "},
    "default_prompt_name": "query",
    "format_version": 1,
}
"""Every entry of format version 1. A name in it is never changed: GEMs on users' disks have it."""


def read(directory: Path, **changed: Any) -> GemConfig:
    """Read a configuration with some entries changed; those that are None are left out."""
    values = {name: value for name, value in (SAVED | changed).items() if value is not None}
    (directory / CONFIG_FILE).write_text(json.dumps(values))
    return GemConfig.from_directory(directory)


def test_every_entry_of_a_saved_gem_is_read(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert json.loads(config.to_json()) == SAVED
    assert (config.special_tokens, config.special_ids) == (("<repo_name>", "<reponame>"), (3, 4))


def test_a_gem_from_before_templates_and_layers_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, template=None, layer=None)
    assert (config.template, config.layer) == ("{text}", None)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_gems_are_read(name: str) -> None:
    directory = resolve_directory(name)
    assert json.loads(GemConfig.from_directory(directory).to_json()) == json.loads(
        (directory / CONFIG_FILE).read_text()
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_length": None, "max_tokens": 256}, "unknown entries ['max_tokens']"),
        ({"readout": 3, "gate": True}, "unknown entries ['gate', 'readout']"),
        ({"format_version": 2}, "format version 2, this gemify reads 1"),
        ({"format_version": None}, "is damaged"),
        ({"tune": "gate"}, "unknown tune 'gate': choose one of gated, tokens, embedding_lora, lora, full"),
    ],
)
def test_an_entry_of_another_gemify_is_a_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, **changed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
