"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
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
from gemify.serving.protocol.responses import CreateEmbeddingResponse
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
    if len(body.input) > state.settings.max_texts:
        most = state.settings.max_texts
        raise bad_request(
            f"input must hold at most {most} texts, got {len(body.input)}: send several requests", "input"
        )
    width = state.engine.gem.get_embedding_dim()
    if body.dimensions is not None and body.dimensions > width:
        raise bad_request(f"dimensions must lie in 1..{width}, got {body.dimensions}", "dimensions")
    rows = await state.tokenizer.tokenize_texts(body.input)
    vectors_ND, tokens = await embed(request, rows)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    write = partial(_written, vectors_ND, body, state.model, usage)
    return Response(await asyncio.to_thread(write), media_type="application/json")


async def embed(request: Request, rows: list[list[int]]) -> tuple[np.ndarray, int]:
    """Vectors [N, D] as the model gives them, and the tokens read for them; counted, logged, given up when nobody waits."""
    state = get_state(request)
    key, tokens = get_key_name(request), sum(map(len, rows))
    state.rate_limiter.check_tokens(key, tokens)
    with EngineClient() as client:
        client.submit(partial(state.engine.embed, rows))
        state.rate_limiter.add_tokens(key, tokens)
        add_log_fields(request, prompt_tokens=client.prompt_tokens, texts=len(rows))

        async def vectors() -> np.ndarray:
            found = [event.vectors_ND async for _, event in client.events() if isinstance(event, EmbeddingOutput)]
            return found[0]

        return await run_until_disconnect(request.receive, vectors(), state.settings.timeout), client.prompt_tokens


def _written(vectors_ND: np.ndarray, body: CreateEmbeddingRequest, model: str, usage: dict[str, int]) -> bytes:
    vectors_ND = normalize(vectors_ND[:, : body.dimensions])
    listed: list[Any]
    if body.encoding_format == "base64":
        listed = [base64.b64encode(v.astype("<f4").tobytes()).decode("ascii") for v in vectors_ND]
    else:
        listed = vectors_ND.tolist()
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(listed)]
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage}, separators=(",", ":")).encode()
