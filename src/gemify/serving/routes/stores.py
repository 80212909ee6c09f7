"""GET /v1/stores: the stores by name; /v1/stores/map and /v1/passages/{id}: a store in the plane, and its passages."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from gemify.retrieval.index import GemIndex, PassageNotFoundError
from gemify.serving.errors import ApiError, from_engine_error
from gemify.serving.protocol.responses import (
    ListStoresResponse,
    Passage,
    PassagesResponse,
    StoreInfo,
    StoreMapResponse,
)
from gemify.serving.rag import ServedStore
from gemify.serving.state import get_state

router = APIRouter(tags=["gemify"])

_MAX_AROUND = 20
StoreName = Annotated[str | None, Query(description="The store's name. Default the first.")]


@router.get("/v1/stores", response_model=None, responses={200: {"model": ListStoresResponse}})
async def list_stores(request: Request) -> Response:
    """List the stores by name, the default one first."""
    stores = get_state(request).stores.values()
    return ListStoresResponse(
        object="list", data=await asyncio.to_thread(lambda: list(map(_describe, stores)))
    ).to_response()


@router.get("/v1/stores/map", response_model=None, responses={200: {"model": StoreMapResponse}})
async def store_map(request: Request, store: StoreName = None) -> Response:
    """Return a store's passages as points in the plane: near means alike. At most 20,000, evenly spread."""
    try:
        body = await get_state(request).maps.render(_require_index(request, store))
    except ValueError as error:
        raise from_engine_error(error) from error
    return Response(body, media_type="application/json")


@router.get("/v1/passages/{passage_id:path}", response_model=None, responses={200: {"model": PassagesResponse}})
async def read_passages(
    passage_id: str,
    request: Request,
    before: Annotated[int, Query(ge=0, le=_MAX_AROUND)] = 0,
    after: Annotated[int, Query(ge=0, le=_MAX_AROUND)] = 0,
    store: StoreName = None,
) -> Response:
    """Return a passage by its id, and those that stand before and after it in its file, in their order."""
    index = _require_index(request, store)
    try:
        found = await asyncio.to_thread(index.read, passage_id, before=before, after=after)
    except PassageNotFoundError as error:
        raise ApiError(404, str(error), param="passage_id", code="passage_not_found") from error
    except ValueError as error:
        raise from_engine_error(error) from error
    return PassagesResponse(object="list", data=[Passage(**passage.to_json()) for passage in found]).to_response()


def _describe(store: ServedStore) -> StoreInfo:
    try:
        length = len(store.index) if isinstance(store.index, GemIndex) else None
    except ValueError:
        return StoreInfo(id=store.name, object="store", status="unavailable", num_passages=None)
    return StoreInfo(id=store.name, object="store", status="ready", num_passages=length)


def _require_index(request: Request, name: str | None) -> GemIndex:
    index = get_state(request).require_store(name).index
    if not isinstance(index, GemIndex):
        raise ApiError(404, "this server's index is no store: start it with --store DIR", code="no_index")
    return index
