"""The verb `gemify bench encode`: tokens a second against other ways to embed with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemify.cli_bench import Device, Dtype, Json, Output, Quiet, give


def encode(
    data: Annotated[Path, typer.Option(help=".jsonl[.gz] with `text`, or a directory with corpus.jsonl[.gz].")],
    model: Annotated[str, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id.")] = "starter",
    count: Annotated[int, typer.Option(min=1, help="How many texts, evenly over the file.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side embeds them.")] = 3,
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one; may be repeated: gemify; 'gemify, compiled'; 'gemify, gated'; sentence-transformers;"
            " bidirectional; Echo."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Columns of our batches. [default: what suits the device]")
    ] = None,
    dtype: Dtype = "float32",
    plot: Annotated[Path | None, typer.Option(help="Image file (.png, .svg) of the figures.")] = None,
    output: Output = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tokens a second of `encode`, against sentence-transformers, bidirectional and Echo encoding."""
    from gemify.bench.encode import SIDES, as_table, bench_encode, read_texts
    from gemify.bench.encode import plot as drawn
    from gemify.evaluation.subjects import Settings

    report = bench_encode(
        model,
        read_texts(data, count),
        dtype=Settings(dtype).torch_dtype,
        device=device,
        sides=side or SIDES,
        rounds=rounds,
        max_tokens=max_tokens,
        show_progress_bar=not quiet,
    )
    give(report, as_table(report), output, as_json)
    if plot is not None:
        drawn(report).savefig(plot)


def register(bench: typer.Typer) -> None:
    bench.command()(encode)
