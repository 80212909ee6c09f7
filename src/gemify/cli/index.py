"""The verbs over a store of passages: `gemify index`, `search` and `embed-corpus`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemify.cli.options import (
    Base,
    BatchSize,
    Device,
    Dtype,
    Json,
    KeepKv,
    KvBits,
    KvBudget,
    KvStoreDir,
    NewStoreModel,
    Quantize,
    Quiet,
    Rerank,
    SearchMode,
    StoreModel,
    StoreUri,
    TextColumn,
    TitleColumn,
    TopK,
    Where,
    absolute_model_name,
    echo_err,
    load_gem,
    print_json,
    require_utf8,
    store_model_name,
)

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.rag.kv_store import KvStore
    from gemify.retrieval.bulk.run import EmbedReport as CorpusReport
    from gemify.retrieval.index import GemIndex
    from gemify.retrieval.ingest import IndexReport
    from gemify.retrieval.loaders import FileListing

_MAX_SKIPPED_LINES = 20


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files and directories: text, Markdown, HTML, PDF, Office, e-books, mail, JSON lines, source."
        ),
    ],
    store: StoreUri,
    model: NewStoreModel = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of a passage. [default: 256]")] = None,
    chunk_overlap: Annotated[
        int | None, typer.Option(help="Tokens that a passage repeats from the one before. [default: 32]")
    ] = None,
    context: Annotated[
        bool | None,
        typer.Option("--context/--no-context", help="Embed title and headings with a passage. [default: context]"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the vectors: float32, float16, int8 or binary (both rescored). [default: float32]"),
    ] = None,
    text_column: TextColumn = "text",
    title_column: TitleColumn = "title",
    ocr: Annotated[bool, typer.Option("--ocr", help="Recognize the text of scanned PDF pages (extra ocr).")] = False,
    meta: Annotated[
        list[str] | None,
        typer.Option(help="Metadata of all these files, such as project=atlas, for --where; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave out what matches, such as '*.log' or 'drafts/*'; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum new or changed files to index now.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on: index files as they change, until Ctrl-C.")] = False,
    batch_size: BatchSize = 32,
    keep_kv: KeepKv = False,
    kv_bits: KvBits = 16,
    kv_budget: KvBudget = None,
    kv_store: KvStoreDir = None,
    base: Base = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read, cut and embed files into a store; run it again to bring the store up to date."""
    from gemify.retrieval.document_store import Store
    from gemify.retrieval.index import GemIndex
    from gemify.retrieval.loaders import find_files
    from gemify.retrieval.metadata import parse_metadata
    from gemify.retrieval.ocr import require_ocr
    from gemify.retrieval.vector_table import refuse_corpus

    if watch and limit is not None:
        raise ValueError("--limit ends a run, and --watch goes on: leave one of them out")
    given_meta = parse_metadata(meta or ())
    refuse_corpus(store)
    if ocr:
        require_ocr()
    existing = Store.open(store) if Store.exists(store) else None
    known = () if existing is None else existing.files()
    files = find_files(paths, known=known, exclude=exclude or ())  # before a model is loaded
    name = model or (existing.meta.model if existing is not None else "") or "starter"
    options: Any = {"tokens": chunk_tokens, "overlap": chunk_overlap, "context": context, "precision": precision}
    from gemify.rag.kv_store import kv_store_factory

    open_kv_store = kv_store_factory(store, keep_kv=keep_kv, bits=kv_bits, budget=kv_budget, directory=kv_store)
    gem = load_gem(name, base, dtype, device, quantize)
    opened = GemIndex.open(
        store if existing is None else existing, gem, model_name=absolute_model_name(name), **options
    )
    reading: Any = {"text_column": text_column, "title_column": title_column, "meta": given_meta, "ocr": ocr}
    reading |= {"batch_size": batch_size, "show_progress_bar": not quiet}
    if not watch:
        reading["limit"] = limit
    for report in _index_runs(opened, paths if watch else files, exclude or (), reading):
        caches = _store_caches(gem, opened, open_kv_store(gem), quiet) if open_kv_store is not None else {}
        _echo_report(report, caches, opened, store, as_json)


def _index_runs(
    index: GemIndex, paths: Sequence[Path] | FileListing, exclude: Sequence[str], options: dict[str, Any]
) -> Iterator[IndexReport]:
    """Index what was found, once; or paths, and again whenever their files change."""
    from gemify.io.signals import StopRequestedError, stop_signals
    from gemify.retrieval.loaders import FileListing
    from gemify.retrieval.watch import watch_files

    try:
        if isinstance(paths, FileListing):
            yield index.add(paths, **options)
            return
        with stop_signals() as stop_flag:
            yield from watch_files(index, paths, exclude=exclude, stop_flag=stop_flag, **options)
    except StopRequestedError as stopped:
        raise ValueError(str(stopped)) from stopped


def _echo_report(report: IndexReport, caches: dict[str, int], index: GemIndex, store: str, as_json: bool) -> None:
    """Say what a run did, on stderr, and what the index holds now."""
    _echo_skipped([f"{skipped.path}: {skipped.reason}" for skipped in report.skipped], len(report.skipped))
    if as_json:
        facts = {**dataclasses.asdict(report), **caches, "tokens_per_second": report.tokens_per_second}
        print_json({"store": store, "passages": len(index), **facts})
        sys.stdout.flush()
        return
    echo_err(
        f"{len(report.added):,} files added, {len(report.changed):,} changed, {len(report.removed):,} removed,"
        f" {len(report.moved):,} moved, {report.unchanged:,} unchanged; {report.chunks:,} passages embedded"
        + (f" ({report.tokens_per_second:,.0f} tokens/s)" if report.seconds else "")
    )
    if caches:
        kept = f"{caches['kv_files']:,} kept, {caches['kv_bytes'] / 1e6:,.0f} MB"
        echo_err(f"{caches['kv_added']:,} caches added; {kept}")
    if report.unread:
        echo_err("not read: " + ", ".join(f"{count:,} {kind}" for kind, count in report.unread.items()))
    typer.echo(f"{len(index):,} passages in {store}")
    sys.stdout.flush()


def forget(
    paths: Annotated[list[Path], typer.Argument(help="Files and directories, there or not.")],
    store: StoreUri,
    as_json: Json = False,
) -> None:
    """Remove files from a store; what lies in a directory goes with it. The files themselves stay."""
    import os
    from unicodedata import normalize

    from gemify.retrieval.document_store import Store

    opened = Store.open(store)
    wanted = [normalize("NFC", os.path.abspath(path)) for path in paths]
    with opened.write_lock():
        gone = [
            known
            for known in opened.files()
            if any(Path(normalize("NFC", known)).is_relative_to(path) for path in wanted)
        ]
        if not gone:
            raise ValueError(f"{store} holds no file of {paths[0]}: `gemify index --json` lists what it adds")
        opened.remove(gone)
        opened.optimize()
    if as_json:
        print_json({"store": store, "removed": gone, "passages": len(opened)})
        return
    typer.echo(f"{len(gone):,} files forgotten, {len(opened):,} passages in {store}")


def _store_caches(gem: GemModel, index: GemIndex, kv: KvStore, quiet: bool) -> dict[str, int]:
    """Compute and store the caches of all passages."""
    from tqdm.auto import tqdm

    from gemify.rag.pipeline import GemRag, RagSettings

    rag = GemRag(gem, index, kv=kv, settings=RagSettings(order="passages-first"))
    passages = tqdm(index.passages(), total=len(index), desc="caches", unit=" passages", disable=quiet)
    added = rag.keep(passages)
    return {"kv_added": added, "kv_files": len(kv), "kv_bytes": kv.nbytes}


def search(
    query: Annotated[str, typer.Argument(help="A question, or words to look for.")],
    store: StoreUri,
    k: TopK = 5,
    mode: SearchMode = "hybrid",
    where: Where = None,
    rerank: Rerank = "none",
    model: StoreModel = None,
    base: Base = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Retrieve the passages of a store that match a question best."""
    from typing import get_args

    from gemify.retrieval.index import GemIndex, Mode
    from gemify.retrieval.rerank import require_rerank, rerank_index

    require_rerank(rerank)
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
    require_utf8(query)
    name = store_model_name(store, model)
    needs_model = mode != "fts" or model is not None or rerank != "none"
    gem = load_gem(name, base, dtype, device, quantize) if needs_model else None
    opened = GemIndex.open(store, gem, create=False)
    passages = rerank_index(opened, rerank, gem).search(query, k=k, mode=mode, where=where)  # type: ignore[arg-type]
    for number, passage in enumerate(passages, start=1):
        if as_json:
            print_json(passage.to_json())
            continue
        where = ", ".join(filter(None, (passage.file, passage.location, passage.heading or passage.title)))
        typer.echo(f"[{number}] {passage.score:.4f}  {where}")
        typer.echo("".join(f"    {line}\n" for line in passage.text.splitlines()))
    if not passages and not as_json:
        echo_err("nothing found")


def embed_corpus(
    inputs: Annotated[
        list[str], typer.Argument(help="Files of rows (.parquet, .jsonl, .csv, ...; also .gz, .zst), or directories.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory of the corpus, or a URI such as s3://...")],
    model: NewStoreModel = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the vectors: float32, float16, int8 or binary. [default: float16]")
    ] = None,
    format: Annotated[str | None, typer.Option(help="lance (searchable) or parquet. [default: lance]")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text. [default: text]")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column that holds the title. [default: title]")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column that holds the id. [default: _id or id, else file and row]")
    ] = None,
    keep_text: Annotated[
        bool | None, typer.Option("--keep-text/--no-keep-text", help="Keep texts beside the vectors. [default: keep]")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(help="Rows of a shard, the unit of resuming. [default: 1024]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum rows to embed now, in whole shards.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip rows that cannot be read.")] = False,
    index: Annotated[
        str, typer.Option(help="Of the vectors: auto, none, flat, sq (8 bits), rq (1 bit) or pq (codes).")
    ] = "auto",
    executor: Annotated[
        str, typer.Option(help="local, or ray: on a cluster (RAY_ADDRESS) or on this machine.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of Ray. [default: one per GPU; without GPUs, one per machine]")
    ] = None,
    batch_size: BatchSize = 32,
    base: Base = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: float32, bfloat16 or float16. [default: the corpus's, or float32]"),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Embed a corpus larger than memory; run it again to continue where it stopped."""
    from gemify.retrieval.bulk.plan import find_inputs
    from gemify.retrieval.bulk.run import embed_corpus as run
    from gemify.retrieval.vector_table import PQ_MIN_ROWS, read_manifest

    find_inputs(inputs)  # reports a wrong path before a model is loaded
    there = read_manifest(output)
    name = absolute_model_name(model or (there.model if there else "") or "starter")
    dtype = dtype or (there.dtype if there else "float32")
    gem = load_gem(name, base, dtype, "cpu" if executor == "ray" else device)
    report = run(
        inputs,
        output,
        gem,
        model_name=name,
        base=base,
        device=device,
        executor=executor,  # type: ignore[arg-type]
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
        dtype=dtype,
    )
    if index == "pq" and not report.left and report.rows < PQ_MIN_ROWS:
        echo_err(f"no pq index on {report.rows:,} rows (it needs {PQ_MIN_ROWS}): a search compares them all")
    _print_corpus_report(report, output, as_json)


def _print_corpus_report(report: CorpusReport, output: str, as_json: bool) -> None:
    _echo_skipped(report.bad, report.skipped)
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
        raise ValueError("stopped by a signal: finished shards are kept, run the same command again to continue")


def _echo_skipped(lines: Sequence[str], count: int) -> None:
    """Name the first of ``count`` skipped items."""
    shown = lines[:_MAX_SKIPPED_LINES]
    for line in shown:
        echo_err(f"skipped {line}")
    if (more := count - len(shown)) > 0:
        echo_err(f"skipped {more:,} more")
