"""The verbs that answer from a store: `gemify ask` and `chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
    SearchMode,
    Seed,
    StoreModel,
    StoreUri,
    SystemPrompt,
    Temperature,
    TopP,
    echo_err,
    kv_store_factory,
    load_gem,
    print_json,
    store_model_name,
)

if TYPE_CHECKING:
    from gemify.rag.pipeline import Answer, GemRag

Passages = Annotated[int, typer.Option("-k", min=0, help="Number of passages to retrieve; 0 answers without any.")]
PromptOrder = Annotated[
    str | None,
    typer.Option(
        help="question-first (the question is computed once, to find and to answer) or passages-first (what --keep-kv"
        " keeps can serve). [default: question-first; passages-first with --keep-kv]"
    ),
]
ContextMode = Annotated[
    str,
    typer.Option(
        help="What the answer sees: text (exact), or the approximations concatenated (caches that ran apart) and special (the"
        " passages' special tokens alone)."
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this string; may be repeated.")]


def ask(
    question: Annotated[str | None, typer.Argument(help="A question; none: read stdin.")] = None,
    *,
    store: StoreUri,
    k: Passages = 3,
    mode: SearchMode = "hybrid",
    order: PromptOrder = None,
    context: ContextMode = "text",
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
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a question from the passages of a store, with sources."""
    asked = question if question is not None else sys.stdin.read()
    if not asked.strip():
        raise ValueError("no question given: pass one as an argument or on stdin")
    rag, options = _rag(locals())
    answer = rag.ask(_asked(asked), on_text=None if as_json else _write, **options)
    _finish(answer, as_json=as_json)


def chat(
    store: StoreUri,
    k: Passages = 3,
    mode: SearchMode = "hybrid",
    order: PromptOrder = None,
    context: ContextMode = "text",
    keep_kv: KeepKv = False,
    kv_bits: KvBits = 16,
    kv_budget: KvBudget = None,
    kv_store: KvStoreDir = None,
    system: SystemPrompt = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    model: StoreModel = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """A conversation over a store, a question a line; its cache is carried over the turns. /quit or Ctrl-D ends it."""
    rag, options = _rag({**locals(), "query_cache": True})
    conversation = rag.conversation()
    for question in _questions():
        try:
            answer = conversation.ask(question, on_text=None if as_json else _write, **options)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            typer.echo()
            continue
        except ValueError as error:
            echo_err(f"gemify: error: {error}")
            continue
        _finish(answer, as_json=as_json)


def _rag(given: dict[str, Any]) -> tuple[GemRag, dict[str, Any]]:
    """What answers, and the options of `generate`, from a verb's arguments."""
    from gemify.rag.context import SYSTEM_PROMPT
    from gemify.rag.pipeline import GemRag, RagSettings
    from gemify.retrieval.index import GemIndex

    settings = RagSettings(
        passages=given["k"],
        mode=given["mode"],
        order=given["order"] or ("passages-first" if given["keep_kv"] else "question-first"),
        context=given["context"],
        query_cache=given["query_cache"],
        system=SYSTEM_PROMPT if given["system"] is None else given["system"],
        max_new_tokens=given["max_new_tokens"],
    )
    open_kv_store = kv_store_factory(
        given["store"],
        keep_kv=given["keep_kv"],
        bits=given["kv_bits"],
        budget=given["kv_budget"],
        directory=given["kv_store"],
    )
    name = store_model_name(given["store"], given["model"])
    gem = load_gem(name, given["base"], given["dtype"], given["device"])
    kv = open_kv_store(gem) if open_kv_store is not None else None
    index = GemIndex.open(given["store"], gem, create=False)
    index.require_text()
    options: dict[str, Any] = {"do_sample": given["temperature"] > 0, "stop": given["stop"] or None}
    if given["temperature"] > 0:
        options.update(temperature=given["temperature"], top_p=given["top_p"])
    if given["seed"] is not None:
        import torch

        torch.manual_seed(given["seed"])
    return GemRag(gem, index, kv=kv, settings=settings), options


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
            yield _asked(line)


def _asked(text: str) -> str:
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
    typer.echo("\n")
    for line in answer.sources():
        typer.echo(line)
    echo_err(
        f"question {timing.embed * 1000:.0f} ms, search {timing.search * 1000:.0f} ms, first token"
        f" {timing.first_token:.2f} s, in all {timing.total:.2f} s; {timing.computed:,} prompt tokens run"
    )
