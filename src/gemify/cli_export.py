"""The verb `gemify export`: a GEM for engines that know nothing of gemify."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from gemify.cli_rag import Base, Json, load_gem, say

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as the model is stored]")]


def export(
    model: Annotated[str, typer.Option("--model", "-m", help="starter, a GEM directory or a Hugging Face repo id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    base: Base = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Write a GEM as plain directories for sentence-transformers, vLLM, llama.cpp and PEFT (docs/engines.md)."""
    from gemify.model.config import GemConfig, resolve_directory
    from gemify.model.export import export as write
    from gemify.model.export import require_exportable

    config = GemConfig.from_directory(resolve_directory(model))
    require_exportable(config, output, dtype)  # said before a model is loaded
    written = write(load_gem(model, base, None, "cpu"), output, dtype=dtype)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(written), "directory": str(output)}, ensure_ascii=False))
        return
    say(f"special token: {' '.join(written.special_tokens)}")
    for name in written.embedding:
        say(f"{output / name}: for sentence-transformers and vLLM")
    for name in written.adapters:
        say(f"{output / name}: acts at the special token; vectors without it are untrained")
    typer.echo(str(output))


def register(app: typer.Typer) -> None:
    app.command()(export)
