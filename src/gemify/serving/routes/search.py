"""POST /v1/search: passages of the index, their question embedded by the engine beside all other work."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.io.errors import first_line
from gemify.serving.errors import bad_request
from gemify.serving.protocol.requests import SearchRequest
from gemify.serving.protocol.responses import CompletionUsage, Passage, SearchResponse
from gemify.serving.request_body import JsonRoute
from gemify.serving.routes.embeddings import embed
from gemify.serving.state import get_state

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/search", response_model=None, responses={200: {"model": SearchResponse}}, tags=["gemify"])
async def search(body: SearchRequest, request: Request) -> Response:
    """Find the passages that fit a question best, best first."""
    state = get_state(request)
    state.require_model(body.model)
    index = state.require_index()
    if not body.query.strip():
        raise bad_request("the query is empty: give some words", "query")
    vector, tokens = None, 0
    if body.mode != "fts":
        vectors_ND, tokens = await embed(request, [await state.tokenizer.tokenize_query(body.query)])
        vector = vectors_ND[0]
    try:
        found = await asyncio.to_thread(partial(index.search, body.query, k=body.k, mode=body.mode, vector=vector))
    except ValueError as error:
        raise bad_request(first_line(error), "query") from error
    return SearchResponse(
        object="list",
        data=[Passage(**passage.to_json()) for passage in found],
        model=state.model,
        usage=CompletionUsage(prompt_tokens=tokens, total_tokens=tokens),
    ).to_response()
