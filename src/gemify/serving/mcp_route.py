"""POST /mcp: the tools of `gemify.serving.mcp_server` over HTTP, without sessions.

`search` and `ask` run as /v1/search and /v1/chat/completions do for the same key: in the engine's batches, with its
limits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import APIRouter, Request
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemify.io.tables import first_line
from gemify.retrieval.index import GemIndex
from gemify.serving.dispatch import ClientDisconnectedError
from gemify.serving.errors import ApiError, from_engine_error
from gemify.serving.mcp_server import SourcedAnswer, create_mcp_server
from gemify.serving.protocol.requests import CreateChatCompletionRequest, SearchRequest
from gemify.serving.protocol.responses import Passage
from gemify.serving.request_body import JsonRoute
from gemify.serving.routes.chat import create_chat_completion
from gemify.serving.routes.embeddings import search as search_route

logger = logging.getLogger("gemify.serving")

_MAX_NEW_TOKENS = 256


def create_mcp_router(indexes: Mapping[str, GemIndex], *, has_chat: bool, max_body_bytes: int) -> APIRouter:
    """Return the route, which starts and ends with the application.

    Args:
        indexes: what the tools search and read, by the stores' names.
        has_chat: whether the model answers, too.
        max_body_bytes: of a request.
    """
    server = create_mcp_server(indexes, search=_search, ask=_ask if has_chat else None, describe=_describe)
    endpoint = server.streamable_http_app(
        json_response=True,
        stateless_http=True,
        max_request_body_size=max_body_bytes,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),  # the middleware has it
    )

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with server.session_manager.run():
            yield

    router = APIRouter(route_class=JsonRoute, lifespan=lifespan)

    @router.post("/mcp", include_in_schema=False)
    async def mcp(request: Request) -> Response:
        await request.json()  # bounded and strict, as all bodies
        return _AsgiResponse(endpoint, await request.body())

    return router


class _AsgiResponse(Response):
    """What another application answers to a body that has been read."""

    def __init__(self, app: ASGIApp, body: bytes) -> None:
        super().__init__()
        self._app, self._request_body = app, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pending: list[Message] = [{"type": "http.request", "body": self._request_body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app({**scope, "gemify.app": scope["app"]}, replay, send)


async def _search(request: Request, **fields: Any) -> list[Passage]:
    try:
        response = await search_route(SearchRequest(**fields), _inner(request))
    except Exception as error:
        _raise_tool_error(error)
    return [Passage(**passage) for passage in json.loads(bytes(response.body))["data"]]


async def _ask(request: Request, question: str, **search: Any) -> SourcedAnswer:
    fields = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _MAX_NEW_TOKENS,
        "temperature": 0.0,
        "gemify": {"search": search},
    }
    try:
        response = await create_chat_completion(CreateChatCompletionRequest.model_validate(fields), _inner(request))
    except Exception as error:
        _raise_tool_error(error)
    answer = json.loads(bytes(response.body))
    sources = [Passage(**passage) for passage in answer["gemify"]["sources"]]
    return SourcedAnswer(answer=answer["choices"][0]["message"]["content"] or "", sources=sources)


def _inner(request: Request) -> Request:
    """Return the request as the other routes see it: one of the outer application."""
    return Request({**request.scope, "app": request.scope["gemify.app"]}, request.receive)


def _describe(error: Exception) -> str:
    """One line about an error of a store, without its path."""
    return str(from_engine_error(error).detail) if isinstance(error, ValueError) else first_line(error)


def _raise_tool_error(error: Exception) -> NoReturn:
    if isinstance(error, ApiError):
        raise ToolError(str(error.detail)) from error
    if isinstance(error, ClientDisconnectedError):
        raise ToolError("the client has gone") from error
    logger.error("request failed", exc_info=error)
    raise ToolError("the server failed at this request: see its log") from error
