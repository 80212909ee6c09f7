"""GET /health, /ready, /metrics and /v1/stats, for orchestrators, Prometheus and the page; GET /v1/models; the page.

GET / and /page/* are a small web page that uses the routes. It loads nothing from anywhere else.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from gemify.retrieval.index import GemIndex
from gemify.serving.errors import ApiError
from gemify.serving.protocol.responses import HealthResponse, ListModelsResponse, Model
from gemify.serving.state import AppState, get_key_name, get_state

router = APIRouter(tags=["operation"])
models_router = APIRouter(tags=["OpenAI"])


@router.get("/health", response_model=None, responses={200: {"model": HealthResponse}, 503: {"model": HealthResponse}})
async def health(request: Request) -> Response:
    """Say whether the process is alive. 503: the engine has died, start the server again."""
    if get_state(request).engine.stats().alive:
        return HealthResponse(status="ok").to_response()
    return HealthResponse(status="failed").to_response(503)


@router.get("/ready", response_model=None, responses={200: {"model": HealthResponse}, 503: {"model": HealthResponse}})
async def ready(request: Request) -> Response:
    """Say whether requests should come here: the model has answered, and the server is not about to stop."""
    state = get_state(request)
    if state.stopping:
        return HealthResponse(status="stopping").to_response(503)
    if not state.engine.stats().alive:
        return HealthResponse(status="failed").to_response(503)
    return (
        HealthResponse(status="ready").to_response()
        if state.ready
        else HealthResponse(status="starting").to_response(503)
    )


@router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format."""
    return Response(get_state(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/stats", response_model=dict[str, Any], tags=["gemify"])
async def stats(request: Request) -> Response:
    """Return the engine's statistics, and what this server can do."""
    state = get_state(request)
    gem = state.engine.gem
    return JSONResponse(
        {
            **dataclasses.asdict(state.engine.stats()),
            "object": "stats",
            "model": state.model,
            "ready": state.ready and not state.stopping,
            "num_running_requests": state.metrics.in_flight_now,
            "has_index": bool(state.stores),
            "has_store": any(isinstance(store.index, GemIndex) for store in state.stores.values()),
            "stores": list(state.stores),
            "can_upload": bool(state.stores) and state.may_upload(get_key_name(request)),
            "has_chat": state.tokenizer.has_chat,
            "special_tokens": gem.config.k,
            "dimensions": gem.get_embedding_dim(),
            "max_text_tokens": gem.max_seq_length,
            "max_model_len": state.engine.max_model_len,
        }
    )


@models_router.get("/v1/models", response_model=ListModelsResponse)
async def list_models(request: Request) -> ListModelsResponse:
    """List the names of this server's model."""
    state = get_state(request)
    models = [_build_model(state, name) for name in state.settings.model_names]
    return ListModelsResponse(object="list", data=models)


@models_router.get("/v1/models/{name:path}", response_model=Model)
async def retrieve_model(name: str, request: Request) -> Model:
    """Return the model of this name."""
    state = get_state(request)
    state.require_model(name)
    return _build_model(state, name)


def _build_model(state: AppState, name: str) -> Model:
    return Model(id=name, object="model", created=state.started, owned_by="gemify")


page_router = APIRouter(include_in_schema=False)

_CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
_FILES = files("gemify.serving") / "page"


@page_router.get("/")
async def page(request: Request) -> Response:
    """Return the page."""
    return _page_file("index.html")


@page_router.get("/page/{name}")
async def page_part(name: str, request: Request) -> Response:
    """Return a script, a style or a picture of the page."""
    return _page_file(name)


def _page_file(name: str) -> Response:
    body, headers = read_page_file(name)
    return Response(body, headers=headers)


def read_page_file(name: str) -> tuple[bytes, dict[str, str]]:
    """Return a file of the page and the headers it is sent with; ApiError 404 if there is none of this name."""
    content_type = _CONTENT_TYPES.get(PurePosixPath(name).suffix)
    if content_type is None or name not in _page_names():
        raise ApiError(404, f"there is no {name[:80]!r} in the page", code="not_found")
    headers = {
        "Content-Type": f"{content_type}; charset=utf-8",
        "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return (_FILES / name).read_bytes(), headers


@cache
def _page_names() -> frozenset[str]:
    """Return the names of the page's files. No other name becomes a path."""
    return frozenset(path.name for path in _FILES.iterdir())
