"""GET /v1/stores/map and /v1/passages/{id}: the store as points in the plane, and its passages by their ids."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from gemify.retrieval.index import GemIndex, PassageNotFoundError
from gemify.serving.errors import ApiError, from_engine_error
from gemify.serving.protocol.responses import Passage, PassagesResponse, StoreMapResponse
from gemify.serving.state import AppState, get_state

router = APIRouter(tags=["gemify"])

_MAX_AROUND = 20


@router.get("/v1/stores/map", response_model=None, responses={200: {"model": StoreMapResponse}})
async def store_map(request: Request) -> Response:
    """Return the store's passages as points in the plane: near means alike. At most 20,000, evenly spread."""
    state = get_state(request)
    try:
        body = await state.maps.render(_require_store(state))
    except ValueError as error:
        raise from_engine_error(error) from error
    return Response(body, media_type="application/json")


@router.get("/v1/passages/{passage_id:path}", response_model=None, responses={200: {"model": PassagesResponse}})
async def read_passages(
    passage_id: str,
    request: Request,
    before: Annotated[int, Query(ge=0, le=_MAX_AROUND)] = 0,
    after: Annotated[int, Query(ge=0, le=_MAX_AROUND)] = 0,
) -> Response:
    """Return a passage by its id, and those that stand before and after it in its file, in their order."""
    index = _require_store(get_state(request))
    try:
        found = await asyncio.to_thread(index.read, passage_id, before=before, after=after)
    except PassageNotFoundError as error:
        raise ApiError(404, str(error), param="passage_id", code="passage_not_found") from error
    except ValueError as error:
        raise from_engine_error(error) from error
    return PassagesResponse(object="list", data=[Passage(**passage.to_json()) for passage in found]).to_response()


def _require_store(state: AppState) -> GemIndex:
    index = state.require_index()
    if not isinstance(index, GemIndex):
        raise ApiError(404, "this server's index is no store: start it with --store DIR", code="no_index")
    return index
