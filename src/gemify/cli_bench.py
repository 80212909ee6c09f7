"""The verbs that compare: `gemify bench rag`, `retrieval`, `search`, `serve` and `train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.rag.index import GemIndex

Data = Annotated[Path, typer.Option(help="Directory with corpus.jsonl and queries.jsonl (or .gz), in SQuAD form.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of the record.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

bench = typer.Typer(no_args_is_help=True, help="Paired timings, medians and ratios.")


@bench.callback()
def _room() -> None:
    """Paired timings, medians and ratios."""


@bench.command()
def rag(
    data: Data,
    model: Annotated[str, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id.")] = "starter",
    encoder: Annotated[
        str | None, typer.Option(help="st:PATH or st:NAME: the embedder of the two-model stack; none: left out.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many, evenly over the file.")] = 20,
    lengths: Annotated[str, typer.Option(help="Tokens of a document.")] = "250,1000,4000",
    bits: Annotated[int, typer.Option(help="Of kept caches: 32, 16, 8 or 4.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row and those it is compared with; may be repeated.")
    ] = None,
    dtype: Dtype = "float32",
    output: Output = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answers with and without retrieval, hand-over and kept caches, against a two-model stack."""
    from gemify.bench.questions import read_questions
    from gemify.bench.rag import Peer, as_table, bench_rag
    from gemify.evaluation.subjects import Settings, encoder_subject, load_encoder
    from gemify.model.gem import GemModel

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
        only=row or (),
        show_progress_bar=not quiet,
    )
    give(report, as_table(report), output, as_json)


@bench.command()
def retrieval(
    store: Annotated[str, typer.Option("--store", "-s", help="An index of the corpus.jsonl in --data.")],
    data: Data,
    questions: Annotated[int | None, typer.Option(min=1, help="How many, evenly over the file. [default: all]")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="[default: the store's]")] = None,
    dtype: Dtype = "float32",
    output: Output = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Recall and MRR of vector, full-text and hybrid search."""
    from gemify.bench.questions import read_questions
    from gemify.bench.retrieval import as_table, bench_retrieval

    _, asked = read_questions(data, questions)
    gem, index = _opened(store, model, dtype, device)
    report = bench_retrieval(gem, index, asked, show_progress_bar=not quiet)
    give(report, as_table(report), output, as_json)


@bench.command()
def search(
    store: Annotated[str, typer.Option("--store", "-s", help="Directory of the index, or a URI such as s3://...")],
    queries: Annotated[int, typer.Option(min=1, help="How many searches of each kind.")] = 200,
    k: Annotated[int, typer.Option("-k", min=1, help="How many passages a search finds.")] = 10,
    model: Annotated[str | None, typer.Option("--model", "-m", help="[default: the store's]")] = None,
    dtype: Dtype = "float32",
    output: Output = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Milliseconds of vector, full-text and hybrid search, apart from embedding."""
    from gemify.bench.search import as_table, bench_search

    gem, index = _opened(store, model, dtype, device)
    report = bench_search(gem, index, queries=queries, k=k, show_progress_bar=not quiet)
    give(report, as_table(report), output, as_json)


@bench.command()
def serve(
    model: Annotated[str, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id.")] = "starter",
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Directory or name of a sentence-transformers model: the second server. [default: the model]"
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Look for the base model here instead.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="How many, half chats and half embeddings.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="How many ask at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="How often each set-up is loaded.")] = 2,
    dtype: Dtype = "float32",
    output: Output = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """One server for both jobs against two servers: throughput, latency, memory."""
    from gemify.bench.serve import Setup, as_table, bench_serve

    report = bench_serve(
        Setup(model, dtype, encoder, base),
        requests=requests,
        clients=clients,
        max_tokens=max_new_tokens,
        rounds=rounds,
        show_progress_bar=not quiet,
    )
    give(report, as_table(report), output, as_json)


@bench.command()
def train(
    data: Annotated[str, typer.Option(help=".txt, .jsonl or .parquet file of training texts, or a data set's name.")],
    base: Annotated[
        str, typer.Option("--base", "--model", "-m", help="Directory, repo id, .gguf, or starter.")
    ] = "starter",
    kind: Annotated[
        list[str] | None, typer.Option(help="full, gated or contrastive; may be repeated. [default: all]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each kind, after one to warm up.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a next-token step.")] = 32,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of a contrastive step.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Most tokens of a text.")] = 128,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Image file (.svg, .png) of the ratios.")] = None,
    output: Output = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Seconds of each kind of training step, against a plain causal-LM step on the same tokens."""
    from gemify.bench.train import KINDS, as_table, bench_train
    from gemify.bench.train import plot as drawn

    report = bench_train(
        data,
        base=base,
        kinds=kind or KINDS,
        steps=steps,
        rows=rows,
        pairs=pairs,
        max_length=max_length,
        precision=precision,
        device=device,
        show_progress_bar=not quiet,
    )
    give(report, as_table(report), output, as_json)
    if plot is not None:
        drawn(report).savefig(plot)


def _opened(store: str, model: str | None, dtype: str, device: str | None) -> tuple[GemModel, GemIndex]:
    from gemify.evaluation.subjects import Settings
    from gemify.model.gem import GemModel
    from gemify.rag.corpus import open_store
    from gemify.rag.index import GemIndex

    name = model or open_store(store).meta.model or "starter"
    gem = GemModel.from_pretrained(name, device=device, dtype=Settings(dtype).torch_dtype)
    return gem, GemIndex.open(store, gem, create=False)


def give(report: Any, table: str, output: Path | None, as_json: bool) -> None:
    from gemify.model.storage import atomic_file

    if output is not None:
        with atomic_file(output) as stage:
            stage.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(str(output), err=True)
    typer.echo(json.dumps(report) if as_json else table)
