"""The stores by name, their files, maps and passages.

GET /v1/stores, /v1/stores/map and /v1/passages/{id}; POST /v1/stores/{store}/files, and DELETE of one of them.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from gemify.retrieval.index import GemIndex, PassageNotFoundError
from gemify.serving.errors import ApiError, from_engine_error
from gemify.serving.protocol.responses import (
    ListStoresResponse,
    Passage,
    PassagesResponse,
    StoreFile,
    StoreInfo,
    StoreMapResponse,
)
from gemify.serving.rag import ServedStore
from gemify.serving.request_body import read_form_file
from gemify.serving.state import get_key_name, get_state
from gemify.serving.upload import FileUploads, require_file_name

router = APIRouter(tags=["gemify"])

_MAX_AROUND = 20
StoreName = Annotated[str | None, Query(description="The store's name. Default the first.")]


@router.get("/v1/stores", response_model=None, responses={200: {"model": ListStoresResponse}})
async def list_stores(request: Request) -> Response:
    """List the stores by name, the default one first."""
    described = await asyncio.to_thread(lambda: list(map(_describe, get_state(request).stores.values())))
    return ListStoresResponse(object="list", data=described).to_response()


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


_FORM = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
_FORM_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@router.post(
    "/v1/stores/{store}/files",
    response_model=None,
    responses={200: {"model": StoreFile}},
    openapi_extra=_FORM_BODY,
)
async def add_file(store: str, request: Request) -> Response:
    """Put a file into a store, in the place of one of its name. It is found as soon as this is answered."""
    uploads, index = _require_uploads(request), _require_index(request, store)
    given, content = await read_form_file(request)
    name = require_file_name(given)
    record, skipped = await uploads.add(request, index, name, content)
    added = StoreFile(id=name, store=store, bytes=record.size, num_passages=record.chunks, skipped=skipped)
    return added.to_response()


@router.delete("/v1/stores/{store}/files/{name}", response_model=None, status_code=204)
async def delete_file(store: str, name: str, request: Request) -> Response:
    """Remove a file that was put into a store."""
    uploads, index = _require_uploads(request), _require_index(request, store)
    await uploads.remove(request, index, require_file_name(name))
    return Response(status_code=204)


def _require_uploads(request: Request) -> FileUploads:
    uploads: FileUploads | None = request.app.state.uploads
    if uploads is None or not get_state(request).may_upload(get_key_name(request)):
        raise ApiError(
            403, "this key may put no files into the stores: --upload-key names the keys that may", code="no_upload"
        )
    return uploads


def _describe(store: ServedStore) -> StoreInfo:
    status: Literal["ready", "unavailable"] = "ready"
    length = None
    try:
        length = len(store.index) if isinstance(store.index, GemIndex) else None
    except ValueError:
        status = "unavailable"
    return StoreInfo(id=store.name, status=status, num_passages=length)


def _require_index(request: Request, name: str | None) -> GemIndex:
    index = get_state(request).require_store(name).index
    if not isinstance(index, GemIndex):
        raise ApiError(404, "this server's index is no store: start it with --store DIR", code="no_index")
    return index
