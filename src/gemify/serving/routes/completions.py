"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.serving.completion import CompletionHandler
from gemify.serving.errors import bad_request
from gemify.serving.protocol.requests import CreateCompletionRequest
from gemify.serving.protocol.responses import CreateCompletionResponse
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import get_state

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": CreateCompletionResponse, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_completion(body: CreateCompletionRequest, request: Request) -> Response:
    """Continue prompts as they are, several at a time if asked; with ``stream`` in server-sent events."""
    state = get_state(request)
    state.require_model(body.model)
    limit = state.settings.max_prompts
    if len(body.prompt) > limit:
        raise bad_request(
            f"prompt must hold at most {limit} prompts, got {len(body.prompt)}: send several requests", "prompt"
        )
    rows = await state.tokenizer.tokenize_prompts(body.prompt)
    return await CompletionHandler(request, body, "completion", rows, top_logprobs=body.logprobs).respond()
