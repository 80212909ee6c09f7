"""The Python blocks of README and docs run, one after the other, as a reader of the page would run them.

A block that cannot run here says why in a comment right before it: ``<!-- not run: it needs a GPU -->``. What a reader
has, the directory has: this README, notes, the shipped GEM as ``my-gem``, its export as ``OUT``, a server where one is
asked.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import docs_checks
from gemify import GemModel
from gemify.cli.main import app
from gemify.model.base import STARTER_PACKAGE

ROOT = Path(__file__).parents[1]
BLOCKS = {
    str(path.relative_to(ROOT)): blocks
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := [b for b in docs_checks.blocks(path.read_text(encoding="utf-8")) if b.language.startswith("py")])
}
PRINTS = {
    "README.md": ["Paris"],
    "docs/index.md": ["Paris"],
    "docs/tutorial/ask-documents.md": ["birds.md"],
    "docs/how-to/frameworks.md": ["noon", "noon"],
}
"""What a page's blocks print, in this order, among other things."""


def test_every_block_is_tried() -> None:
    for page, blocks in BLOCKS.items():
        shown = [block.code.splitlines()[0] for block in blocks if block.language != "python"]
        assert not shown, (
            f"{page}: {shown} is ```py: make it ```python, with <!-- not run: reason --> before it if need be"
        )
    assert BLOCKS.keys() >= PRINTS.keys()


@pytest.mark.real
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(importlib.util.find_spec(STARTER_PACKAGE) is None, reason="make setup installs the starter model")
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if not all(b.not_run for b in blocks)])
def test_the_python_blocks_run(
    page: str,
    shipped: GemModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    code = [block.code for block in BLOCKS[page] if not block.not_run]
    for package in re.findall(r"^ *(?:from|import) ([\w.]+)", "\n".join(code), re.MULTILINE):
        pytest.importorskip(package)
    if "llama_index" in "\n".join(code):
        monkeypatch.setattr(importlib.import_module("llama_index.core").Settings, "_tokenizer", None)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        run([stack.enter_context(as_read(block, shipped, tmp_path)) for block in code])
    printed = capsys.readouterr().out
    assert re.search(".*".join(map(re.escape, PRINTS.get(page, []))), printed, re.DOTALL)


def run(blocks: list[str]) -> None:
    """Run blocks one after the other, each with the names of those before."""
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)


@contextlib.contextmanager
def as_read(block: str, shipped: GemModel, directory: Path) -> Any:
    """A block as it runs here; what it asks for is in the directory."""
    if not (directory / "README.md").is_file():
        shutil.copy(ROOT / "README.md", directory / "README.md")
        shutil.copytree(ROOT / "src" / "gemify" / "shipped" / "starter-gated", directory / "my-gem")
        (directory / "notes").mkdir()
        (directory / "notes" / "birds.md").write_text("# Owls\n\nOwls hunt at night.\n")
    if '"OUT' in block and not (directory / "OUT").is_dir():
        done = CliRunner().invoke(app, ["export", "--model", "my-gem", "--output", "OUT"])
        assert done.exit_code == 0, done.output
    if "127.0.0.1:8000" in block:
        serving = pytest.importorskip("running_server").serving  # it needs gemify[serve]
        with serving(shipped, served_model_name="my-gem") as served:
            yield block.replace("http://127.0.0.1:8000", served.url)
    else:
        yield block


def test_a_block_that_fails_is_found() -> None:
    first, second, third = (f"```python\n{code}\n```\n\n" for code in ("x = 1", "y = 2", "assert x == 2"))
    page = f"{first}<!-- not run: it needs a GPU -->\n\n{second}{third}"
    blocks = docs_checks.blocks(page)
    assert [block.not_run for block in blocks] == [None, "it needs a GPU", None]
    with pytest.raises(AssertionError):
        run([block.code for block in blocks if not block.not_run])
