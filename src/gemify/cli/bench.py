"""The verbs that compare, under `gemify bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemify.cli.options import (
    AttnImplementation,
    Base,
    BaseModel,
    Device,
    Dtype,
    Encoder,
    ExactDtype,
    Json,
    KvBits,
    MaxLength,
    MaxNewTokens,
    Model,
    PlotFile,
    Quantize,
    Quiet,
    ReportFile,
    SquadData,
    StoreModel,
    StoreUri,
    TopK,
    TrainingData,
    TrainingPrecision,
    load_gem,
    parse_lengths,
    store_model_name,
    write_report,
)

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.retrieval.index import GemIndex

NumQueries = Annotated[int, typer.Option(min=1, help="Number of searches of each kind.")]
Rounds = Annotated[int, typer.Option(min=1, help="Number of timed rounds.")]

bench = typer.Typer(no_args_is_help=True, help="Paired timings, medians and ratios.")


@bench.callback()
def _bench() -> None:
    """Paired timings, medians and ratios."""


@bench.command()
def rag(
    data: SquadData,
    model: Model = "starter-gated",
    encoder: Encoder = None,
    num_questions: Annotated[int, typer.Option(min=1, help="Number of questions, evenly over the file.")] = 20,
    lengths: Annotated[str, typer.Option(help="Tokens of a document.")] = "250,1000,4000",
    kv_bits: KvBits = 16,
    max_new_tokens: MaxNewTokens = 24,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this row and those it is compared with; may be repeated.")
    ] = None,
    dtype: ExactDtype = "float32",
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time answers with and without retrieval, a reused question's cache and kept caches, against two models."""
    from gemify.bench.rag import SecondEncoder, bench_rag, to_markdown
    from gemify.bench.retrieval import read_questions
    from gemify.evaluation.models import EvalSettings, encoder_entry, load_encoder

    document_lengths, settings = parse_lengths(lengths), EvalSettings(dtype)
    passages, questions = read_questions(data, num_questions)
    second_encoder = None
    if encoder is not None:
        entry, path = encoder_entry(encoder, settings)
        second_encoder = SecondEncoder(entry.facts["label"], load_encoder(path, settings, device).encode)
    report = bench_rag(
        load_gem(model, None, dtype, device),
        passages=passages,
        questions=questions,
        lengths=document_lengths,
        second_encoder=second_encoder,
        bits=kv_bits,
        max_new_tokens=max_new_tokens,
        only=only or (),
        show_progress_bar=not quiet,
    )
    write_report(report, to_markdown(report), output, as_json)


@bench.command()
def retrieval(
    store: StoreUri,
    data: SquadData,
    num_questions: Annotated[
        int | None, typer.Option(min=1, help="Number of questions, evenly over the file. [default: all]")
    ] = None,
    model: StoreModel = None,
    dtype: ExactDtype = "float32",
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure recall and MRR of vector, full-text and hybrid search over a store of DATA's corpus.jsonl."""
    from gemify.bench.retrieval import bench_retrieval, read_questions, to_markdown

    _, questions = read_questions(data, num_questions)
    gem, index = _open_index(store, model, dtype, device)
    report = bench_retrieval(gem, index, questions, show_progress_bar=not quiet)
    write_report(report, to_markdown(report), output, as_json)


@bench.command()
def search(
    store: StoreUri,
    num_queries: NumQueries = 200,
    k: TopK = 10,
    model: StoreModel = None,
    dtype: ExactDtype = "float32",
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time vector, full-text and hybrid search without the embedding of the query."""
    from gemify.bench.retrieval import bench_search, search_table

    gem, index = _open_index(store, model, dtype, device)
    report = bench_search(gem, index, queries=num_queries, k=k, show_progress_bar=not quiet)
    write_report(report, search_table(report), output, as_json)


@bench.command()
def rerank(
    task: Annotated[str, typer.Option("--task", "-t", help="A reranking or retrieval task, such as WikiQAReranking.")],
    data: Annotated[
        Path | None, typer.Option(help="Directory of local data (mteb/); none: the Hugging Face hub.")
    ] = None,
    model: Model = "starter",
    depth: Annotated[int, typer.Option(min=1, help="Candidates of a retrieval task, the best by vectors.")] = 100,
    prior: Annotated[
        bool, typer.Option("--prior", help="Also subtract each passage's odds under an empty question.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=2, help="Only so many queries, and a part of the corpus.")] = None,
    dtype: ExactDtype = "float32",
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure how well candidates are ordered by vectors, by the odds of yes against no, and by both."""
    from gemify.bench.rerank import bench_rerank, to_markdown
    from gemify.evaluation.mteb_tasks import make_task

    chosen = make_task(task, data, limit=limit)
    gem = load_gem(model, None, dtype, device)
    report = bench_rerank(gem, chosen, depth=depth, prior=prior, show_progress_bar=not quiet)
    write_report(report, to_markdown(report), output, as_json)


@bench.command()
def vectors(
    num_vectors: Annotated[int, typer.Option(min=1000, help="Number of vectors.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=8, help="Dimensions of a vector, a multiple of 8.")] = 576,
    num_queries: NumQueries = 200,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this kind: exact, flat, sq, pq, rq or binary; may be repeated.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where to write the corpora, which are deleted again. [default: the system's]")
    ] = None,
    output: ReportFile = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write, index and search synthetic vectors: seconds, recall against exact search, bytes and memory."""
    from gemify.bench.vectors import bench_vectors, to_markdown

    report = bench_vectors(
        count=num_vectors,
        dim=dim,
        queries=num_queries,
        seed=seed,
        kinds=only,
        directory=directory,
        show_progress_bar=not quiet,
    )
    write_report(report, to_markdown(report), output, as_json)


@bench.command()
def serve(
    model: Model = "starter",
    encoder: Annotated[
        str | None,
        typer.Option(help="Directory or name of a sentence-transformers model for the second server. [default: MODEL]"),
    ] = None,
    base: Base = None,
    num_requests: Annotated[int, typer.Option(min=2, help="Number of requests, half chats, half embeddings.")] = 200,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Maximum requests at a time.")] = 16,
    max_new_tokens: MaxNewTokens = 24,
    rounds: Rounds = 2,
    dtype: ExactDtype = "float32",
    output: ReportFile = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare one server for chat and embeddings with two servers: throughput, latency, memory."""
    from gemify.bench.serve import ServerSettings, bench_serve, to_markdown

    report = bench_serve(
        ServerSettings(model, dtype, encoder, base),
        requests=num_requests,
        clients=max_concurrency,
        max_tokens=max_new_tokens,
        rounds=rounds,
        show_progress_bar=not quiet,
    )
    write_report(report, to_markdown(report), output, as_json)


@bench.command()
def peers(
    model: Model = "starter",
    llama_cpp: Annotated[
        str | None, typer.Option(help="Python of an environment with xllamacpp. [default: without llama.cpp]")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="GGUF file for llama.cpp. [default: the starter's]")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Directory or name of a sentence-transformers model. [default: without it]")
    ] = None,
    num_requests: Annotated[int, typer.Option(min=2, help="Number of requests, half chats, half embeddings.")] = 64,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Maximum requests at a time.")] = 16,
    max_new_tokens: MaxNewTokens = 48,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each. [default: torch's]")] = None,
    rounds: Rounds = 2,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    plot: PlotFile = None,
    output: ReportFile = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare `gemify serve` with llama.cpp and sentence-transformers: start, writing, embedding, memory."""
    from gemify.bench.peers import bench_peers, list_peers, to_markdown
    from gemify.bench.peers import plot as draw

    listed = list_peers(
        model,
        dtype=dtype,
        quantize=quantize,
        llama_cpp=llama_cpp,
        gguf=gguf,
        encoder=encoder,
        clients=max_concurrency,
    )
    report = bench_peers(
        listed,
        requests=num_requests,
        clients=max_concurrency,
        max_tokens=max_new_tokens,
        threads=threads,
        rounds=rounds,
        show_progress_bar=not quiet,
    )
    write_report(report, to_markdown(report), output, as_json)
    if plot is not None:
        draw(report).savefig(plot)


@bench.command()
def encode(
    data: Annotated[
        Path, typer.Option(help="File of rows with `text`, or a directory with such a corpus.jsonl (or .csv, ...).")
    ],
    model: Model = "starter",
    num_texts: Annotated[int, typer.Option(min=1, help="Number of texts, evenly over the file.")] = 200,
    rounds: Rounds = 3,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this encoder: gemify; 'gemify, compiled'; 'gemify, gated'; sentence-transformers; bidirectional;"
            " Echo; may be repeated."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of a batch of ours. [default: by the processor]")
    ] = None,
    plot: PlotFile = None,
    dtype: ExactDtype = "float32",
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time our `encode` against sentence-transformers' and other ways to embed with the same weights."""
    from gemify.bench.encode import ENCODERS, bench_encode, read_texts, to_markdown
    from gemify.bench.encode import plot as draw
    from gemify.model.base import parse_dtype

    report = bench_encode(
        model,
        read_texts(data, num_texts),
        dtype=parse_dtype(dtype),
        device=device,
        encoders=only or ENCODERS,
        rounds=rounds,
        max_tokens=max_tokens,
        show_progress_bar=not quiet,
    )
    write_report(report, to_markdown(report), output, as_json)
    if plot is not None:
        draw(report).savefig(plot)


@bench.command()
def train(
    data: TrainingData,
    base: BaseModel = "starter",
    only: Annotated[
        list[str] | None, typer.Option(help="Only this kind of step: full, gated or contrastive; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each kind, after a warm-up step.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a next-token batch.")] = 32,
    contrastive_batch_size: Annotated[int, typer.Option(min=2, help="Rows of a contrastive batch.")] = 32,
    max_length: MaxLength = 128,
    precision: TrainingPrecision = "auto",
    plot: PlotFile = None,
    output: ReportFile = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time each kind of training step against a plain causal-LM step on the same tokens."""
    from gemify.bench.train import KINDS, bench_train, to_markdown
    from gemify.bench.train import plot as draw

    report = bench_train(
        data,
        base=base,
        kinds=only or KINDS,
        steps=steps,
        rows=batch_size,
        pairs=contrastive_batch_size,
        max_length=max_length,
        precision=precision,
        device=device,
        show_progress_bar=not quiet,
    )
    write_report(report, to_markdown(report), output, as_json)
    if plot is not None:
        draw(report).savefig(plot)


@bench.command()
def gpu(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="1b, 8b (Llama's, random weights) or tiny; may be repeated. [default: 1b, 8b]"),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch.")] = 16384,
    train_length: Annotated[int, typer.Option(min=4, help="Tokens of a training row.")] = 2048,
    encode_length: Annotated[int, typer.Option(min=2, help="Tokens of a text to encode.")] = 512,
    lengths: Annotated[str, typer.Option(help="Tokens of the rows to measure memory on.")] = "1024,2048,4096,8192",
    rounds: Rounds = 5,
    matmul_size: Annotated[int, typer.Option(min=1, help="Size of the square matrices that show the ceiling.")] = 8192,
    attn_implementation: AttnImplementation = "sdpa",
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s of the device on paper. [default: by its name]")
    ] = None,
    dtype: ExactDtype = "bfloat16",
    output: ReportFile = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure FLOP utilisation of training and encoding at real shapes, and memory by row length."""
    from gemify.bench.gpu import GpuSettings, bench_gpu, require_device, to_markdown
    from gemify.model.base import parse_dtype

    settings = GpuSettings(
        lengths=tuple(parse_lengths(lengths)),
        device=require_device(device),
        dtype=parse_dtype(dtype),
        attention=attn_implementation,
        tokens=batch_tokens,
        train_length=train_length,
        encode_length=encode_length,
        rounds=rounds,
        matmul_size=matmul_size,
        peak_tflops=peak_tflops,
    )
    report = bench_gpu(shape or ["1b", "8b"], settings)
    write_report(report, to_markdown(report), output, as_json)


def _open_index(store: str, model: str | None, dtype: str, device: str | None) -> tuple[GemModel, GemIndex]:
    from gemify.retrieval.index import GemIndex

    gem = load_gem(store_model_name(store, model), None, dtype, device)
    return gem, GemIndex.open(store, gem, create=False)
