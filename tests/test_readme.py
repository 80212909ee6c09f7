"""The Python blocks of the README, the tutorial and the frameworks page run, one after the other, as a reader would run them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from gemify.model.base import STARTER_PACKAGE

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tutorial/first-gem.md", "docs/tutorial/ask-documents.md", "docs/how-to/frameworks.md")


@pytest.mark.real
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(importlib.util.find_spec(STARTER_PACKAGE) is None, reason="make setup installs the starter model")
def test_the_python_blocks_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    core = pytest.importorskip("llama_index.core")
    pytest.importorskip("langchain_core")
    monkeypatch.setattr(core.Settings, "_tokenizer", None)
    pytest.importorskip("lancedb")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)  # a block indexes this file into a new store
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
        assert blocks, page
        names: dict[str, Any] = {}
        for block in blocks:
            exec(block, names)
    out = capsys.readouterr().out
    assert "Paris" in out
    assert "README.md" in out
    assert out.count("noon") == 2
