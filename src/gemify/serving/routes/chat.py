"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.serving.completion import Form, Replies
from gemify.serving.errors import bad
from gemify.serving.protocol.requests import ChatRequest
from gemify.serving.protocol.responses import Chat
from gemify.serving.request_body import JsonRoute
from gemify.serving.routes.search import find
from gemify.serving.state import house_of

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": Chat, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_chat_completion(wish: ChatRequest, request: Request) -> Response:
    """Answer a conversation; with ``stream`` in server-sent events. ``gemify`` asks for the prompt's embedding from the
    same run, or for passages of the index to answer from."""
    house = house_of(request)
    house.require_model(wish.model)
    own = wish.gemify
    facts: dict[str, Any] = {}
    passages = None
    if own is not None and own.search is not None:
        house.require_index()
        if wish.messages[-1].role != "user" or not wish.messages[-1].content.strip():
            raise bad("gemify.search looks for the last message, which must be the user's and not empty", "messages")
        passages = await find(request, wish.messages[-1].content, k=own.search.k, mode=own.search.mode)
        facts["sources"] = [p.to_json() for p in passages.found]
    ids = await house.prompts.chat(wish.messages, passages.found if passages else None)
    replies = Replies(
        request,
        wish,
        Form("chat", house.model, logprobs=bool(wish.logprobs)),
        [ids],
        top_logprobs=(wish.top_logprobs or 0) if wish.logprobs else None,
        return_embedding=own is not None and own.return_embedding,
        facts=facts,
    )
    return await replies.respond()
