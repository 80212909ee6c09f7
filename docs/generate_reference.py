"""Copy docs/ to a folder and add the reference pages made from the code: flags, routes, recipe fields.

    python docs/generate_reference.py build/docs

`make docs` runs it before it builds the site.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import griffe
from fastapi import APIRouter, FastAPI
from typer.main import get_command

import gemify.cli.main
from gemify.serving import routes
from gemify.training.recipe import Recipe

DOCS = Path(__file__).parent
COMMAND: Any = get_command(gemify.cli.main.app)

COMMAND_LINE = """# Command line

Every verb and flag of `gemify`, from the command itself. `gemify VERB --help` prints the same.

```console
$ gemify --version
{version}
```
"""
ROUTES = """# HTTP routes

Every route of `gemify serve` and the fields it reads, from the server's own OpenAPI description.
A running server gives the description itself:

```
curl http://127.0.0.1:8000/openapi.json
```

[Run the server](../how-to/serve.md) says what the routes are for.
"""
RECIPE = """# Recipe fields

Every entry of a YAML recipe for `gemify train --config`, from the dataclass `gemify.training.recipe.Recipe`.
A flag of the same name, with `-` for `_`, wins over the file.

```
gemify train --config recipes/gated.yaml --data texts.txt --output my-gem
```

| field | type | default | |
|---|---|---|---|
"""


def command_line() -> str:
    """Typer's own description of the command, under a title of ours."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "gemify.cli.main", "utils", "docs", "--name", "gemify"],
        capture_output=True,
        text=True,
        check=True,
    )
    body = made.stdout.partition("**Usage**")[2].replace("&#x27;", "'")
    body = re.sub(r"(?m)^(\* `[^`]*`:.*)$", lambda line: line[0].replace("[", "\\["), body)
    for name, verb in COMMAND.commands.items():  # whole sentences: typer cuts them
        first = (verb.help or "").partition("\n\n")[0]
        line = f"* `{name}`: {_line(first)}"
        body = re.sub(rf"(?m)^\* `{name}`: .*$", lambda _, line=line: line, body, count=1)
    return f"{COMMAND_LINE.format(version=gemify.__version__)}\n**Usage**{body}"


def http_routes() -> str:
    """The routes' description as tables: one section a route, one section a body."""
    app = FastAPI()
    for module in pkgutil.iter_modules(routes.__path__, f"{routes.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, APIRouter):
                app.include_router(value)
    described = app.openapi()
    lines = [ROUTES]
    for path, methods in sorted(described["paths"].items()):
        for method, facts in methods.items():
            lines += [f"## `{method.upper()} {path}`", "", facts.get("description") or facts["summary"], ""]
            body = facts.get("requestBody", {}).get("content", {})
            lines += [f"- Body: {_kind(kind['schema'])}" for kind in body.values()]
            answers = facts["responses"].get("200", {}).get("content", {})
            lines += [f"- Answer: {_kind(kind['schema'])}" for kind in answers.values() if kind.get("schema")]
            lines.append("")
    lines += ["## Bodies and answers", ""]
    for name, schema in sorted(described["components"]["schemas"].items()):
        if "ValidationError" in name or "properties" not in schema:
            continue
        lines += [f"### {name}", "", _line(schema.get("description", "")), ""]
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        for field, facts in schema["properties"].items():
            default = "required" if field in schema.get("required", ()) else _default(facts)
            lines.append(f"| `{field}` | {_kind(facts)} | {default} | {_line(facts.get('description', ''))} |")
        lines.append("")
    return "\n".join(lines)


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words, bodies as links to their sections."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_kind(s) for s in schema[key]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _default(facts: dict[str, Any]) -> str:
    return f"`{facts['default']}`" if facts.get("default") is not None else ""


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|").replace("[", "\\[")


def recipe() -> str:
    """The recipe's fields: what a field says of itself, else what its flag says."""
    flags = {p.name: p.help for p in COMMAND.commands["train"].params}
    source = griffe.load("gemify.training.recipe", search_paths=[str(DOCS.parent / "src")])["Recipe"]
    hints = typing.get_type_hints(Recipe)
    rows = []
    for field in dataclasses.fields(Recipe):
        says = source[field.name].docstring
        what = says.value if says else flags.get(field.name) or ""
        rows.append(f"| `{field.name}` | {_type(hints[field.name])} | `{_yaml(field.default)}` | {_line(what)} |")
    return RECIPE + "\n".join(rows) + "\n"


def _type(hint: Any) -> str:
    """A type as one writes it in YAML."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(typing.get_args(hint)[0])}"
    if arguments := typing.get_args(hint):
        return " or ".join(_type(argument) for argument in arguments)
    return "null" if hint is type(None) else str(hint.__name__)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def main(output: Path) -> None:
    """Write the whole folder anew."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(DOCS, output, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, write in (("command-line", command_line), ("http-routes", http_routes), ("recipe", recipe)):
        (output / "reference" / f"{name}.md").write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
