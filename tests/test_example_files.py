"""The examples run as they are, on a tiny model: only their settings, the assignments in capitals, are others."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gemify import GemModel
from tiny_gems import save_gem

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("align", "convert", "finetune", "one_server", "rag_folder")
pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, **settings: Any) -> dict[str, Any]:
    """Run an example with other settings, and return its names."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    for line in tree.body:
        if isinstance(line, ast.Assign) and (given := settings.pop(ast.unparse(line.targets[0]), None)) is not None:
            line.value = ast.Constant(given)
    assert not settings, f"{name}.py has no {list(settings)}"
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), f"{name}.py", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMIFY_HOME", str(tmp_path / "home"))
    return tmp_path


def test_convert(base_dir: Path, texts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("convert", BASE=str(base_dir), TEXTS=str(texts_file), STEPS=3)
    assert names["summary"]["steps"] == 3
    assert names["vectors"].shape == (3, 32)
    assert capsys.readouterr().out.endswith("\nTrue\n")  # the logits are the base's
    assert (GemModel.from_pretrained("my-gem").encode("a") == names["gem"].encode("a")).all()


def test_finetune(base_dir: Path, directory: Path) -> None:
    pytest.importorskip("trl")
    said = [[("user", f"what is number {n}?"), ("assistant", f"it is a number, {n}")] for n in range(16)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in said]
    (directory / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = run("finetune", BASE=str(base_dir), CHATS="chats.jsonl", STEPS=10)
    logged = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert {"gem_ntp", "gem_contrastive"} <= set(logged[-1])
    assert (GemModel.from_pretrained("my-chat-gem").encode("a") == names["gem"].encode("a")).all()


def test_rag_folder(base_dir: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_gem(base_dir, directory / "gem")
    (directory / "notes").mkdir()
    for name in ("owls hunt at night", "bees dance"):
        (directory / "notes" / f"{name.split()[0]}.md").write_text(f"# {name}\n\nThey {name}.\n")
    names = run("rag_folder", MODEL="gem", FOLDER="notes", QUESTION="owls night")
    assert names["passage"].file.endswith(".md")
    assert re.search(r"2 new passages, 2 in all\n[\d.]+ .*owls.md", capsys.readouterr().out)
    assert len(names["answer"].sources()) == 2


def test_one_server(gem: GemModel) -> None:
    serving = pytest.importorskip("running_server").serving
    with serving(gem, served_model_name="tiny") as served:
        names = run("one_server", URL=f"{served.url}/v1")
    assert names["model"] == "tiny"
    assert len(names["vectors"]) == 2
    assert names["chunk"].choices[0].finish_reason


def test_align(base_dir: Path, texts_file: Path, directory: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    torch.manual_seed(0)
    parts = [models.Transformer(str(base_dir)), models.Pooling(32, "mean"), models.Dense(32, 12)]
    st.SentenceTransformer(modules=parts, device="cpu").save(str(directory / "embedder"))
    names = run("align", BASE=str(base_dir), EMBEDDER=str(directory / "embedder"), TEXTS=str(texts_file), STEPS=4)
    assert names["index"].shape == (2, 12)
    same = GemModel.similarity_pairwise(names["gem"].encode(names["PASSAGES"]), names["index"])
    assert float(same.min()) > 0.8, "the GEM lives in the embedder's space"


def test_every_example_is_run_and_found_from_the_readme() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    for name in SHORT:
        assert f"test_{name}" in globals()
        assert f"(examples/{name}.py)" in readme
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 35
