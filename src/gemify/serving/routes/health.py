"""GET /health, /ready, /metrics and /v1/stats: for orchestrators, Prometheus and the page."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from gemify.serving.metrics import plain_stats
from gemify.serving.protocol.responses import HealthResponse, ListModelsResponse, Model
from gemify.serving.state import AppState, get_state

router = APIRouter(tags=["operation"])


@router.get("/health", response_model=None, responses={200: {"model": HealthResponse}, 503: {"model": HealthResponse}})
async def health(request: Request) -> Response:
    """Whether the process is alive. 503: the engine has died, start the server again."""
    alive = get_state(request).engine.stats().alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/ready", response_model=None, responses={200: {"model": HealthResponse}, 503: {"model": HealthResponse}})
async def ready(request: Request) -> Response:
    """Whether requests should come here: the model has answered, and the server is not about to stop."""
    state = get_state(request)
    if state.stopping:
        return JSONResponse({"status": "stopping"}, 503)
    if not state.engine.stats().alive:
        return JSONResponse({"status": "failed"}, 503)
    return JSONResponse({"status": "ready"}) if state.ready else JSONResponse({"status": "starting"}, 503)


@router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counts, in Prometheus' text format."""
    return Response(get_state(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/stats", response_model=dict[str, Any], tags=["gemify"])
async def stats(request: Request) -> Any:
    """The engine's numbers, and what this server can do."""
    state = get_state(request)
    gem = state.engine.gem
    return {
        **plain_stats(state.engine.stats()),
        "object": "stats",
        "model": state.model,
        "ready": state.ready and not state.stopping,
        "num_running_requests": state.metrics.in_flight_now,
        "has_index": state.index is not None,
        "has_chat": state.tokenizer.has_chat,
        "special_tokens": gem.config.k,
        "dimensions": gem.get_embedding_dim(),
        "max_text_tokens": gem.max_seq_length,
        "max_model_len": state.engine.max_model_len,
    }


# GET /v1/models: the one model there is.

models_router = APIRouter(tags=["OpenAI"])


@models_router.get("/v1/models", response_model=ListModelsResponse)
async def list_models(request: Request) -> Any:
    """The models of this server."""
    return {"object": "list", "data": [_model(get_state(request))]}


@models_router.get("/v1/models/{name:path}", response_model=Model)
async def retrieve_model(name: str, request: Request) -> Any:
    """One of them."""
    state = get_state(request)
    state.require_model(name)
    return _model(state)


def _model(state: AppState) -> dict[str, Any]:
    return {"id": state.model, "object": "model", "created": state.started, "owned_by": "gemify"}
