"""POST /v1/embeddings, /v1/search and /v1/recover.

A search's question is embedded by the engine beside all other work. Recovery shows what an embedding's KV remembers of
its text (GEM, Appendix B).
"""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.engine.requests import EmbeddingOutput, PromptLogprobs
from gemify.io.tables import first_line
from gemify.io.vectors import normalize
from gemify.model.encode import mean_of_parts
from gemify.model.prefill import common_subsequence_length
from gemify.model.tokenization import Truncate
from gemify.retrieval.lance import StoreUnavailableError
from gemify.retrieval.metadata import FilterError
from gemify.retrieval.rerank import CANDIDATES, sort_passages, text_with_context
from gemify.serving.dispatch import EngineClient, run_until_disconnect
from gemify.serving.embedding import embed
from gemify.serving.errors import bad_request, from_engine_error
from gemify.serving.protocol.requests import CreateEmbeddingRequest, RecoverRequest, SearchRequest
from gemify.serving.protocol.responses import (
    CompletionUsage,
    CreateEmbeddingResponse,
    Embedding,
    Passage,
    RecoverResponse,
    SearchResponse,
)
from gemify.serving.request_body import JsonRoute
from gemify.serving.rerank import score
from gemify.serving.response_builder import ChoiceState, build_usage
from gemify.serving.state import add_log_fields, admit, get_key_name, get_state
from gemify.serving.tokenization import TextOptions

router = APIRouter(route_class=JsonRoute)


def quantize(vectors_ND: np.ndarray, encoding: str) -> np.ndarray:
    """Return vectors as numbers of an encoding: as they are, in 8 bits each, or their signs, 8 in a number.

    Args:
        vectors_ND: the vectors.
        encoding: float; int8, the largest number of a vector at 127; uint8, 128 more; binary or ubinary, the bits of
            the signs as sentence-transformers packs them.
    """
    if encoding in ("int8", "uint8"):
        largest_N1 = np.abs(vectors_ND).max(axis=1, keepdims=True)
        scaled_ND = np.round(vectors_ND / np.where(largest_N1 == 0, 1, largest_N1) * 127).astype(np.int16)
        return scaled_ND + 128 * (encoding == "uint8")
    if encoding in ("binary", "ubinary"):
        packed_ND: np.ndarray = np.packbits(vectors_ND > 0, axis=1).astype(np.int16)
        return packed_ND - 128 * (encoding == "binary")
    return vectors_ND


@router.post(
    "/v1/embeddings", response_model=None, responses={200: {"model": CreateEmbeddingResponse}}, tags=["OpenAI"]
)
async def create_embeddings(body: CreateEmbeddingRequest, request: Request) -> Response:
    """Embed texts, or the token ids of texts (special tokens not among them). Vectors have length 1."""
    state = admit(request, body)
    limit = state.settings.max_texts
    if len(body.input) > limit:
        raise bad_request(
            f"input must hold at most {limit} texts, got {len(body.input)}: send several requests", "input"
        )
    width = state.engine.gem.get_embedding_dim()
    if body.dimensions is not None and body.dimensions > width:
        raise bad_request(f"dimensions must lie in 1..{width}, got {body.dimensions}", "dimensions")
    texts = await state.tokenizer.tokenize_texts(body.input, _text_options(body, request))
    vectors_PD, num_tokens = await embed(request, texts.rows)
    vectors_ND = mean_of_parts(torch.from_numpy(vectors_PD), texts.parts, overhead=texts.overhead).numpy()
    response = await asyncio.to_thread(_build_response, vectors_ND, body, state.model, num_tokens)
    if texts.truncated:
        add_log_fields(request, truncated=texts.truncated)
        response.headers["X-Gemify-Truncated"] = str(texts.truncated)
    return response


def _text_options(body: CreateEmbeddingRequest, request: Request) -> TextOptions:
    """Return what a request asks of its texts."""
    state = get_state(request)
    truncate: Truncate = body.truncate or state.settings.truncate
    if body.truncation_direction is not None:
        truncate = "start" if body.truncation_direction.lower() == "left" else "end"
    if body.truncate_prompt_tokens is not None:
        truncate = "start"
    most = body.truncate_prompt_tokens if (body.truncate_prompt_tokens or -1) > 0 else None
    return TextOptions(truncate, most, state.tokenizer.prompt_of(body.prompt_name, body.input_type))


def _build_response(vectors_ND: np.ndarray, body: CreateEmbeddingRequest, model: str, num_tokens: int) -> Response:
    vectors_ND = vectors_ND[:, : body.dimensions]
    if body.normalize is not False:
        vectors_ND = normalize(vectors_ND)
    listed: list[Any]
    if body.encoding_format == "base64":
        listed = [base64.b64encode(v.astype("<f4").tobytes()).decode("ascii") for v in vectors_ND]
    else:
        listed = quantize(vectors_ND, body.encoding_format or "float").tolist()
    return CreateEmbeddingResponse(
        object="list",
        data=[Embedding(object="embedding", index=i, embedding=v) for i, v in enumerate(listed)],
        model=model,
        usage=CompletionUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    ).to_response()


@router.post("/v1/search", response_model=None, responses={200: {"model": SearchResponse}}, tags=["gemify"])
async def search(body: SearchRequest, request: Request) -> Response:
    """Find the passages that fit a question best, best first."""
    state = admit(request, body)
    index = state.require_store(body.store).index
    if not body.query.strip():
        raise bad_request("the query is empty: give some words", "query")
    vector, tokens = None, 0
    if body.mode != "fts":
        options = TextOptions(body.truncate or "end", prompt=state.tokenizer.prompt_of(None, "query"))
        texts = await state.tokenizer.tokenize_texts([body.query], options)
        vectors_PD, tokens = await embed(request, texts.rows)
        vector = mean_of_parts(torch.from_numpy(vectors_PD), texts.parts, overhead=texts.overhead)[0].numpy()
    try:
        k = body.k if body.rerank == "none" else max(body.k, CANDIDATES)
        found = await asyncio.to_thread(
            partial(index.search, body.query, k=k, mode=body.mode, vector=vector, where=body.filter)
        )
    except StoreUnavailableError as error:
        raise from_engine_error(error) from error
    except ValueError as error:
        raise bad_request(first_line(error), "filter" if isinstance(error, FilterError) else "query") from error
    if body.rerank != "none":
        scores, scored_tokens = await score(request, body.query, list(map(text_with_context, found)), body.rerank)
        found, tokens = sort_passages(found, scores, body.k), tokens + scored_tokens
    return SearchResponse(
        object="list",
        data=[Passage(**passage.to_json()) for passage in found],
        model=state.model,
        usage=CompletionUsage(prompt_tokens=tokens, total_tokens=tokens),
    ).to_response()


@router.post("/v1/recover", response_model=None, responses={200: {"model": RecoverResponse}}, tags=["gemify"])
async def recover(body: RecoverRequest, request: Request) -> Response:
    """Generate a text from its special tokens alone."""
    state = admit(request, body)
    ids = (await state.tokenizer.tokenize_texts([body.input])).rows[0]
    state.rate_limiter.check_tokens(get_key_name(request), len(ids))
    choice = ChoiceState()
    with EngineClient() as client:
        client.submit(partial(state.engine.recover, ids, max_tokens=body.max_tokens))
        state.rate_limiter.add_tokens(get_key_name(request), len(ids))

        async def collect() -> None:
            async for _, event in client.events():
                if not isinstance(event, EmbeddingOutput | PromptLogprobs):
                    choice.add(event)

        try:
            await run_until_disconnect(request.receive, collect(), state.settings.timeout)
        finally:
            state.rate_limiter.add_tokens(get_key_name(request), choice.completion_tokens)
            add_log_fields(request, prompt_tokens=len(ids), completion_tokens=choice.completion_tokens)
    input_ids = await state.tokenizer.tokenize_plain(body.input)
    output_ids = await state.tokenizer.tokenize_plain(choice.text)
    return RecoverResponse(
        object="recovery",
        model=state.model,
        input=body.input,
        output=choice.text,
        input_tokens=len(input_ids),
        output_tokens=len(output_ids),
        matching_tokens=await state.tokenizer.run_in_thread(common_subsequence_length, input_ids, output_ids),
        usage=build_usage(len(ids), 0, choice.completion_tokens),
    ).to_response()
