"""A directory appears whole, whatever another process does beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gemify.io.atomic import atomic_directory


def test_what_another_process_writes_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank writes the state of its random numbers into the checkpoint that the first one is about to rename."""
    target, replace = tmp_path / "checkpoint-6", os.replace

    def late(source: Any, to: Any) -> None:
        if not target.exists():
            target.mkdir()
            (target / "rng_state_1.pth").write_text("theirs")
        replace(source, to)

    monkeypatch.setattr(os, "replace", late)
    with atomic_directory(target, last="config.json") as stage:
        for name in ("config.json", "weights"):
            (stage / name).write_text("ours")
    assert {p.name: p.read_text() for p in target.iterdir()} == {
        "config.json": "ours",
        "weights": "ours",
        "rng_state_1.pth": "theirs",
    }
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_its_place_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "gem").write_text("mine")
    with (
        pytest.raises(ValueError, match="it is a file, give a directory"),
        atomic_directory(tmp_path / "gem", last="x"),
    ):
        pass
    assert (tmp_path / "gem").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1
