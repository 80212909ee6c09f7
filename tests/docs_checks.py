"""What tests/test_docs.py asks of a Markdown page: its code blocks and spans, commands, names, links and defaults."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

SHELLS = {"", "sh", "bash", "shell", "console"}
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    code: str
    not_run: str | None
    """The reason that a comment right before it, ``<!-- not run: ... -->``, gives for not running it."""


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; an indented fence counts, as in lists and tabs."""
    found = []
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", page, re.MULTILINE | re.DOTALL):
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        reason = NOT_RUN.search(page[: match.start()])
        found.append(Block(match[2], code, reason[1] if reason else None))
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page, flags=re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """The inline code of a page, line breaks in it made spaces."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def missing_links(page: str, directory: Path) -> list[str]:
    """Relative links and pictures that lead to no file."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose(page))
    return [link for link in links if not (directory / link).exists()]


def bare_brackets(page: str) -> list[str]:
    """Brackets outside code that begin no link: the site takes ``[1]`` for a reference to a link that is not there."""
    text = re.sub(r"(`+).+?\1", "", prose(page), flags=re.DOTALL)
    defined = {name.lower() for name in re.findall(r"^\[([^\]]+)\]:", text, re.MULTILINE)}
    found = re.findall(r"(?<![\]\\!])\[([^\[\]]+)\](?![(:\[])", text)
    return [name for name in found if name.lower() not in defined]


# Commands


def commands(page: str) -> list[tuple[list[str], bool]]:
    """The words of each command of ``gemify`` and ``make`` in a page, and whether it is whole: a line of a block."""
    found = []
    for block in blocks(page):
        if block.language in SHELLS:
            for line in block.code.replace("\\\n", " ").splitlines():
                found += [(command, "..." not in line) for command in _commands_of(line)]
    for span in spans(page):
        found += [(command, False) for command in _commands_of(span)]
    return found


def _commands_of(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line that call gemify or make, from that word on."""
    reader = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    try:
        words = list(reader)
    except ValueError:  # a quote that is an apostrophe: output, not a command
        return
    simple: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("|&;()"):
            simple.append([])
        else:
            simple[-1].append(word)
    for command in simple:
        for at, word in enumerate(command):
            if set(word) <= set("<>"):
                del command[at:]
                break
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            del command[0]
        if command[:1] in (["gemify"], ["make"]):
            yield command
        elif "-m" in command[:-1] and command[command.index("-m") + 1] == "gemify":
            yield command[command.index("-m") + 1 :]


def wrong_command(words: Sequence[str], app: typer.Typer, targets: Iterable[str], *, whole: bool) -> str | None:
    """What is wrong with a command of ``gemify`` or ``make``, or None. ``whole``: what it requires must be there."""
    if words[0] == "make":
        unknown = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word) and word not in set(targets)]
        return f"make has no target {unknown[0]}" if unknown else None
    command: Any = typer.main.get_command(app)
    rest = [word for word in words[1:] if word != "..."]
    name = "gemify"
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"{name} has no verb {rest[0]}: {', '.join(command.commands)}"
        name, command = f"{name} {rest[0]}", command.commands[rest[0]]
        del rest[0]
    context = command.context_class(command, info_name=name)
    try:
        given, left, _ = command.make_parser(context).parse_args([word.strip("[]") for word in rest])
    except Exception as error:  # click's UsageError, which typer may bring along under a name of its own
        return f"{name}: {getattr(error, 'message', error)}"
    if left and not hasattr(command, "commands"):
        return f"{name} does not take {left[0]!r}"
    absent = [p.opts[0] for p in command.params if p.required and given.get(p.name) in (None, ())]
    return f"{name} needs {absent[0]}" if whole and absent else None


def flags(app: typer.Typer) -> dict[str, dict[str, Any]]:
    """Verb -> flag, as it is written -> its default."""
    found: dict[str, dict[str, Any]] = {}

    def visit(command: Any, name: str) -> None:
        for verb, inner in getattr(command, "commands", {}).items():
            visit(inner, f"{name} {verb}".strip())
        options = [(p, [*p.opts, *p.secondary_opts]) for p in command.params]
        found[name] = {flag: p.default for p, names in options for flag in names if flag.startswith("-")}

    visit(typer.main.get_command(app), "")
    return found


# Names


class Names:
    """What the source and the tests define, for the names that a page mentions."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [
            path.relative_to(root).as_posix()
            for folder in ("src", "tests", "docs", "recipes", "examples", "deploy")
            for path in (root / folder).rglob("*")
            if path.is_file()
        ]
        self.modules: dict[str, set[str]] = {}
        """``model/forward`` -> the names that it defines."""
        self.classes: dict[str, set[str]] = {}
        self.bases: dict[str, set[str]] = {}
        self.tests: set[str] = set()
        for path in (root / "src" / "gemify").rglob("*.py"):
            self._read_module(path)
        for path in (root / "tests").rglob("*.py"):
            functions = re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
            self.tests |= {path.stem, *functions}

    def _read_module(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(self.root / "src" / "gemify").with_suffix("").as_posix().removesuffix("/__init__")
        self.modules[name] = set(_defined(tree.body))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                members = set(_defined(node.body))
                members |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and _is_self(n.value)}
                self.classes.setdefault(node.name, set()).update(members)
                bases = {ast.unparse(base).split("[")[0].rsplit(".", 1)[-1] for base in node.bases}
                self.bases.setdefault(node.name, set()).update(bases - {node.name})

    def missing(self, span: str) -> str | None:
        """Why the name in a span of code cannot be right, or None: it exists, or is no name of ours."""
        if re.fullmatch(r"test_\w+", span):
            return None if span in self.tests else f"there is no test {span}"
        if found := re.fullmatch(r"([\w./-]+\.py)(?:::? ?(\w+))?", span):
            return self._missing_in_file(*found.groups())
        if re.fullmatch(r"(src|tests|docs|recipes|examples|deploy)/[\w./-]+", span):
            return None if (self.root / span).exists() else f"there is no {span}"
        if found := re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(\(.*\))?", span):
            return self._missing_dotted(found[1].split("."))
        return None

    def _members(self, name: str) -> set[str]:
        inherited = (self._members(base) for base in self.bases.get(name, ()))
        return self.classes.get(name, set()).union(*inherited)

    def _missing_in_file(self, path: str, name: str | None) -> str | None:
        found = [file for file in self.files if f"/{file}".endswith(f"/{path}")]
        if not found:
            return f"there is no {path}"
        if name and not any(re.search(rf"\b(def|class) {name}\b", (self.root / f).read_text()) for f in found):
            return f"there is no {name} in {path}"
        return None

    def _missing_dotted(self, parts: list[str]) -> str | None:
        if parts[0] == "gem":
            parts = ["GemModel", *parts[1:]]
        if parts[0] in self.classes:
            return None if parts[1] in self._members(parts[0]) else f"{parts[0]} has no {parts[1]}"
        rooms = {name.split("/")[0] for name in self.modules if "/" in name}
        if parts[0] != "gemify" and parts[0] not in rooms:
            return None
        rest = parts[1:] if parts[0] == "gemify" else parts
        for end in range(len(rest), 0, -1):
            module = "/".join(rest[:end])
            if module in self.modules:
                names = rest[end:]
                if not names or names[0] in self.modules[module]:
                    return self._missing_dotted(names) if len(names) > 1 else None
                return f"there is no {names[0]} in {module}"
        if len(rest) == 1 and parts[0] == "gemify" and rest[0] in self.classes:
            return None
        return f"there is no module {'.'.join(parts)}"


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _defined(body: Iterable[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If):
            yield from _defined([*node.body, *node.orelse])


# Defaults


class StatedDefault(NamedTuple):
    """A default as a page's table states it."""

    name: str
    """A flag (``--max-num-seqs``), or the name of a field."""
    text: str
    before: str
    """The page up to the table, which says whose flag it is."""


def stated_defaults(page: str) -> list[StatedDefault]:
    """The defaults of each table that has a column ``default`` and names options in its first column."""
    found = []
    for table in re.finditer(r"^\|.*\|\n\|[-:| ]+\|\n(?:\|.*\|\n?)+", page, re.MULTILINE):
        header, _, *rows = [_cells(line) for line in table[0].splitlines()]
        titles = [cell.strip("*_` ").lower() for cell in header]
        if "default" not in titles[1:]:
            continue
        for row in rows:
            names = re.findall(r"`(-{0,2}[a-z][\w-]*)[^`]*`", row[0])
            texts = [text.strip() for text in row[titles.index("default")].split(", ")]
            texts += [texts[-1]] * (len(names) - len(texts)) if len(texts) != len(names) else []
            found += [
                StatedDefault(name, text, page[: table.start()]) for name, text in zip(names, texts, strict=False)
            ]
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9, "s": 1, "seconds": 1}


def states(text: str, value: Any) -> bool:
    """Whether a table's text gives this default: ``16 MiB``, ``none``, ``no``, ``1e-3``, ``paper``.

    A text that is none of these (``the directory's name``) says what happens without a value: there must be none.
    """
    bare = text.strip("`*").replace(",", "")
    if isinstance(value, bool):
        return bare in (("yes", "on", "true") if value else ("no", "off", "false"))
    if isinstance(value, int | float):
        number = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?)(?: (\w+))?", bare)
        return bool(number) and float(number[1]) * _UNITS.get(number[2] or "s", float("nan")) == value
    if isinstance(value, str):
        return bare == value
    return not re.fullmatch(r"-?[\d.]+( \w+)?|yes|no", bare)


def field_defaults(kind: type) -> dict[str, Any]:
    """Field -> default of a dataclass or a pydantic model; None where a field has none, or is made anew."""
    if dataclasses.is_dataclass(kind):
        given = {field.name: field.default for field in dataclasses.fields(kind)}
        return {name: None if value is dataclasses.MISSING else value for name, value in given.items()}
    fields: dict[str, Any] = vars(kind)["__pydantic_fields__"]
    return {name: field.get_default() for name, field in fields.items()}
