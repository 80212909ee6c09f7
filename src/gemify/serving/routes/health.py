"""GET /health, /ready, /metrics and /v1/stats: for orchestrators, Prometheus and the page."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from gemify.serving.metrics import plain_stats
from gemify.serving.protocol.responses import Health, Model, Models
from gemify.serving.state import House, house_of

router = APIRouter(tags=["operation"])


@router.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
async def health(request: Request) -> Response:
    """Whether the process is alive. 503: the engine has died, start the server again."""
    alive = house_of(request).engine.stats().alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/ready", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
async def ready(request: Request) -> Response:
    """Whether requests should come here: the model has answered, and the server is not about to stop."""
    house = house_of(request)
    if house.stopping:
        return JSONResponse({"status": "stopping"}, 503)
    if not house.engine.stats().alive:
        return JSONResponse({"status": "failed"}, 503)
    return JSONResponse({"status": "ready"}) if house.ready else JSONResponse({"status": "starting"}, 503)


@router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counts, in Prometheus' text format."""
    return Response(house_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/stats", response_model=dict[str, Any], tags=["gemify"])
async def stats(request: Request) -> Any:
    """The engine's numbers, and what this server can do."""
    house = house_of(request)
    gem = house.engine.gem
    return {
        **plain_stats(house.engine.stats()),
        "object": "stats",
        "model": house.model,
        "ready": house.ready and not house.stopping,
        "requests": house.metrics.in_flight_now,
        "has_index": house.index is not None,
        "has_chat": house.prompts.has_chat,
        "special_tokens": gem.config.k,
        "dimensions": gem.get_embedding_dim(),
        "max_text_tokens": gem.max_seq_length,
        "max_tokens": house.engine.limit,
    }


# GET /v1/models: the one model there is.

models_router = APIRouter(tags=["OpenAI"])


@models_router.get("/v1/models", response_model=Models)
async def list_models(request: Request) -> Any:
    """The models of this server."""
    return {"object": "list", "data": [_model(house_of(request))]}


@models_router.get("/v1/models/{name:path}", response_model=Model)
async def retrieve_model(name: str, request: Request) -> Any:
    """One of them."""
    house = house_of(request)
    house.require_model(name)
    return _model(house)


def _model(house: House) -> dict[str, Any]:
    return {"id": house.model, "object": "model", "created": house.started, "owned_by": "gemify"}
