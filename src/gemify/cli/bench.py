"""The verbs that compare: `gemify bench rag`, `retrieval`, `search`, `vectors`, `serve`, `encode`, `train` and `gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemify.cli.options import Device, Json, Quiet, ReportFile, write_report

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.retrieval.index import GemIndex

Data = Annotated[Path, typer.Option(help="Directory with corpus.jsonl and queries.jsonl (or .gz), in SQuAD form.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

bench = typer.Typer(no_args_is_help=True, help="Paired timings, medians and ratios.")


@bench.callback()
def _bench() -> None:
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
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answers with and without retrieval, hand-over and kept caches, against a two-model stack."""
    from gemify.bench.questions import read_questions
    from gemify.bench.rag import Peer, as_table, bench_rag
    from gemify.evaluation.models import EvalSettings, encoder_entry, load_encoder
    from gemify.model.gem import GemModel

    try:
        wanted = [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--lengths must be whole numbers with commas between, got {lengths!r}") from error
    settings = EvalSettings(dtype)
    passages, asked = read_questions(data, questions)
    peer = None
    if encoder is not None:
        entry, path = encoder_entry(encoder, settings)
        peer = Peer(entry.facts["label"], load_encoder(path, settings, device).encode)
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
    write_report(report, as_table(report), output, as_json)


@bench.command()
def retrieval(
    store: Annotated[str, typer.Option("--store", "-s", help="An index of the corpus.jsonl in --data.")],
    data: Data,
    questions: Annotated[int | None, typer.Option(min=1, help="How many, evenly over the file. [default: all]")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="[default: the store's]")] = None,
    dtype: Dtype = "float32",
    output: ReportFile = None,
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
    write_report(report, as_table(report), output, as_json)


@bench.command()
def search(
    store: Annotated[str, typer.Option("--store", "-s", help="Directory of the index, or a URI such as s3://...")],
    queries: Annotated[int, typer.Option(min=1, help="How many searches of each kind.")] = 200,
    k: Annotated[int, typer.Option("-k", min=1, help="How many passages a search finds.")] = 10,
    model: Annotated[str | None, typer.Option("--model", "-m", help="[default: the store's]")] = None,
    dtype: Dtype = "float32",
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Milliseconds of vector, full-text and hybrid search, apart from embedding."""
    from gemify.bench.search import as_table, bench_search

    gem, index = _opened(store, model, dtype, device)
    report = bench_search(gem, index, queries=queries, k=k, show_progress_bar=not quiet)
    write_report(report, as_table(report), output, as_json)


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
    output: ReportFile = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write, index and search synthetic vectors: seconds, recall against exact search, bytes and memory."""
    from gemify.bench.vectors import as_table, bench_vectors

    report = bench_vectors(
        count=count, dim=dim, queries=queries, seed=seed, kinds=kind, directory=directory, show_progress_bar=not quiet
    )
    write_report(report, as_table(report), output, as_json)


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
    output: ReportFile = None,
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
    write_report(report, as_table(report), output, as_json)


@bench.command()
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
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tokens a second of `encode`, against sentence-transformers, bidirectional and Echo encoding."""
    from gemify.bench.encode import SIDES, as_table, bench_encode, read_texts
    from gemify.bench.encode import plot as drawn
    from gemify.evaluation.models import EvalSettings

    report = bench_encode(
        model,
        read_texts(data, count),
        dtype=EvalSettings(dtype).torch_dtype,
        device=device,
        sides=side or SIDES,
        rounds=rounds,
        max_tokens=max_tokens,
        show_progress_bar=not quiet,
    )
    write_report(report, as_table(report), output, as_json)
    if plot is not None:
        drawn(report).savefig(plot)


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
    output: ReportFile = None,
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
    write_report(report, as_table(report), output, as_json)
    if plot is not None:
        drawn(report).savefig(plot)


@bench.command()
def gpu(
    shape: Annotated[
        list[str] | None, typer.Option(help="1b, 8b (Llama's, random weights) or tiny; may be repeated. [1b, 8b]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Columns of a batch.")] = 16384,
    train_length: Annotated[int, typer.Option(min=4, help="Tokens of a row to train on.")] = 2048,
    encode_length: Annotated[int, typer.Option(min=2, help="Tokens of a text to encode.")] = 512,
    lengths: Annotated[str, typer.Option(help="Of the rows whose memory is measured.")] = "1024,2048,4096,8192",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    matmul: Annotated[int, typer.Option(min=1, help="Side of the matrices that show the ceiling.")] = 8192,
    attention: Annotated[str, typer.Option(help="sdpa, eager or flex_attention.")] = "sdpa",
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of the device on paper. [default: by its name]")
    ] = None,
    dtype: Dtype = "bfloat16",
    output: ReportFile = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """FLOP utilisation of training and encoding at real shapes, and how memory grows with a row."""
    from gemify.bench.gpu import Setup, as_table, bench_gpu, require_device
    from gemify.evaluation.models import EvalSettings

    try:
        rows = tuple(int(length) for length in lengths.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--lengths must be whole numbers with commas between, got {lengths!r}") from error
    setup = Setup(
        require_device(device),
        dtype=EvalSettings(dtype).torch_dtype,
        attention=attention,
        tokens=tokens,
        train_length=train_length,
        encode_length=encode_length,
        lengths=rows,
        rounds=rounds,
        matmul=matmul,
        peak_tflops=peak_tflops,
    )
    report = bench_gpu(shape or ["1b", "8b"], setup)
    write_report(report, as_table(report), output, as_json)


def _opened(store: str, model: str | None, dtype: str, device: str | None) -> tuple[GemModel, GemIndex]:
    from gemify.evaluation.models import EvalSettings
    from gemify.model.gem import GemModel
    from gemify.retrieval.index import GemIndex
    from gemify.retrieval.vector_table import open_store

    name = model or open_store(store).meta.model or "starter"
    gem = GemModel.from_pretrained(name, device=device, dtype=EvalSettings(dtype).torch_dtype)
    return gem, GemIndex.open(store, gem, create=False)
