"""The verbs that answer from a store: `gemify ask` and `chat`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
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
    MaxNewTokens,
    Quantize,
    Rerank,
    SearchMode,
    Seed,
    StoreModel,
    StoreUri,
    SystemPrompt,
    Temperature,
    TopP,
    Where,
    echo_err,
    load_gem,
    print_json,
    read_stdin,
    require_utf8,
    store_model_name,
)

if TYPE_CHECKING:
    from gemify.rag.pipeline import Answer, GemRag

Passages = Annotated[int, typer.Option("-k", min=0, help="Number of passages to retrieve; 0 answers without any.")]
OrderOption = Annotated[
    str | None,
    typer.Option(
        help="question-first (the question is computed once, to find and to answer) or passages-first (what --keep-kv"
        " keeps can serve). [default: question-first; passages-first with --keep-kv]"
    ),
]
ContextOption = Annotated[
    str,
    typer.Option(
        help="What the answer sees: text (exact), or the approximations concatenated (caches that ran apart) and"
        " special (the passages' special tokens alone)."
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this string; may be repeated.")]


def ask(
    question: Annotated[str | None, typer.Argument(help="A question; none: read stdin.")] = None,
    *,
    store: StoreUri,
    k: Passages = 3,
    mode: SearchMode = "hybrid",
    where: Where = None,
    rerank: Rerank = "none",
    order: OrderOption = None,
    context: ContextOption = "text",
    keep_kv: KeepKv = False,
    kv_bits: KvBits = 16,
    kv_budget: KvBudget = None,
    kv_store: KvStoreDir = None,
    query_cache: Annotated[
        bool, typer.Option("--query-cache/--no-query-cache", help="Answer from the cache that embedded the question.")
    ] = True,
    system: SystemPrompt = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    model: StoreModel = None,
    base: Base = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a question from the passages of a store, with sources."""
    options = locals()
    asked = require_utf8(question) if question is not None else read_stdin()
    if not asked.strip():
        raise ValueError("no question given: pass one as an argument or on stdin")
    rag = open_rag(options)
    answer = rag.ask(clean_text(asked), on_text=None if as_json else _write, **generate_options(options))
    _finish(answer, as_json=as_json)


def chat(**options: Any) -> None:
    """A conversation over a store, a question a line; its cache is carried over the turns. /quit or Ctrl-D ends it."""
    rag, as_json = open_rag(options), options["as_json"]
    generate = generate_options(options)
    conversation = rag.conversation()
    for question in _questions():
        try:
            answer = conversation.ask(question, on_text=None if as_json else _write, **generate)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            typer.echo()
            continue
        except ValueError as error:
            echo_err(f"gemify: error: {error}")
            continue
        _finish(answer, as_json=as_json)


def ask_options(*left_out: str) -> inspect.Signature:
    """The options of `gemify ask`, for a verb that answers in the same way."""
    options = inspect.signature(ask, eval_str=True).parameters
    return inspect.Signature([p for name, p in options.items() if name not in ("question", *left_out)])


chat.__signature__ = ask_options("query_cache")  # type: ignore[attr-defined]


def open_rag(options: Mapping[str, Any]) -> GemRag:
    """Load the index and the model that the options name."""
    from gemify.rag.context import SYSTEM_PROMPT
    from gemify.rag.kv_store import kv_store_factory
    from gemify.rag.pipeline import GemRag, RagSettings
    from gemify.retrieval.index import GemIndex
    from gemify.retrieval.rerank import require_rerank, rerank_index

    require_rerank(options["rerank"])
    store, keep_kv, system = options["store"], options["keep_kv"], options["system"]
    settings = RagSettings(
        passages=options["k"],
        mode=options["mode"],
        where=options["where"],
        order=options["order"] or ("passages-first" if keep_kv else "question-first"),
        context=options["context"],
        query_cache=options.get("query_cache", True),
        system=SYSTEM_PROMPT if system is None else system,
        max_new_tokens=options["max_new_tokens"],
    )
    open_kv_store = kv_store_factory(
        store, keep_kv=keep_kv, bits=options["kv_bits"], budget=options["kv_budget"], directory=options["kv_store"]
    )
    name = store_model_name(store, options["model"])
    gem = load_gem(name, options["base"], options["dtype"], options["device"], options["quantize"])
    kv = open_kv_store(gem) if open_kv_store is not None else None
    index = GemIndex.open(store, gem, create=False)
    index.require_text()
    return GemRag(gem, rerank_index(index, options["rerank"], gem), kv=kv, settings=settings)


def generate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of transformers' `generate`."""
    if options["seed"] is not None:
        import torch

        torch.manual_seed(options["seed"])
    sampling = {name: options[name] for name in ("temperature", "top_p")} if options["temperature"] > 0 else {}
    return {"do_sample": bool(sampling), **sampling, "stop": options["stop"] or None}


def _questions() -> Iterator[str]:
    """Lines that hold something, up to /quit or the end of the input."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", err=True, nl=False)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line or line.strip() in ("/quit", "/exit"):
            return
        if line.strip():
            yield clean_text(line)


def clean_text(text: str) -> str:
    """Strip a text, and put `?` for bytes that are no UTF-8."""
    from gemify.io.rows import replace_surrogates

    return replace_surrogates(text.strip())


def _write(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()


def _finish(answer: Answer, *, as_json: bool) -> None:
    timing = answer.timing
    if as_json:
        sources = [
            {"number": n, "file": p.file, "place": p.location, "title": p.title, "score": p.score, "text": p.text}
            for n, p in enumerate(answer.passages, start=1)
        ]
        record = {"answer": answer.text, "sources": sources, "timing": vars(timing)}
        print_json(record)
        sys.stdout.flush()
        return
    if answer.thoughts and not answer.text:
        echo_err("gemify: warning: the model was still thinking at its last token: give more --max-new-tokens")
    typer.echo("\n")
    for line in answer.sources():
        typer.echo(line)
    echo_err(
        f"question {timing.embed * 1000:.0f} ms, search {timing.search * 1000:.0f} ms, first token"
        f" {timing.first_token:.2f} s, in all {timing.total:.2f} s; {timing.computed:,} prompt tokens run"
    )
