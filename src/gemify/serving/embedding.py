"""Embeddings for one HTTP request, from the engine's batches."""

from __future__ import annotations

from functools import partial

import numpy as np
from fastapi import Request

from gemify.engine.requests import EmbeddingOutput
from gemify.serving.dispatch import EngineClient, run_until_disconnect
from gemify.serving.state import add_log_fields, get_key_name, get_state


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
