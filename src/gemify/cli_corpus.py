"""The verb over corpora larger than memory, `gemify embed-corpus`, and `gemify bench vectors`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemify.cli_bench import Json, Output, Quiet, bench, give
from gemify.cli_rag import Base, Device, Dtype, lasting, load_gem, say

_SHOWN_BAD = 20


def embed_corpus(
    inputs: Annotated[
        list[str], typer.Argument(help=".parquet and .jsonl(.gz) files of rows, or directories of them.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory of the corpus, or a URI such as s3://...")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="starter, a GEM directory or a repo id. [default: the corpus', or starter]"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the vectors: float32, float16, int8 or binary. [default: float16]")
    ] = None,
    format: Annotated[str | None, typer.Option(help="lance, which is searched, or parquet. [default: lance]")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text. [default: text]")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column that holds the title. [default: title]")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column that holds the id. [default: _id or id, else file and row]")
    ] = None,
    keep_text: Annotated[
        bool | None, typer.Option("--keep-text/--no-keep-text", help="Keep texts beside the vectors. [default: keep]")
    ] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows that are done or not done. [default: 1024]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to embed now, in whole shards.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave rows out that cannot be read.")] = False,
    index: Annotated[
        str, typer.Option(help="Of the vectors: auto, none, flat, sq (8 bits), rq (1 bit) or pq (codes).")
    ] = "auto",
    engine: Annotated[str, typer.Option(help="local, or ray: on a cluster (RAY_ADDRESS) or this machine.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of Ray. [default: one a GPU; without any, one a machine]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Most passages a batch.")] = 32,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Embed a corpus larger than memory; run it again to go on where it stopped."""
    from gemify.corpus.plan import find_inputs
    from gemify.corpus.run import begun
    from gemify.corpus.run import embed_corpus as run
    from gemify.rag.corpus import PQ_FROM

    find_inputs(inputs)  # a wrong path is said before a model is loaded
    there = begun(output)
    name = lasting(model or (there.model if there else "") or "starter")
    precise = dtype or (there.dtype if there else "float32")
    gem = load_gem(name, base, precise, "cpu" if engine == "ray" else device)
    report = run(
        inputs,
        output,
        gem,
        model_name=name,
        base=base,
        device=device,
        engine=engine,  # type: ignore[arg-type]
        workers=workers,
        batch_size=batch_size,
        limit=limit,
        skip_bad=skip_bad,
        index=index,  # type: ignore[arg-type]
        show_progress_bar=not quiet,
        precision=precision,
        format=format,
        text_column=text_column,
        title_column=title_column,
        id_column=id_column,
        keep_text=keep_text,
        shard_rows=shard_rows,
        dtype=precise,
    )
    if index == "pq" and not report.left and report.rows < PQ_FROM:
        say(f"no pq index on {report.rows:,} rows (it needs {PQ_FROM}): a search compares them all")
    _tell(report, output, as_json)


def _tell(report: Any, output: str, as_json: bool) -> None:
    for line in report.bad[:_SHOWN_BAD]:
        say(f"skipped {line}")
    if (more := report.skipped - len(report.bad[:_SHOWN_BAD])) > 0:
        say(f"skipped {more:,} more")
    if as_json:
        speed = {"rows_per_second": report.rows_per_second, "tokens_per_second": report.tokens_per_second}
        typer.echo(json.dumps({"corpus": output, **dataclasses.asdict(report), **speed}, ensure_ascii=False))
    else:
        per_second = f"{report.rows_per_second:,.1f} rows/s, {report.tokens_per_second:,.0f} tokens/s"
        say(f"{report.embedded:,} rows embedded" + (f" ({per_second})" if report.embedded else ""))
        if report.indexes:
            say(f"indexed: {', '.join(report.indexes)}")
        typer.echo(f"{report.rows:,} rows in {output}" + (f", {report.left:,} left" if report.left else ""))
    if report.stopped:
        raise ValueError("stopped by a signal: what is done stays, run the same command again to go on")


@bench.command()
def vectors(
    count: Annotated[int, typer.Option(min=1000, help="How many vectors.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=8, help="Numbers of a vector, a multiple of 8.")] = 576,
    queries: Annotated[int, typer.Option(min=1, help="How many searches of each kind.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the vectors.")] = 0,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this: exact, flat, sq, pq, rq or binary; may be repeated.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where the corpora are made, and deleted again. [default: the system's]")
    ] = None,
    output: Output = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write, index and search synthetic vectors: seconds, recall against exact search, bytes and memory."""
    from gemify.bench.vectors import as_table, bench_vectors

    report = bench_vectors(
        count=count, dim=dim, queries=queries, seed=seed, kinds=kind, directory=directory, show_progress_bar=not quiet
    )
    give(report, as_table(report), output, as_json)


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("embed-corpus")(embed_corpus)
