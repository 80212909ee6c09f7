"""What clients get: OpenAI's responses, and our own.

Only fields that were set are written. An optional field that was set to None is ``null``; one that was left out is
absent.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

FinishReason = Literal["stop", "length", "tool_calls"]


class ApiModel(BaseModel):
    """An object of a response."""

    model_config = ConfigDict(frozen=True)

    @property
    def event(self) -> str | None:
        """The event's name in a stream. None: events have none."""
        return None

    def to_json(self) -> bytes:
        """Return the object's JSON, without the fields that were left out."""
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)  # model_dump_json costs twice as much

    def to_response(self, status: int = 200) -> Response:
        """Return an HTTP response of this object."""
        return Response(self.to_json(), status, media_type="application/json")


class ErrorDetails(ApiModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ApiModel):
    """Every error's form."""

    type: Literal["error"] | None = None
    """In Anthropic's form."""
    error: ErrorDetails


class StreamEvent(ApiModel):
    """An answer, or an event of a streamed one, that says its type."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str

    @classmethod
    def make(cls, type_: str, **fields: Any) -> Self:
        """Make one of further fields."""
        return cls(**{"type": type_, **fields})

    @property
    def event(self) -> str:
        """The event's name in a stream."""
        return self.type


class PromptTokensDetails(ApiModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int
    """From the prefix cache: they had run before, for a request with the same beginning."""


class CompletionTokensDetails(ApiModel):
    """What an answer's tokens were for."""

    reasoning_tokens: int


class CompletionUsage(ApiModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class Embedding(ApiModel):
    """One text's vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | list[int] | str


class CreateEmbeddingResponse(ApiModel):
    """Vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: CompletionUsage


class TopLogprob(ApiModel):
    """A token that was possible, and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ApiModel):
    """Log probabilities of a chat's answer."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(ApiModel):
    """Log probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None: the first token of a prompt has none."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(ApiModel):
    """A function, and the JSON of its arguments."""

    name: str
    arguments: str


class ChatToolCall(ApiModel):
    """A call in an answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(ChatToolCall):
    """A call in a chunk; each comes whole."""

    index: int


class AssistantMessage(ApiModel):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCall] | None = None


class ChoiceDelta(ApiModel):
    """What a chunk adds to the answer of a chat."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(ApiModel):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(ApiModel):
    """More of one answer of a chat."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(ApiModel):
    """One completion, or in a chunk more of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Passage(ApiModel):
    """A passage of the index."""

    id: str
    score: float
    text: str
    file: str
    place: str
    title: str
    heading: str
    meta: dict[str, Any] = {}
    """Date, kind, and what its file said; times in ISO form."""


class GemifyFields(ApiModel):
    """What `gemify` in the request asked for."""

    object: Literal["gemify"]
    sources: list[Passage] | None = None
    embedding: list[float] | None = None


class CreateChatCompletionResponse(ApiModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: CompletionUsage
    gemify: GemifyFields | None = None


class ChatCompletionChunk(ApiModel):
    """An event of a streamed answer to a conversation."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    gemify: GemifyFields | None = None


class CreateCompletionResponse(ApiModel):
    """Completions of prompts, or an event of streamed ones."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class MessageObject(ApiModel):
    """An answer in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    """Thoughts, a text, calls."""
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, Any]


class ResponseObject(ApiModel):
    """An answer in the form of /v1/responses."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "in_progress"]
    output: list[dict[str, Any]]
    """Thoughts, a message, calls."""
    store: Literal[False]


class Model(ApiModel):
    """The model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ListModelsResponse(ApiModel):
    """The models of this server: one."""

    object: Literal["list"]
    data: list[Model]


class SearchResponse(ApiModel):
    """Passages, best first."""

    object: Literal["list"]
    data: list[Passage]
    model: str
    usage: CompletionUsage


class PassagesResponse(ApiModel):
    """Passages in the order of their file, with score 0."""

    object: Literal["list"]
    data: list[Passage]


class StoreInfo(ApiModel):
    """A store of the server."""

    id: str
    """Its name."""
    status: Literal["ready", "unavailable"]
    num_passages: int | None
    """None: it cannot be read now, or does not say."""


class ListStoresResponse(ApiModel):
    """The stores, the default one first."""

    object: Literal["list"]
    data: list[StoreInfo]


class StoreFile(ApiModel):
    """A file that was put into a store."""

    id: str
    """Its name."""
    store: str
    bytes: int
    num_passages: int
    skipped: list[str]
    """What of it could not be read."""


class StoreMapResponse(ApiModel):
    """Passages of a store in two dimensions, by the principal components of their vectors."""

    object: Literal["store.map"]
    ids: list[str]
    points: list[list[float]]
    """The place of each, [x, y]."""
    files: list[str]
    """The one with the most passages first."""
    file_indices: list[int]
    """The number of each passage's file in ``files``."""
    num_passages: int
    """Of the store; at most 20,000 of them are in the map."""
    explained_variance: float
    """The share of the vectors' variance that the two dimensions have."""


class RecoverResponse(ApiModel):
    """A text, and what its special tokens remember of it."""

    object: Literal["recovery"]
    model: str
    input: str
    output: str
    input_tokens: int
    output_tokens: int
    matching_tokens: int
    """Tokens of the input that are also in the output, in the same order."""
    usage: CompletionUsage


class HealthResponse(ApiModel):
    """The server's condition."""

    status: Literal["ok", "ready", "starting", "stopping", "failed"]


class RerankResult(ApiModel):
    """A document, and the cosine of its vector and the query's; by ``lm``, the probability of yes against no."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankResponse(ApiModel):
    """Documents, the best first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: CompletionUsage


class TokenizeResponse(ApiModel):
    """Token ids of a prompt."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class CountTokensResponse(ApiModel):
    """How many tokens a prompt has, in Anthropic's form."""

    input_tokens: int


class DetokenizeResponse(ApiModel):
    """The text of token ids."""

    prompt: str
