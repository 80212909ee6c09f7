"""POST /v1/rerank, /rerank and /v2/rerank: documents by how well they fit a query, in Jina's and Cohere's forms."""

from __future__ import annotations

import secrets

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.serving.errors import bad_request
from gemify.serving.protocol.requests import RerankRequest
from gemify.serving.protocol.responses import CompletionUsage, RerankResponse, RerankResult
from gemify.serving.request_body import JsonRoute
from gemify.serving.rerank import score
from gemify.serving.state import admit

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/rerank", response_model=None, responses={200: {"model": RerankResponse}}, tags=["rerank"])
@router.post("/rerank", response_model=None, responses={200: {"model": RerankResponse}}, tags=["rerank"])
async def rerank(body: RerankRequest, request: Request) -> Response:
    """Sort documents by their scores for the query, the best first (Jina's form)."""
    return await _rerank(body, request, return_documents=body.return_documents is not False)


@router.post("/v2/rerank", response_model=None, responses={200: {"model": RerankResponse}}, tags=["rerank"])
async def rerank_as_cohere(body: RerankRequest, request: Request) -> Response:
    """Sort documents by their scores for the query, the best first (Cohere's form)."""
    return await _rerank(body, request, return_documents=bool(body.return_documents))


async def _rerank(body: RerankRequest, request: Request, *, return_documents: bool) -> Response:
    state = admit(request, body)
    limit = state.settings.max_texts
    if len(body.documents) >= limit:
        raise bad_request(
            f"documents must hold at most {limit - 1} texts, got {len(body.documents)}: send several requests",
            "documents",
        )
    scores, num_tokens = await score(request, body.query, body.documents, body.rerank)
    if body.rerank == "lm":
        scores = np.exp(-np.logaddexp(0, -scores))  # of yes, where it is yes or no
    best = np.argsort(-scores, kind="stable")[: body.top_n]
    shown = [{"document": {"text": body.documents[i]}} if return_documents else {} for i in best]
    return RerankResponse(
        id=f"rerank-{secrets.token_hex(12)}",
        object="list",
        model=state.model,
        results=[
            RerankResult(index=int(i), relevance_score=float(scores[i]), **fields)
            for i, fields in zip(best, shown, strict=True)
        ],
        usage=CompletionUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    ).to_response()
