"""What clients get, for the OpenAPI description; the routes write the same as plain JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: ErrorFacts


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    """Had run before, for a request with the same beginning."""


class CompletionUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class CreateEmbeddingResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: CompletionUsage


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Passage(BaseModel):
    """A passage of the index."""

    id: str
    score: float
    text: str
    file: str
    place: str
    title: str
    heading: str


class GemifyFacts(BaseModel):
    """What `gemify` in the request asked for."""

    object: Literal["gemify"]
    embedding: list[float] | None = None
    sources: list[Passage] | None = None


class CreateChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    gemify: GemifyFacts | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class CreateCompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ListModelsResponse(BaseModel):
    object: Literal["list"]
    data: list[Model]


class SearchResponse(BaseModel):
    object: Literal["list"]
    data: list[Passage]
    model: str
    usage: CompletionUsage


class RecoverResponse(BaseModel):
    """A text, and what its special tokens remember of it."""

    object: Literal["recovery"]
    model: str
    input: str
    output: str
    input_tokens: int
    output_tokens: int
    matching_tokens: int
    """So many tokens of the input come in the output too, in the same order."""
    usage: CompletionUsage


class HealthResponse(BaseModel):
    status: Literal["ok", "ready", "starting", "stopping", "failed"]
