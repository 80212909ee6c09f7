"""A Model Context Protocol server over a store: the tools `search`, `read_passage`, `list_documents` and `ask`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, cast

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field

from gemify import __version__
from gemify.io.tables import first_line
from gemify.rag.pipeline import GemRag
from gemify.retrieval.index import GemIndex, Mode
from gemify.retrieval.rerank import RerankedIndex
from gemify.serving.protocol.responses import Passage

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


SearchFn = Callable[[str, int, Mode, Any], Awaitable[Sequence[Passage]]]
"""Finds passages, given a query, how many, how, and the HTTP request that asks; None: stdin does."""
AskFn = Callable[[str, Any], Awaitable[SourcedAnswer]]
"""Answers a question of an HTTP request, or of stdin."""


def create_local_server(rag: GemRag, **generate: Any) -> MCPServer:
    """Return a server for one client, whose model runs one request at a time, in a thread.

    Args:
        rag: answers from an index of documents, which is searched and read as well.
        generate: options of transformers' `generate`, for the answers.
    """
    index, one_run = rag.index, asyncio.Lock()
    documents = index.index if isinstance(index, RerankedIndex) else index
    assert index is not None
    assert isinstance(documents, GemIndex)

    async def search(query: str, k: int, mode: Mode, _: Any) -> list[Passage]:
        async with one_run:
            return _passages(await asyncio.to_thread(index.search, query, k=k, mode=mode, where=rag.settings.where))

    async def ask(question: str, _: Any) -> SourcedAnswer:
        async with one_run:
            answer = await asyncio.to_thread(rag.ask, question, **generate)
        return SourcedAnswer(answer=answer.text, sources=_passages(answer.passages))

    return create_mcp_server(documents, search=search, ask=ask, default_mode=cast(Mode, rag.settings.mode))


def create_mcp_server(
    index: GemIndex, *, search: SearchFn, ask: AskFn | None, default_mode: Mode = "hybrid"
) -> MCPServer:
    """Return a server with the tools, not running yet.

    Args:
        index: what is read and listed.
        search: finds passages of the index.
        ask: answers from the index. None: there is no such tool.
        default_mode: of a search that does not say.
    """
    run_search, run_ask = search, ask

    async def search_passages(
        ctx: Context[Any, Any],
        query: Annotated[str, Field(max_length=_MAX_CHARACTERS, description="A question, or words to look for.")],
        k: Annotated[int, Field(ge=1, le=100, description="Most passages to find.")] = 5,
        mode: Annotated[
            Mode, Field(description="vector: by meaning; fts: by words (BM25); hybrid: both.")
        ] = default_mode,
    ) -> PassageList:
        """Find the passages of the documents that match a question best, the best one first."""
        with _one_line_errors():
            return PassageList(passages=list(await run_search(query, k, mode, ctx.request_context.request)))

    def read_passage(
        id: Annotated[str, Field(description="The id of a passage, from search or ask.")],
        before: Annotated[int, Field(ge=0, le=_MAX_AROUND, description="Passages to read before it.")] = 0,
        after: Annotated[int, Field(ge=0, le=_MAX_AROUND, description="Passages to read after it.")] = 0,
    ) -> PassageList:
        """Read a passage by its id, with those around it in its file. Neighbours may overlap by some words."""
        with _one_line_errors():
            return PassageList(passages=_passages(index.read(id, before=before, after=after)))

    def list_documents(
        contains: Annotated[str, Field(description="Only files whose path has this in it, in any case.")] = "",
        limit: Annotated[int, Field(ge=1, le=1000, description="Most files to list.")] = 100,
        offset: Annotated[int, Field(ge=0, description="Files to leave out before these.")] = 0,
    ) -> DocumentList:
        """List the files that can be searched, by name."""
        with _one_line_errors():
            files = index.files()
        found = sorted(path for path in files if contains.lower() in path.lower())
        listed = [Document(file=path, passages=files[path]) for path in found[offset : offset + limit]]
        return DocumentList(documents=listed, total=len(found))

    async def ask_documents(
        ctx: Context[Any, Any],
        question: Annotated[str, Field(max_length=_MAX_CHARACTERS, description="What the documents answer.")],
    ) -> SourcedAnswer:
        """Have the local model answer a question from the passages that match it, with its sources."""
        assert run_ask is not None
        with _one_line_errors():
            if not question.strip():
                raise ValueError("no question given: ask something")
            return await run_ask(question, ctx.request_context.request)

    server: MCPServer = MCPServer("gemify", version=__version__, instructions=_INSTRUCTIONS, log_level="WARNING")
    server.add_tool(search_passages, "search", annotations=_READ_ONLY)
    server.add_tool(read_passage, annotations=_READ_ONLY)
    server.add_tool(list_documents, annotations=_READ_ONLY)
    if ask is not None:
        server.add_tool(ask_documents, "ask", annotations=_READ_ONLY)
    return server


def _passages(found: Any) -> list[Passage]:
    return [Passage(**passage.to_json()) for passage in found]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Give clients the reason: of errors other than ToolError, the protocol tells them nothing."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ToolError(first_line(error)) from error
