"""The verbs that time: `gemify bench rag`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Paired timings, medians and ratios.")


@bench.callback()
def _room() -> None:
    """Paired timings, medians and ratios."""


@bench.command()
def rag(
    data: Annotated[Path, typer.Option(help="Directory with corpus.jsonl and queries.jsonl (or .gz), in SQuAD form.")],
    model: Annotated[str, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id.")] = "starter",
    encoder: Annotated[
        str | None, typer.Option(help="st:PATH or st:NAME: the embedder of the two-model stack; none: left out.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many, evenly over the file.")] = 20,
    lengths: Annotated[str, typer.Option(help="Tokens of a document.")] = "250,1000,4000",
    bits: Annotated[int, typer.Option(help="Of kept caches: 32, 16, 8 or 4.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of the record.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Answers with and without retrieval, hand-over and kept caches, against a two-model stack."""
    from gemify.bench.rag import Peer, as_table, bench_rag, read_questions
    from gemify.evaluation.subjects import Settings, encoder_subject, load_encoder
    from gemify.model.gem import GemModel
    from gemify.model.storage import atomic_file

    try:
        wanted = [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--lengths must be whole numbers with commas between, got {lengths!r}") from error
    settings = Settings(dtype)
    passages, asked = read_questions(data, questions)
    peer = None
    if encoder is not None:
        subject, path = encoder_subject(encoder, settings)
        peer = Peer(subject.facts["label"], load_encoder(path, settings, device).encode)
    gem = GemModel.from_pretrained(model, device=device, dtype=settings.torch_dtype)
    report = bench_rag(
        gem,
        passages=passages,
        questions=asked,
        lengths=wanted,
        peer=peer,
        bits=bits,
        max_new_tokens=max_new_tokens,
        show_progress_bar=not quiet,
    )
    if output is not None:
        with atomic_file(output) as stage:
            stage.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(str(output), err=True)
    typer.echo(json.dumps(report) if as_json else as_table(report))
