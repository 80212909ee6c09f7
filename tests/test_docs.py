"""README and docs name commands, files, functions, tests and defaults that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import docs_checks
from gemify.cli.main import app
from gemify.serving.settings import ServerSettings
from gemify.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
TODAY = [name for name in PAGES if not name.startswith("docs/log")]
"""The log is history: the names and commands in it are those of their day."""
NAMES = docs_checks.Names(ROOT)
TARGETS = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
TARGETS = [target for line in TARGETS for target in line.split()]
FLAGS = docs_checks.flags(app)
FIELDS = [docs_checks.field_defaults(kind) for kind in (ServerSettings, Recipe)]
OTHERS_FLAGS: set[str] = set()
"""Flags of other programs that the docs mention."""


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    missing = docs_checks.missing_links(PAGES[name], (ROOT / name).parent)
    assert not missing, f"{name} links to {missing}"


@pytest.mark.parametrize("name", PAGES)
def test_brackets_outside_code_are_links(name: str) -> None:
    assert not docs_checks.bare_brackets(PAGES[name])


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_lines_are_short(name: str) -> None:
    """Prose is read in an editor too. Rows of tables cannot be broken."""
    text = docs_checks.prose((ROOT / name).read_text(encoding="utf-8"))
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not long


@pytest.mark.parametrize("name", TODAY)
def test_docs_name_functions_and_tests_that_exist(name: str) -> None:
    missing = [why for span in docs_checks.spans(PAGES[name]) if (why := NAMES.missing(span))]
    assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", TODAY)
def test_commands_of_the_docs_are_taken(name: str) -> None:
    wrong = [
        f"{' '.join(words)}: {why}"
        for words, whole in docs_checks.commands(PAGES[name])
        if (why := docs_checks.wrong_command(words, app, TARGETS, whole=whole))
    ]
    known = {flag for verb in FLAGS.values() for flag in verb} | OTHERS_FLAGS
    spans = docs_checks.spans(PAGES[name])
    wrong += [f"no verb has {span}" for span in spans if (f := re.match(r"--[a-z-]+", span)) and f[0] not in known]
    assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("name", TODAY)
def test_defaults_in_tables_are_the_codes(name: str) -> None:
    wrong = [
        f"{stated.name} is not {stated.text} but {_defaults_of(stated)}"
        for stated in docs_checks.stated_defaults(PAGES[name])
        if not any(docs_checks.states(stated.text, value) for value in _defaults_of(stated))
    ]
    assert not wrong, f"{name}: {wrong}"


def _defaults_of(stated: docs_checks.StatedDefault) -> list[Any]:
    """The default of an option: of the field of that name, else of the flag of the verb that the page named last."""
    field = stated.name.removeprefix("--").replace("-", "_")
    values = [fields[name] for fields in FIELDS for name in (field, f"{field}s") if name in fields]
    verbs = sorted(FLAGS, key=lambda verb: -max(stated.before.rfind(f"gemify {verb}"), -1))
    return values or [FLAGS[verb][stated.name] for verb in verbs if stated.name in FLAGS[verb]][:1]


def test_documents_that_code_names_exist() -> None:
    paths = [p for f in ("src", "tests", "recipes", "examples", "deploy") for p in (ROOT / f).rglob("*") if p.is_file()]
    for path in [*paths, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        if path.suffix in {".py", ".yaml", ".js", ".service", ".md", ".toml", ""}:
            for document in re.findall(r"\bdocs/[\w/.-]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / document).is_file() or path == Path(__file__), f"{path.relative_to(ROOT)}: {document}"


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ("test_that_nobody_wrote", "no test test_that_nobody_wrote"),
        ("paper/masque.py", "no paper/masque.py"),
        ("tests/paper/test_masque.py", "no tests/paper/test_masque.py"),
        ("paper/mask.py: forgotten", "no forgotten in paper/mask.py"),
        ("recipes/none.yaml", "no recipes/none.yaml"),
        ("gemify.model.gem.GemModel.encoded(x)", "GemModel has no encoded"),
        ("gemify.gone", "no module gemify.gone"),
        ("gemify.model.gone", "no gone in model"),
        ("paper.mask.forgotten", "no forgotten in paper/mask"),
        ("GemModel.encoded", "GemModel has no encoded"),
        ("gem.encoded(text)", "GemModel has no encoded"),
    ],
)
def test_a_name_that_does_not_exist_is_found(span: str, why: str) -> None:
    assert why in str(NAMES.missing(docs_checks.spans(f"See `{span}`.")[0]))


@pytest.mark.parametrize(
    "span",
    [
        "test_docs",
        "test_links_lead_somewhere",
        "paper/mask.py",
        "mask.py",
        "tests/test_docs.py",
        "GemModel.encode",
        "gem.encode(text)",
        "gemify.GemModel",
        "gemify.model.gem.GemModel.encode",
        "torch.nn.Linear",
        "metrics.jsonl",
    ],
)
def test_a_name_that_exists_is_left_alone(span: str) -> None:
    assert NAMES.missing(span) is None


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("gemify tarin --data x", "gemify has no verb tarin"),
        ("gemify train --data x --outptu y", "No such option: --outptu"),
        ("X=1 accelerate launch -m gemify train --data x --outptu y", "No such option: --outptu"),
        ("gemify bench encoed", "gemify bench has no verb encoed"),
        ("gemify train --data x", "gemify train needs --output"),
        ("gemify train --data x --output y z  # a comment", "gemify train does not take 'z'"),
        ("true && make tset", "make has no target tset"),
    ],
)
def test_a_wrong_command_is_found(command: str, why: str) -> None:
    ((words, whole),) = docs_checks.commands(f"Say:\n\n```bash\n{command}\n```\n")
    assert why in str(docs_checks.wrong_command(words, app, TARGETS, whole=whole))


def test_a_command_in_a_sentence_may_leave_things_out() -> None:
    ((words, whole),) = docs_checks.commands("Say `gemify train --tune full`.")
    assert docs_checks.wrong_command(words, app, TARGETS, whole=whole) is None
    ((words, whole),) = docs_checks.commands("Say `gemify train --tuen full`.")
    assert "--tuen" in str(docs_checks.wrong_command(words, app, TARGETS, whole=whole))


def test_a_wrong_default_is_found() -> None:
    page = "`gemify serve`\n\n| option | default | |\n|---|---|---|\n| `--host`, `--port` | `127.0.0.1`, 8001 | x |\n"
    host, port = docs_checks.stated_defaults(page)
    assert [docs_checks.states(host.text, value) for value in _defaults_of(host)] == [True]
    assert [docs_checks.states(port.text, value) for value in _defaults_of(port)] == [False]
    assert not _defaults_of(docs_checks.StatedDefault("--prot", "1", page))


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("16 MiB", 16 << 20, True),
        ("16 MB", 16 << 20, False),
        ("`1e-3`", 0.001, True),
        ("no", False, True),
        ("yes", False, False),
        ("none", None, True),
        ("the directory's name", None, True),
        ("the directory's name", "starter", False),
        ("8000", None, False),
    ],
)
def test_a_default_is_read_as_a_reader_would(text: str, value: Any, right: bool) -> None:
    assert docs_checks.states(text, value) is right


def test_a_bare_bracket_is_found() -> None:
    page = "See [1], [a link](x.md), ![a picture](y.png), [known], `[code]` and \\[escaped].\n\n[known]: z.md\n"
    assert docs_checks.bare_brackets(page) == ["1"]


def test_a_link_to_nothing_is_found(tmp_path: Path) -> None:
    assert docs_checks.missing_links("[a](b.md#c), ![d](e.png), [f](http://g), [h](#i)", tmp_path) == ["b.md", "e.png"]
