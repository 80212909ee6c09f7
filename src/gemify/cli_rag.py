"""The verbs over a store of passages: `gemify index` and `search`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

StoreUri = Annotated[str, typer.Option("--store", "-s", help="Directory of the index, or a URI such as s3://...")]
Base = Annotated[str | None, typer.Option("--base", help="Look for the base model here instead.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... [default: the accelerator if there is one]")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

_SHOWN_SKIPPED = 20


def index(
    paths: Annotated[
        list[Path], typer.Argument(help="Files and directories: text, Markdown, HTML, PDF, Word, JSON lines, source.")
    ],
    store: StoreUri,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="starter, a GEM directory or a repo id. [default: the store's, or starter]"),
    ] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Most tokens of a passage. [default: 256]")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Tokens a passage repeats of the one before. [default: 32]")
    ] = None,
    context: Annotated[
        bool | None, typer.Option("--context/--no-context", help="Embed title and headings with a passage, or not.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, float16, int8 or binary; the last two rescore. [default: float32]")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl rows that holds the text.")] = "text",
    title_column: Annotated[str, typer.Option(help="Column of .jsonl rows that holds the title.")] = "title",
    limit: Annotated[int | None, typer.Option(min=1, help="Most new or changed files to take in now.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most passages a batch.")] = 32,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read, cut and embed files into a store; run it again to bring the store up to date."""
    from gemify.rag.index import GemIndex, Stopped
    from gemify.rag.reading import find_files
    from gemify.rag.store import Store

    find_files(paths)  # a wrong path is said before a model is loaded
    name = model or (Store.open(store).meta.model if Store.exists(store) else "") or "starter"
    options: Any = {"tokens": chunk_tokens, "overlap": overlap, "context": context, "precision": precision}
    opened = GemIndex.open(store, load_gem(name, base, dtype, device), model_name=_lasting(name), **options)
    try:
        report = opened.add(
            paths,
            text_column=text_column,
            title_column=title_column,
            limit=limit,
            batch_size=batch_size,
            show_progress_bar=not quiet,
        )
    except Stopped as stopped:
        raise ValueError(str(stopped)) from stopped
    for skipped in report.skipped[:_SHOWN_SKIPPED]:
        say(f"skipped {skipped.path}: {skipped.reason}")
    if (more := len(report.skipped) - _SHOWN_SKIPPED) > 0:
        say(f"skipped {more:,} more; --json names them all")
    if as_json:
        facts = dataclasses.asdict(report)
        _print({"store": store, "passages": len(opened), **facts, "tokens_per_second": report.tokens_per_second})
        return
    say(
        f"{len(report.added):,} files added, {len(report.changed):,} changed, {len(report.removed):,} removed,"
        f" {report.unchanged:,} unchanged; {report.chunks:,} passages embedded"
        + (f" ({report.tokens_per_second:,.0f} tokens/s)" if report.seconds else "")
    )
    typer.echo(f"{len(opened):,} passages in {store}")


def search(
    query: Annotated[str, typer.Argument(help="A question, or words to look for.")],
    store: StoreUri,
    k: Annotated[int, typer.Option("-k", min=1, help="How many passages.")] = 5,
    mode: Annotated[str, typer.Option(help="vector (meaning), fts (words, BM25) or hybrid.")] = "hybrid",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id. [default: the store's]")
    ] = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show the passages of a store that fit a question best."""
    from typing import get_args

    from gemify.rag.index import GemIndex, Mode
    from gemify.rag.store import Store

    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
    name = model or Store.open(store).meta.model or "starter"
    needed = None if mode == "fts" and model is None else load_gem(name, base, dtype, device)
    passages = GemIndex.open(store, needed, create=False).search(query, k=k, mode=mode)  # type: ignore[arg-type]
    for number, passage in enumerate(passages, start=1):
        if as_json:
            _print(dataclasses.asdict(passage))
            continue
        where = ", ".join(filter(None, (passage.file, passage.place, passage.heading or passage.title)))
        typer.echo(f"[{number}] {passage.score:.4f}  {where}")
        typer.echo("".join(f"    {line}\n" for line in passage.text.splitlines()))
    if not passages and not as_json:
        say("nothing found")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    verbs: dict[str, Callable[..., None]] = {"index": index, "search": search}
    for name, verb in verbs.items():
        app.command(name)(verb)


def load_gem(model: str, base: str | None, dtype: str | None, device: str | None) -> Any:
    from gemify.model.gem import GemModel

    loading: Any = {"device": device} if dtype is None else {"device": device, "dtype": dtype}
    return GemModel.from_pretrained(model, base=base, **loading)


def _lasting(model: str) -> str:
    """A model's name that still finds it from another working directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def say(text: str) -> None:
    typer.echo(text, err=True)
