"""The web application: routes over one engine, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from gemify import __version__
from gemify.engine.sampling import SamplingParams
from gemify.rag.context import SearchIndex
from gemify.retrieval.index import GemIndex
from gemify.retrieval.rerank import YesNoPrompts
from gemify.serving.auth import KeyRing, RateLimiter
from gemify.serving.dispatch import EngineClient
from gemify.serving.errors import ApiError, bad_request
from gemify.serving.map_cache import MapCache
from gemify.serving.middleware import RequestMiddleware
from gemify.serving.protocol.responses import ErrorResponse
from gemify.serving.rag import RagService, ServedStore, kv_store_of
from gemify.serving.routes import chat, embeddings, health, messages, rerank, responses, stores, tokenize
from gemify.serving.settings import ServerSettings
from gemify.serving.state import AppState, Metrics
from gemify.serving.tokenization import RequestTokenizer
from gemify.serving.upload import FileUploads

if TYPE_CHECKING:
    from gemify.engine.engine import Engine

_OPEN_PATHS = frozenset({"/health", "/ready"})
_SECURITY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def correct_openapi(app: FastAPI, *, with_keys: bool) -> Callable[[], dict[str, Any]]:
    """Return the function behind GET /openapi.json: the framework's, corrected.

    Args:
        app: the application.
        with_keys: whether routes need an API key.

    Returns:
        A function that returns the schema. Invalid bodies are 400 in it, not 422.
    """
    build_schema = app.openapi

    def openapi() -> dict[str, Any]:
        schema = build_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if with_keys and path not in _OPEN_PATHS:
                    operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]
        if with_keys:
            schema["components"]["securitySchemes"] = _SECURITY_SCHEMES
        return schema

    return openapi


logger = logging.getLogger("gemify.serving")

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The request is invalid.",
        401: "No API key, or an unknown one.",
        403: "The Host header names another site, or the key may not do this.",
        404: "No such model or route.",
        408: "The body arrived too slowly.",
        413: "The body is too large.",
        415: "The body, or a file in it, is of a kind that is not read.",
        429: "Too many requests or tokens; Retry-After says when to try again.",
        503: "The server is stopping, or a store cannot be used now.",
        504: "The answer took too long.",
    }.items()
}


def create_app(
    engine: Engine,
    settings: ServerSettings,
    indexes: Mapping[str, SearchIndex] | None = None,
    *,
    keys: KeyRing | None = None,
) -> FastAPI:
    """Create the application over an engine, which it starts, warms up and stops.

    Args:
        engine: not started yet.
        settings: the server's options.
        indexes: what /v1/search searches, by the stores' names. The first one is the default.
        keys: API keys; None: those of the settings' file, or of the environment.
    """
    tokenizer = RequestTokenizer(engine.gem)
    served = {name: _serve_store(name, index, engine, settings) for name, index in (indexes or {}).items()}
    rag = RagService(engine) if served and tokenizer.has_chat else None
    metrics = Metrics(engine.stats)
    state = AppState(
        engine=engine,
        settings=settings,
        stores=served,
        keys=KeyRing.read(settings.api_keys) if keys is None else keys,
        rate_limiter=RateLimiter(
            settings.requests_per_minute, settings.tokens_per_minute, on_tokens=metrics.count_tokens
        ),
        metrics=metrics,
        tokenizer=tokenizer,
        grammars=engine.grammar_compiler(),
        rag=rag,
        maps=MapCache(),
        yes_no_prompts=YesNoPrompts.of(engine.gem),
    )
    app = FastAPI(
        title="gemify",
        version=__version__,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        summary="One language model that writes and embeds, behind OpenAI's routes and some of its own.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    app.state.gemify = state
    app.state.uploads = FileUploads(engine.gem) if settings.upload_key else None
    for route in (chat, responses, messages, embeddings, rerank, tokenize):
        app.include_router(route.router, responses=_ERRORS)
    app.include_router(stores.router, responses=_ERRORS)
    app.include_router(health.models_router, responses={s: _ERRORS[s] for s in (401, 403, 404)})
    app.include_router(health.router)
    app.include_router(health.page_router)
    documents = {name: store.index for name, store in served.items() if isinstance(store.index, GemIndex)}
    if documents and importlib.util.find_spec("mcp") is not None:  # the extra `mcp`
        from gemify.serving.mcp_route import create_mcp_router

        app.include_router(
            create_mcp_router(documents, has_chat=rag is not None, max_body_bytes=settings.max_body_bytes)
        )
    app.openapi = correct_openapi(app, with_keys=len(state.keys) > 0)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _respond_to_http_error)
    app.add_exception_handler(RequestValidationError, _respond_to_invalid_body)
    app.add_middleware(RequestMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-Request-Id",
                "X-Api-Key",
                "Anthropic-Version",
                "Anthropic-Beta",
            ],
            expose_headers=["X-Request-Id", "Retry-After", "X-Gemify-Ignored"],
        )
    return app


def _serve_store(name: str, index: SearchIndex, engine: Engine, settings: ServerSettings) -> ServedStore:
    open_kv_store = kv_store_of(settings, settings.stores.get(name))
    return ServedStore(name, index, None if open_kv_store is None else open_kv_store(engine.gem))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start the engine and warm it up; at the end let it finish the requests it has accepted."""
    state: AppState = app.state.gemify
    state.engine.start()
    warming = asyncio.create_task(_warm_up(state))
    try:
        yield
    finally:
        state.stopping = True
        warming.cancel()
        finished = await asyncio.to_thread(partial(state.engine.stop, timeout_s=state.settings.stop_timeout))
        state.tokenizer.close()
        state.grammars.close()
        if state.rag is not None:
            state.rag.close()
        if app.state.uploads is not None:
            app.state.uploads.close()
        logger.info("stopped" if finished else "stopped; the last requests were cancelled")


async def _warm_up(state: AppState) -> None:
    """Embed and generate something, so that the first client does not wait for one-time work; then be ready."""
    try:
        try:  # the tables of all tokens, which hold all threads up
            await asyncio.wrap_future(state.grammars.submit('start: "a"'))
        except ValueError as error:
            logger.warning(str(error))
        rows = (await state.tokenizer.tokenize_texts(["ready"])).rows
        with EngineClient() as client:
            client.submit(partial(state.engine.embed, rows))
            if rows[0]:
                client.submit(partial(state.engine.generate, rows[0], SamplingParams(max_tokens=2, temperature=0.0)))
            async for _ in client.events():
                pass
    except Exception as error:
        logger.error("the warm-up failed: the server never becomes ready", exc_info=error)
        return
    state.ready = True
    logger.info("ready")


async def _respond_to_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        error = _from_framework_error(request, error)
    return Response(error.to_body(request.url.path), error.status_code, dict(error.headers or {}), "application/json")


def _from_framework_error(request: Request, error: HTTPException) -> ApiError:
    path, method = request.url.path[:200], request.method[:16]
    if error.status_code == 404:
        return ApiError(404, f"there is no route {method} {path}: /openapi.json lists them", code="unknown_url")
    if error.status_code == 405:
        allowed = Headers(error.headers or {}).get("allow", "")
        message = f"{path} does not take {method}" + (f", but {allowed}" if allowed else "")
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail)[:200], headers=error.headers)


async def _respond_to_invalid_body(request: Request, error: Exception) -> Response:
    """Respond with the first thing that is wrong with a body: 400, as OpenAI does, not 422."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ())[1:])[:120]
    message = str(first.get("msg", "invalid")).removeprefix("Value error, ")[:300]
    refused = bad_request(f"{where}: {message}" if where else message, where or None)
    return Response(refused.to_body(request.url.path), 400, media_type="application/json")
