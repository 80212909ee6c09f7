"""What tests/test_house.py asks of source code: who imports whom, how long things are, which words are retired."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

RETIRED_NAMES = frozenset(
    # Of the private vocabulary that the field's words replaced, those that nobody would use for something else.
    """
    Access Asking Closed Contestants Decoding Documents Handle House Meter Order Place Prefixes Replies Share
    Starts Subject Visit Wish Word Writing WritingJob
    adapts_to_length add_up adopt arithmetic begun better_after called dealt first_layers followed house
    house_of in_place in_words lasting let_in likeliest max_rows max_waiting opening prefix_bytes settled
    spelled step_tokens sweep tell told too_slow took uncounted while_there wish worth_keeping write_down
    """.split()  # noqa: SIM905
)
"""Names that no class, function, parameter, attribute or variable of src has, a leading underscore or not."""

RETIRED_PHRASES = (
    r"(?<!test_)\bhouse\b",
    r"\bquick look\b",
    r"\bcontestants?\b",
    r"\bdealt\b",
    r"\bknock",
    r"\bthe books\b",
    r"\bcut up\b",
    r"--max-rows\b",
    r"--max-waiting\b",
)
"""Regular expressions of phrases that no text of src, docs or README has. docs/log is history, and keeps its words."""


def module_name(path: Path, source: Path) -> str:
    """``gemify.model.gem`` for ``src/gemify/model/gem.py``, where ``source`` is ``src``."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names that the code imports, anywhere in it; ``from a import b`` gives ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module name -> modules among the same sources that it imports: at its top, under TYPE_CHECKING, in functions."""
    graph = {}
    for name, source in sources.items():
        graph[name] = {n for n in imported_names(ast.parse(source)) if n in sources and n != name}
        ancestors = {name.rsplit(".", up)[0] for up in range(1, name.count(".") + 1)}
        graph[name] -= ancestors  # a package's own __init__ holds no code of ours but the names it hands out
    return graph


def rooms_of(graph: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """The graph of rooms, the packages right under ``gemify``, that a graph of modules makes."""
    rooms: dict[str, set[str]] = {}
    for name, known in graph.items():
        room = _room(name)
        rooms.setdefault(room, set()).update(other for other in map(_room, known) if other != room)
    rooms.pop("", None)
    return {room: known - {""} for room, known in rooms.items()}


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def find_circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Circles of a graph, each as the way round: ``[a, b, a]``. One for every knot, not every circle in it."""
    circles: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> None:
        if node in way:
            circles.append([*way[way.index(node) :], node])
        elif node not in done:
            for known in sorted(graph.get(node, ())):
                visit(known, [*way, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return circles


def long_functions(source: str, limit: int = MAX_FUNCTION_LINES) -> list[str]:
    """``name (lines)`` of the functions that are longer than the limit, decorators not counted."""
    return [
        f"{node.name} ({lines})"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > limit
    ]


def code_without_texts(source: str) -> str:
    """Code without its docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def retired_names(source: str, retired: Iterable[str] = RETIRED_NAMES) -> set[str]:
    """Retired names that the code defines: what it calls by such a name of others' is theirs."""
    return {name for name in _defined_names(ast.parse(source)) if name.lstrip("_") in set(retired)}


def _defined_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def retired_phrases(text: str, retired: Iterable[str] = RETIRED_PHRASES) -> list[str]:
    """``line: phrase`` of each retired phrase in a text, whatever its case; a line break in it counts as a space."""
    found = []
    for pattern in retired:
        for match in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
            found.append(f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return found
