"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.serving.completion import Form, Replies
from gemify.serving.errors import bad
from gemify.serving.protocol.requests import CompletionsRequest
from gemify.serving.protocol.responses import Completions
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import house_of

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completions, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_completion(wish: CompletionsRequest, request: Request) -> Response:
    """Continue prompts as they are, several at a time if asked; with ``stream`` in server-sent events."""
    house = house_of(request)
    house.require_model(wish.model)
    most = house.settings.max_prompts
    if len(wish.prompt) > most:
        raise bad(f"prompt must hold at most {most} prompts, got {len(wish.prompt)}: send several requests", "prompt")
    rows = await house.prompts.prompts(wish.prompt)
    form = Form("completion", house.model, logprobs=wish.logprobs is not None)
    return await Replies(request, wish, form, rows, top_logprobs=wish.logprobs).respond()
