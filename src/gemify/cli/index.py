"""The verbs over a store of passages: `gemify index`, `search` and `embed-corpus`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemify.cli.options import (
    Base,
    Device,
    Dtype,
    Json,
    KeepKv,
    KvBits,
    KvBudget,
    KvStoreDir,
    Quiet,
    StoreUri,
    absolute_model_name,
    echo_err,
    kv_store_of,
    load_gem,
    print_json,
)

if TYPE_CHECKING:
    from gemify.rag.kv_store import KvStore
    from gemify.retrieval.index import GemIndex

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
    keep_kv: KeepKv = False,
    kv_bits: KvBits = 16,
    kv_budget: KvBudget = None,
    kv_store: KvStoreDir = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read, cut and embed files into a store; run it again to bring the store up to date."""
    from gemify.retrieval.document_store import Store
    from gemify.retrieval.index import GemIndex, Stopped
    from gemify.retrieval.loaders import find_files
    from gemify.retrieval.vector_table import refuse_corpus

    refuse_corpus(store)
    there = Store.open(store) if Store.exists(store) else None
    find_files(paths, known=there.files() if there else ())  # a wrong path is said before a model is loaded
    name = model or (there.meta.model if there else "") or "starter"
    options: Any = {"tokens": chunk_tokens, "overlap": overlap, "context": context, "precision": precision}
    keeping = kv_store_of(locals())
    gem = load_gem(name, base, dtype, device)
    opened = GemIndex.open(store, gem, model_name=absolute_model_name(name), **options)
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
        echo_err(f"skipped {skipped.path}: {skipped.reason}")
    if (more := len(report.skipped) - _SHOWN_SKIPPED) > 0:
        echo_err(f"skipped {more:,} more; --json names them all")
    kept = _keep(gem, opened, keeping(gem), quiet) if keeping is not None else {}
    if as_json:
        facts = {**dataclasses.asdict(report), **kept}
        print_json({"store": store, "passages": len(opened), **facts, "tokens_per_second": report.tokens_per_second})
        return
    echo_err(
        f"{len(report.added):,} files added, {len(report.changed):,} changed, {len(report.removed):,} removed,"
        f" {report.unchanged:,} unchanged; {report.chunks:,} passages embedded"
        + (f" ({report.tokens_per_second:,.0f} tokens/s)" if report.seconds else "")
    )
    if kept:
        echo_err(f"{kept['kv_added']:,} caches added; {kept['kv_files']:,} kept, {kept['kv_bytes'] / 1e6:,.0f} MB")
    typer.echo(f"{len(opened):,} passages in {store}")


def _keep(gem: Any, index: GemIndex, kv: KvStore, quiet: bool) -> dict[str, int]:
    """Compute the caches of all passages ahead; what there is afterwards."""
    from tqdm.auto import tqdm

    from gemify.rag.pipeline import GemRag, Settings

    rag = GemRag(gem, index, kv=kv, settings=Settings(order="passages-first"))
    passages = tqdm(index.passages(), total=len(index), desc="caches", unit=" passages", disable=quiet)
    added = rag.keep(passages)
    return {"kv_added": added, "kv_files": len(kv), "kv_bytes": kv.nbytes}


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

    from gemify.retrieval.index import GemIndex, Mode
    from gemify.retrieval.section import whole_characters
    from gemify.retrieval.vector_table import open_store

    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
    name = model or open_store(store).meta.model or "starter"
    needed = None if mode == "fts" and model is None else load_gem(name, base, dtype, device)
    passages = GemIndex.open(store, needed, create=False).search(whole_characters(query), k=k, mode=mode)  # type: ignore[arg-type]
    for number, passage in enumerate(passages, start=1):
        if as_json:
            print_json(dataclasses.asdict(passage))
            continue
        where = ", ".join(filter(None, (passage.file, passage.place, passage.heading or passage.title)))
        typer.echo(f"[{number}] {passage.score:.4f}  {where}")
        typer.echo("".join(f"    {line}\n" for line in passage.text.splitlines()))
    if not passages and not as_json:
        echo_err("nothing found")


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
    from gemify.retrieval.bulk.plan import find_inputs
    from gemify.retrieval.bulk.run import begun
    from gemify.retrieval.bulk.run import embed_corpus as run
    from gemify.retrieval.vector_table import PQ_FROM

    find_inputs(inputs)  # a wrong path is said before a model is loaded
    there = begun(output)
    name = absolute_model_name(model or (there.model if there else "") or "starter")
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
        echo_err(f"no pq index on {report.rows:,} rows (it needs {PQ_FROM}): a search compares them all")
    _tell(report, output, as_json)


def _tell(report: Any, output: str, as_json: bool) -> None:
    for line in report.bad[:_SHOWN_SKIPPED]:
        echo_err(f"skipped {line}")
    if (more := report.skipped - len(report.bad[:_SHOWN_SKIPPED])) > 0:
        echo_err(f"skipped {more:,} more")
    if as_json:
        speed = {"rows_per_second": report.rows_per_second, "tokens_per_second": report.tokens_per_second}
        print_json({"corpus": output, **dataclasses.asdict(report), **speed})
    else:
        per_second = f"{report.rows_per_second:,.1f} rows/s, {report.tokens_per_second:,.0f} tokens/s"
        echo_err(f"{report.embedded:,} rows embedded" + (f" ({per_second})" if report.embedded else ""))
        if report.indexes:
            echo_err(f"indexed: {', '.join(report.indexes)}")
        typer.echo(f"{report.rows:,} rows in {output}" + (f", {report.left:,} left" if report.left else ""))
    if report.stopped:
        raise ValueError("stopped by a signal: what is done stays, run the same command again to go on")
