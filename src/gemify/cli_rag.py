"""The verbs over a store of passages: `gemify index` and `search`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.rag.index import GemIndex
    from gemify.rag.kv_store import KvStore

StoreUri = Annotated[str, typer.Option("--store", "-s", help="Directory of the index, or a URI such as s3://...")]
Base = Annotated[str | None, typer.Option("--base", help="Look for the base model here instead.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... [default: the accelerator if there is one]")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

KeepKv = Annotated[
    bool, typer.Option("--keep-kv", help="Keep passages' KV caches on disk, and use them. They hold the text itself.")
]
KvBits = Annotated[
    int, typer.Option(help="Of kept caches: 32, 16, 8 or 4. 32 is exact; 16 is, for a model in 16 bits (--dtype).")
]
KvBudget = Annotated[
    str | None, typer.Option(help="Most bytes of kept caches, such as 500MB or 2GB. [default: no end]")
]
KvStoreDir = Annotated[Path | None, typer.Option("--kv-store", help="Where they are kept. [default: STORE/kv]")]

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
    from gemify.rag.corpus import refuse_corpus
    from gemify.rag.index import GemIndex, Stopped
    from gemify.rag.reading import find_files
    from gemify.rag.store import Store

    refuse_corpus(store)
    there = Store.open(store) if Store.exists(store) else None
    find_files(paths, known=there.files() if there else ())  # a wrong path is said before a model is loaded
    name = model or (there.meta.model if there else "") or "starter"
    options: Any = {"tokens": chunk_tokens, "overlap": overlap, "context": context, "precision": precision}
    keeping = kv_store_of(locals())
    gem = load_gem(name, base, dtype, device)
    opened = GemIndex.open(store, gem, model_name=lasting(name), **options)
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
    kept = _keep(gem, opened, keeping(gem), quiet) if keeping is not None else {}
    if as_json:
        facts = {**dataclasses.asdict(report), **kept}
        _print({"store": store, "passages": len(opened), **facts, "tokens_per_second": report.tokens_per_second})
        return
    say(
        f"{len(report.added):,} files added, {len(report.changed):,} changed, {len(report.removed):,} removed,"
        f" {report.unchanged:,} unchanged; {report.chunks:,} passages embedded"
        + (f" ({report.tokens_per_second:,.0f} tokens/s)" if report.seconds else "")
    )
    if kept:
        say(f"{kept['kv_added']:,} caches added; {kept['kv_files']:,} kept, {kept['kv_bytes'] / 1e6:,.0f} MB")
    typer.echo(f"{len(opened):,} passages in {store}")


def _keep(gem: Any, index: GemIndex, kv: KvStore, quiet: bool) -> dict[str, int]:
    """Compute the caches of all passages ahead; what there is afterwards."""
    from tqdm.auto import tqdm

    from gemify.rag.answering import GemRag, Settings

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

    from gemify.rag.corpus import open_store
    from gemify.rag.index import GemIndex, Mode
    from gemify.rag.section import whole_characters

    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
    name = model or open_store(store).meta.model or "starter"
    needed = None if mode == "fts" and model is None else load_gem(name, base, dtype, device)
    passages = GemIndex.open(store, needed, create=False).search(whole_characters(query), k=k, mode=mode)  # type: ignore[arg-type]
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


def kv_store_of(given: Mapping[str, Any]) -> Callable[[GemModel], KvStore] | None:
    """What a verb's arguments say of kept caches, checked before a model is loaded: the store, given the model."""
    from gemify.model.identity import cache_fingerprint
    from gemify.rag.kv_store import KvStore

    if not given["keep_kv"]:
        if given["kv_budget"] is not None or given["kv_store"] is not None:
            raise ValueError("--kv-budget and --kv-store say where caches are kept: they need --keep-kv")
        return None
    if given["kv_store"] is None and "://" in given["store"]:
        raise ValueError(f"caches are kept on a disk, and {given['store']} is none: give --kv-store DIR")
    directory = given["kv_store"] or Path(given["store"]) / "kv"
    bits, budget = given["kv_bits"], bytes_of(given["kv_budget"])
    KvStore(directory, fingerprint="", bits=bits, budget_bytes=budget)

    def keeping(gem: GemModel) -> KvStore:
        name = cache_fingerprint(gem.lm, gem.config, gem.adapter)
        return KvStore(directory, fingerprint=name, bits=bits, budget_bytes=budget)

    return keeping


def bytes_of(text: str | None) -> int | None:
    """Bytes of a size such as 500MB; ValueError for what is none."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"a size must be a number of bytes such as 500MB or 2GB, got {text!r}")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def load_gem(model: str, base: str | None, dtype: str | None, device: str | None) -> Any:
    from gemify.model.gem import GemModel

    loading: Any = {"device": device} if dtype is None else {"device": device, "dtype": dtype}
    return GemModel.from_pretrained(model, base=base, **loading)


def lasting(model: str) -> str:
    """A model's name that still finds it from another working directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def say(text: str) -> None:
    typer.echo(text, err=True)
