"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.serving.completion import CompletionHandler, ResponseBuilder
from gemify.serving.errors import bad_request
from gemify.serving.protocol.requests import CreateChatCompletionRequest
from gemify.serving.protocol.responses import CreateChatCompletionResponse
from gemify.serving.request_body import JsonRoute
from gemify.serving.routes.search import search_index
from gemify.serving.state import get_state

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": CreateChatCompletionResponse, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_chat_completion(body: CreateChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation; with ``stream`` in server-sent events. ``gemify`` asks for the prompt's embedding from the
    same run, or for passages of the index to answer from."""
    state = get_state(request)
    state.require_model(body.model)
    own = body.gemify
    facts: dict[str, Any] = {}
    passages = None
    if own is not None and own.search is not None:
        state.require_index()
        if body.messages[-1].role != "user" or not body.messages[-1].content.strip():
            raise bad_request(
                "gemify.search looks for the last message, which must be the user's and not empty", "messages"
            )
        passages = await search_index(request, body.messages[-1].content, k=own.search.k, mode=own.search.mode)
        facts["sources"] = [p.to_json() for p in passages.passages]
    ids = await state.tokenizer.tokenize_chat(body.messages, passages.passages if passages else None)
    handler = CompletionHandler(
        request,
        body,
        ResponseBuilder("chat", state.model, logprobs=bool(body.logprobs)),
        [ids],
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        return_embedding=own is not None and own.return_embedding,
        facts=facts,
    )
    return await handler.respond()
