"""The verb `gemify cache`: GGUF models that were converted on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from gemify.cli.options import Json, echo_err, print_json


def cache(
    action: Annotated[str, typer.Argument(help="show lists the models, clear removes them.")] = "show",
    as_json: Json = False,
) -> None:
    """Show or clear the cache of converted GGUF models ($GEMIFY_HOME, or gemify in the user's cache directory)."""
    if action not in ("show", "clear"):
        raise typer.BadParameter(f"the action must be show or clear, got {action!r}")
    from gemify.model import gguf_cache

    if action == "clear":
        freed = gguf_cache.clear()
        if as_json:
            print_json({"path": str(gguf_cache.cache_directory()), "freed_bytes": freed})
        else:
            echo_err(f"removed {freed / 1e6:,.0f} MB")
        return
    entries = gguf_cache.list_entries()
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        listed = [{"path": str(entry.path), "bytes": entry.size_bytes} for entry in entries]
        print_json({"path": str(gguf_cache.cache_directory()), "entries": listed, "bytes": total})
        return
    for entry in entries:
        typer.echo(f"{entry.path.name}  {entry.size_bytes / 1e6:,.0f} MB")
    typer.echo(f"{len(entries)} models, {total / 1e6:,.0f} MB in {gguf_cache.cache_directory()}")
