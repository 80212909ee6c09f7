"""A Model Context Protocol server over a store: the tools `search`, `read_passage`, `list_documents` and `ask`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, cast

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field

from gemify import __version__
from gemify.io.tables import first_line
from gemify.rag.pipeline import GemRag
from gemify.retrieval.index import GemIndex, Mode
from gemify.retrieval.rerank import LmReranker, Rerank, RerankedIndex, rerank_index
from gemify.serving.protocol.responses import Passage

RerankArgument = Annotated[
    Rerank, Field(description="How what is found is sorted anew. bi: vectors; lm: the model's odds of yes (slow).")
]
_READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_MAX_AROUND = 20
_MAX_CHARACTERS = 100_000
_INSTRUCTIONS = (
    "Passages of the user's documents. `search` finds passages by a question or by words, `read_passage` reads on"
    " before and after one, `list_documents` names the files, `ask` has a small local model answer from the passages."
)


class PassageList(BaseModel):
    """Passages of the store."""

    passages: list[Passage]


class Document(BaseModel):
    """A file of the store."""

    file: str
    passages: int = Field(description="How many passages it was cut into.")


class DocumentList(BaseModel):
    """Files of the store, by name."""

    documents: list[Document]
    total: int = Field(description="How many files there are, with those that are not listed here.")


class SourcedAnswer(BaseModel):
    """An answer, and the passages it was written from."""

    answer: str
    sources: list[Passage] = Field(description="[1] in the answer is the first.")


SearchFn = Callable[..., Awaitable[Sequence[Passage]]]
"""Finds passages: ``(request, query=, k=, mode=, rerank=, store=)``. The HTTP request that asks is None on stdin."""
AskFn = Callable[..., Awaitable[SourcedAnswer]]
"""Answers a question: ``(request, question, rerank=, store=)``."""


def create_local_server(rag: GemRag, **generate: Any) -> MCPServer:
    """Return a server for one client, whose model runs one request at a time, in a thread.

    Args:
        rag: answers from an index of documents, which is searched and read as well.
        generate: options of transformers' `generate`, for the answers.
    """
    index, one_run = rag.index, asyncio.Lock()
    documents: Any = index
    default: Rerank = "none"
    if isinstance(index, RerankedIndex):
        documents, default = index.index, "lm" if isinstance(index.score, LmReranker) else "bi"
    assert isinstance(documents, GemIndex)

    @cache
    def reranked(rerank: Rerank) -> Any:
        return index if rerank == default else rerank_index(documents, rerank, rag.gem)

    async def search(_: Any, *, query: str, k: int, mode: Mode, rerank: Rerank, store: str) -> list[Passage]:
        async with one_run:
            found = reranked(rerank).search
            return _passages(await asyncio.to_thread(found, query, k=k, mode=mode, where=rag.settings.where))

    async def ask(_: Any, question: str, *, rerank: Rerank, store: str) -> SourcedAnswer:
        async with one_run:
            rag.index = reranked(rerank)
            answer = await asyncio.to_thread(rag.ask, question, **generate)
        return SourcedAnswer(answer=answer.text, sources=_passages(answer.passages))

    name = Path(documents.store.uri).name
    mode = cast(Mode, rag.settings.mode)
    return create_mcp_server({name: documents}, search=search, ask=ask, default_mode=mode, default_rerank=default)


def create_mcp_server(
    indexes: Mapping[str, GemIndex],
    *,
    search: SearchFn,
    ask: AskFn | None,
    default_mode: Mode = "hybrid",
    default_rerank: Rerank = "none",
    describe: Callable[[Exception], str] = first_line,
) -> MCPServer:
    """Return a server with the tools, not running yet.

    Args:
        indexes: what is read and listed, by the stores' names. The first one is the default.
        search: finds passages of a store.
        ask: answers from a store. None: there is no such tool.
        default_mode: of a search that does not say.
        default_rerank: of a search or a question that does not say.
        describe: one line about an error of a store.
    """
    run_search, run_ask, names = search, ask, list(indexes)
    open_index = partial(_open_index, indexes, describe)

    async def search_passages(
        ctx: Context[Any, Any],
        query: Annotated[
            str, Field(min_length=1, max_length=_MAX_CHARACTERS, description="A question, or words to look for.")
        ],
        k: Annotated[int, Field(ge=1, le=100, description="Most passages to find.")] = 5,
        mode: Annotated[
            Mode, Field(description="vector: by meaning; fts: by words (BM25); hybrid: both.")
        ] = default_mode,
        rerank: RerankArgument = default_rerank,
        store: str = names[0],
    ) -> PassageList:
        """Find the passages of the documents that match a question best, the best one first."""
        with open_index(store):
            request = ctx.request_context.request
            found = await run_search(request, query=query, k=k, mode=mode, rerank=rerank, store=store)
            return PassageList(passages=list(found))

    def read_passage(
        id: Annotated[str, Field(description="The id of a passage, from search or ask.")],
        before: Annotated[int, Field(ge=0, le=_MAX_AROUND, description="Passages to read before it.")] = 0,
        after: Annotated[int, Field(ge=0, le=_MAX_AROUND, description="Passages to read after it.")] = 0,
        store: str = names[0],
    ) -> PassageList:
        """Read a passage by its id, with those around it in its file. Neighbours may overlap by some words."""
        with open_index(store) as index:
            return PassageList(passages=_passages(index.read(id, before=before, after=after)))

    def list_documents(
        contains: Annotated[str, Field(description="Only files whose path has this in it, in any case.")] = "",
        limit: Annotated[int, Field(ge=1, le=1000, description="Most files to list.")] = 100,
        offset: Annotated[int, Field(ge=0, description="Files to leave out before these.")] = 0,
        store: str = names[0],
    ) -> DocumentList:
        """List the files that can be searched, by name."""
        with open_index(store) as index:
            files = index.files()
        found = sorted(path for path in files if contains.lower() in path.lower())
        listed = [Document(file=path, passages=files[path]) for path in found[offset : offset + limit]]
        return DocumentList(documents=listed, total=len(found))

    async def ask_documents(
        ctx: Context[Any, Any],
        question: Annotated[str, Field(max_length=_MAX_CHARACTERS, description="What the documents answer.")],
        rerank: RerankArgument = default_rerank,
        store: str = names[0],
    ) -> SourcedAnswer:
        """Have the local model answer a question from the passages that match it, with its sources."""
        assert run_ask is not None
        with open_index(store):
            if not question.strip():
                raise ValueError("no question given: ask something")
            return await run_ask(ctx.request_context.request, question, rerank=rerank, store=store)

    tools: dict[str, Callable[..., Any]] = {"search": search_passages, "read_passage": read_passage}
    tools["list_documents"] = list_documents
    return _build_server(tools if ask is None else tools | {"ask": ask_documents}, names)


def _build_server(tools: Mapping[str, Callable[..., Any]], stores: Sequence[str]) -> MCPServer:
    """Return a server with tools, whose argument ``store`` is one of these names."""
    server: MCPServer = MCPServer("gemify", version=__version__, instructions=_INSTRUCTIONS, log_level="WARNING")
    described = Field(description="The store's name.", json_schema_extra={"enum": cast(Any, stores)})
    for name, tool in tools.items():
        tool.__annotations__["store"] = Annotated[str, described]
        server.add_tool(tool, name, annotations=_READ_ONLY)
    return server


@contextmanager
def _open_index(
    indexes: Mapping[str, GemIndex], describe: Callable[[Exception], str], store: str
) -> Iterator[GemIndex]:
    """Yield a store's index, and give clients the reason of errors: of others than ToolError they are told nothing."""
    try:
        if store not in indexes:
            raise ValueError(f"no store {store[:200]!r}: this server has {', '.join(map(repr, indexes))}")
        yield indexes[store]
    except (ValueError, OSError) as error:
        raise ToolError(describe(error)) from error


def _passages(found: Any) -> list[Passage]:
    return [Passage(**passage.to_json()) for passage in found]
