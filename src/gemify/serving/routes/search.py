"""POST /v1/search: passages of the index, their question embedded by the engine beside all other work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gemify.io.errors import first_line
from gemify.serving.errors import bad
from gemify.serving.protocol.requests import SearchRequest
from gemify.serving.protocol.responses import Passages
from gemify.serving.request_body import JsonRoute
from gemify.serving.routes.embeddings import embed
from gemify.serving.state import house_of

router = APIRouter(route_class=JsonRoute)


@dataclass(frozen=True)
class Finding:
    """What a search found, and the tokens its question had."""

    found: list[Any]
    tokens: int


async def find(request: Request, query: str, *, k: int, mode: str) -> Finding:
    """The index's passages for a question; ApiError 404 where there is no index."""
    house = house_of(request)
    index = house.require_index()
    if not query.strip():
        raise bad("the query is empty: give some words", "query")
    vector, tokens = None, 0
    if mode != "fts":
        rows = [await house.prompts.query(query)]
        vectors_ND, tokens = await embed(request, rows)
        vector = vectors_ND[0]
    try:
        found = await asyncio.to_thread(partial(index.search, query, k=k, mode=mode, vector=vector))
    except ValueError as error:
        raise bad(first_line(error), "query") from error
    return Finding(list(found), tokens)


@router.post("/v1/search", response_model=None, responses={200: {"model": Passages}}, tags=["gemify"])
async def search(wish: SearchRequest, request: Request) -> Response:
    """The passages that fit a question best, best first."""
    house = house_of(request)
    house.require_model(wish.model)
    finding = await find(request, wish.query, k=wish.k, mode=wish.mode)
    usage = {"prompt_tokens": finding.tokens, "total_tokens": finding.tokens}
    data = [p.to_json() for p in finding.found]
    return JSONResponse({"object": "list", "data": data, "model": house.model, "usage": usage})
