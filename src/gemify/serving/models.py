"""GET /v1/models: the one model there is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gemify.serving.house import House, house_of
from gemify.serving.responses import Model, Models

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=Models)
async def list_models(request: Request) -> Any:
    """The models of this server."""
    return {"object": "list", "data": [_model(house_of(request))]}


@router.get("/v1/models/{name:path}", response_model=Model)
async def retrieve_model(name: str, request: Request) -> Any:
    """One of them."""
    house = house_of(request)
    house.require_model(name)
    return _model(house)


def _model(house: House) -> dict[str, Any]:
    return {"id": house.model, "object": "model", "created": house.started, "owned_by": "gemify"}
