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

from gemify.engine.requests import Vectors
from gemify.io.vectors import normalize
from gemify.serving.dispatch import Asking, while_there
from gemify.serving.errors import bad
from gemify.serving.protocol.requests import EmbeddingsRequest
from gemify.serving.protocol.responses import Embeddings
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import house_of, key_of, note

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings", response_model=None, responses={200: {"model": Embeddings}}, tags=["OpenAI"])
async def create_embeddings(wish: EmbeddingsRequest, request: Request) -> Response:
    """Embed texts, or the token ids of texts (special tokens not among them). Vectors have length 1."""
    house = house_of(request)
    house.require_model(wish.model)
    if len(wish.input) > house.settings.max_texts:
        most = house.settings.max_texts
        raise bad(f"input must hold at most {most} texts, got {len(wish.input)}: send several requests", "input")
    width = house.engine.gem.get_embedding_dim()
    if wish.dimensions is not None and wish.dimensions > width:
        raise bad(f"dimensions must lie in 1..{width}, got {wish.dimensions}", "dimensions")
    rows = await house.prompts.texts(wish.input)
    vectors_ND, tokens = await embed(request, rows)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    write = partial(_written, vectors_ND, wish, house.model, usage)
    return Response(await asyncio.to_thread(write), media_type="application/json")


async def embed(request: Request, rows: list[list[int]]) -> tuple[np.ndarray, int]:
    """Vectors [N, D] as the model gives them, and the tokens read for them; counted, logged, given up when nobody waits."""
    house = house_of(request)
    key, tokens = key_of(request), sum(map(len, rows))
    house.limits.require_tokens(key, tokens)
    with Asking() as asking:
        asking.start(partial(house.engine.embed, rows))
        house.limits.add_tokens(key, tokens)
        note(request, prompt_tokens=asking.prompt_tokens, texts=len(rows))

        async def vectors() -> np.ndarray:
            found = [event.vectors_ND async for _, event in asking.events() if isinstance(event, Vectors)]
            return found[0]

        return await while_there(request.receive, vectors(), house.settings.timeout), asking.prompt_tokens


def _written(vectors_ND: np.ndarray, wish: EmbeddingsRequest, model: str, usage: dict[str, int]) -> bytes:
    vectors_ND = normalize(vectors_ND[:, : wish.dimensions])
    listed: list[Any]
    if wish.encoding_format == "base64":
        listed = [base64.b64encode(v.astype("<f4").tobytes()).decode("ascii") for v in vectors_ND]
    else:
        listed = vectors_ND.tolist()
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(listed)]
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage}, separators=(",", ":")).encode()
