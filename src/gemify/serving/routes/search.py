"""POST /v1/search: passages of the index, their question embedded by the engine beside all other work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gemify.io.errors import first_line
from gemify.serving.errors import bad_request
from gemify.serving.protocol.requests import SearchRequest
from gemify.serving.protocol.responses import SearchResponse
from gemify.serving.request_body import JsonRoute
from gemify.serving.routes.embeddings import embed
from gemify.serving.state import get_state

router = APIRouter(route_class=JsonRoute)


@dataclass(frozen=True)
class SearchResults:
    """What a search found, and the tokens its question had."""

    passages: list[Any]
    tokens: int


async def search_index(request: Request, query: str, *, k: int, mode: str) -> SearchResults:
    """The index's passages for a question; ApiError 404 where there is no index."""
    state = get_state(request)
    index = state.require_index()
    if not query.strip():
        raise bad_request("the query is empty: give some words", "query")
    vector, tokens = None, 0
    if mode != "fts":
        rows = [await state.tokenizer.tokenize_query(query)]
        vectors_ND, tokens = await embed(request, rows)
        vector = vectors_ND[0]
    try:
        found = await asyncio.to_thread(partial(index.search, query, k=k, mode=mode, vector=vector))
    except ValueError as error:
        raise bad_request(first_line(error), "query") from error
    return SearchResults(list(found), tokens)


@router.post("/v1/search", response_model=None, responses={200: {"model": SearchResponse}}, tags=["gemify"])
async def search(body: SearchRequest, request: Request) -> Response:
    """The passages that fit a question best, best first."""
    state = get_state(request)
    state.require_model(body.model)
    results = await search_index(request, body.query, k=body.k, mode=body.mode)
    usage = {"prompt_tokens": results.tokens, "total_tokens": results.tokens}
    data = [p.to_json() for p in results.passages]
    return JSONResponse({"object": "list", "data": data, "model": state.model, "usage": usage})
