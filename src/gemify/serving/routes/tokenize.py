"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from gemify.serving.protocol import unsupported
from gemify.serving.protocol.requests import MAX_INT, ApiRequest, ChatMessage, CreateChatCompletionRequest
from gemify.serving.protocol.responses import DetokenizeResponse, TokenizeResponse
from gemify.serving.protocol.tools import Tool
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import admit

router = APIRouter(route_class=JsonRoute)


class TokenizeRequest(ApiRequest):
    """A prompt, or a conversation."""

    unsupported_fields = (unsupported.TOKENIZE,)

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=2048)
    add_special_tokens: bool | None = Field(default=None, description="What the tokenizer adds to a prompt.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _require_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give it, or messages")
        return self

    def as_chat(self) -> CreateChatCompletionRequest:
        """Return the conversation as a chat's request."""
        names = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
        return CreateChatCompletionRequest.model_construct(**{name: getattr(self, name) for name in names})


class DetokenizeRequest(ApiRequest):
    """Token ids."""

    tokens: list[Annotated[int, Field(ge=0, le=MAX_INT)]]


@router.post("/tokenize", response_model=None, responses={200: {"model": TokenizeResponse}}, tags=["tokens"])
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Return the token ids of a prompt, or of a conversation as a chat has it."""
    state = admit(request, body)
    if body.messages is not None:
        ids = await state.tokenizer.tokenize_chat(body.as_chat())
    else:
        add = body.add_special_tokens is not False
        (ids,) = map(tuple, await state.tokenizer.tokenize_prompts([body.prompt or ""], add_special_tokens=add))
    fields = {"token_strs": await state.tokenizer.token_strings(ids)} if body.return_token_strs else {}
    return TokenizeResponse(
        count=len(ids), max_model_len=state.engine.max_model_len, tokens=list(ids), **fields
    ).to_response()


@router.post("/detokenize", response_model=None, responses={200: {"model": DetokenizeResponse}}, tags=["tokens"])
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Return the text of token ids."""
    state = admit(request, body)
    return DetokenizeResponse(prompt=await state.tokenizer.detokenize(body.tokens)).to_response()
