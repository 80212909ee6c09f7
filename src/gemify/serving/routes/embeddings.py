"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.engine.requests import EmbeddingOutput
from gemify.io.vectors import normalize
from gemify.serving.dispatch import EngineClient, run_until_disconnect
from gemify.serving.errors import bad_request
from gemify.serving.protocol.requests import CreateEmbeddingRequest
from gemify.serving.protocol.responses import CompletionUsage, CreateEmbeddingResponse, Embedding
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import add_log_fields, get_key_name, get_state

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/embeddings", response_model=None, responses={200: {"model": CreateEmbeddingResponse}}, tags=["OpenAI"]
)
async def create_embeddings(body: CreateEmbeddingRequest, request: Request) -> Response:
    """Embed texts, or the token ids of texts (special tokens not among them). Vectors have length 1."""
    state = get_state(request)
    state.require_model(body.model)
    limit = state.settings.max_texts
    if len(body.input) > limit:
        raise bad_request(
            f"input must hold at most {limit} texts, got {len(body.input)}: send several requests", "input"
        )
    width = state.engine.gem.get_embedding_dim()
    if body.dimensions is not None and body.dimensions > width:
        raise bad_request(f"dimensions must lie in 1..{width}, got {body.dimensions}", "dimensions")
    rows = await state.tokenizer.tokenize_texts(body.input)
    vectors_ND, num_tokens = await embed(request, rows)
    return await asyncio.to_thread(_build_response, vectors_ND, body, state.model, num_tokens)


async def embed(request: Request, rows: list[list[int]]) -> tuple[np.ndarray, int]:
    """Embed texts for a request, whose key is charged.

    Args:
        request: the HTTP request; the work is given up if its client disconnects.
        rows: token ids of each text.

    Returns:
        Vectors [N, D] as the model gives them, and the number of tokens.
    """
    state = get_state(request)
    key, num_tokens = get_key_name(request), sum(map(len, rows))
    state.rate_limiter.check_tokens(key, num_tokens)
    with EngineClient() as client:
        client.submit(partial(state.engine.embed, rows))
        state.rate_limiter.add_tokens(key, num_tokens)
        add_log_fields(request, prompt_tokens=client.prompt_tokens, texts=len(rows))

        async def collect() -> np.ndarray:
            outputs = [event.vectors_ND async for _, event in client.events() if isinstance(event, EmbeddingOutput)]
            return outputs[0]

        vectors_ND = await run_until_disconnect(request.receive, collect(), state.settings.timeout)
        return vectors_ND, client.prompt_tokens


def _build_response(vectors_ND: np.ndarray, body: CreateEmbeddingRequest, model: str, num_tokens: int) -> Response:
    vectors_ND = normalize(vectors_ND[:, : body.dimensions])
    listed: list[Any]
    if body.encoding_format == "base64":
        listed = [base64.b64encode(v.astype("<f4").tobytes()).decode("ascii") for v in vectors_ND]
    else:
        listed = vectors_ND.tolist()
    return CreateEmbeddingResponse(
        object="list",
        data=[Embedding(object="embedding", index=i, embedding=v) for i, v in enumerate(listed)],
        model=model,
        usage=CompletionUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    ).to_response()
