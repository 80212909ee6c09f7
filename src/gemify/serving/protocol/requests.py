"""What clients send: OpenAI's requests, and our own. Unsupported parameters are refused by name, not ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from gemify.model.tokenization import TRUNCATIONS
from gemify.retrieval.metadata import MAX_FILTER_CHARACTERS
from gemify.retrieval.rerank import Rerank
from gemify.serving.errors import json_name, unsupported_parameter
from gemify.serving.protocol import unsupported
from gemify.serving.protocol.structured_outputs import StructuredRequest
from gemify.serving.protocol.tools import MessageToolCall, ToolRequest
from gemify.serving.protocol.unsupported import refuse

_MAX_N = 16
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000  # each token's text is compared with all of their beginnings
_MAX_BIASES = 1024
MAX_INT = 2**63 - 1
_STRING: dict[str, Any] = {"type": "string"}
_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXTS: dict[str, Any] = {"type": "array", "minItems": 1, "items": _STRING}
_ROWS: dict[str, Any] = {"type": "array", "minItems": 1, "items": _IDS}
_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_LENGTH}
_TEXT_PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
}

Input = list[str] | list[list[int]]
"""Texts, or the token ids of texts."""


def texts_or_ids(value: Any) -> Input:
    """Return a string, strings, token ids or lists of them as a list. Looks once at each item; reports one error."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"must be a string, an array of strings, of token ids, or of arrays of token ids, and not empty, got"
            f" {'an empty array' if value == [] else json_name(value)}"
        )
    first = value[0]
    if isinstance(first, str):
        _require_all(value, lambda v: type(v) is str, "a string, as the first item is")
        return value
    if isinstance(first, list):
        for at, row in enumerate(value):
            if type(row) is not list or not row:
                raise ValueError(f"item {at} must be an array of token ids that is not empty")
            _require_all(row, _is_id, f"a token id (an integer of at least 0), in item {at}")
        return value
    _require_all(value, _is_id, "a string or a token id (an integer of at least 0)")
    return [value]


def _require_all(values: list[Any], fits: Callable[[Any], bool], what: str) -> None:
    for at, value in enumerate(values):
        if not fits(value):
            raise ValueError(f"item {at} must be {what}, got {json_name(value)}")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT


def _listed(value: Any) -> Any:
    """Return one or several stop strings as a tuple."""
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if (
        not isinstance(listed, list)
        or len(listed) > _MAX_STOPS
        or not all(isinstance(s, str) and 1 <= len(s) <= _MAX_STOP_LENGTH for s in listed)
    ):
        raise ValueError(
            f"must be a string or up to {_MAX_STOPS} strings of at least one character and at most"
            f" {_MAX_STOP_LENGTH} each"
        )
    return tuple(listed)


def _biases(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        raise ValueError(f"must be an object of at most {_MAX_BIASES} token ids and their biases")
    found: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 18):
            raise ValueError(f"must name token ids, got {name[:40]!r}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {name} must be a number in -100..100")
        found[int(name)] = float(bias)
    return found


def join_text_parts(value: Any, kinds: tuple[str, ...] = ("text",)) -> str:
    """Return a message's text: a string, or parts of these kinds, which are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or an array of text parts, got {json_name(value)}")
    texts: list[str] = []
    for at, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else json_name(part)
        if kind not in kinds:
            raise ValueError(f"part {at} has the type {str(kind)[:40]!r}: this model reads text only")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {at} has no text")
        texts.append(part["text"])
    return "".join(texts)


def _documents(value: Any) -> list[str]:
    """Return documents, strings or objects with a text, as strings."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be an array of texts that is not empty, got {json_name(value)}")
    texts: list[Any] = [item.get("text") if isinstance(item, dict) else item for item in value]
    _require_all(texts, lambda text: isinstance(text, str), "a string, or an object with a text")
    return texts


_WITH_TEXT: dict[str, Any] = {"type": "object", "properties": {"text": _STRING}, "required": ["text"]}
_DOCUMENTS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [_STRING, _WITH_TEXT]}}
Inputs = Annotated[Any, BeforeValidator(texts_or_ids), WithJsonSchema({"anyOf": [_STRING | {}, _TEXTS, _IDS, _ROWS]})]
Stops = Annotated[
    Any,
    BeforeValidator(_listed),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP,
                {"type": "array", "items": _STOP, "maxItems": _MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]
Biases = Annotated[
    Any,
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": _MAX_BIASES,
                    "propertyNames": {"pattern": "^[0-9]{1,18}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]
Content = Annotated[
    Any, BeforeValidator(join_text_parts), WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _TEXT_PART}]})
]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
SearchMode = Literal["vector", "fts", "hybrid"]
_STORE = "The store's name, as /v1/stores lists it. Default the first."
_RERANK = "How what is found is sorted anew. bi: vectors; lm: the model's odds of yes against no."
Filter = Annotated[str, Field(max_length=MAX_FILTER_CHARACTERS, description="Of metadata, in SQL: lang = 'de'.")]


class ApiRequest(BaseModel):
    """What all requests have. Types are strict (``"1"`` is not a number)."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    model: str | None = Field(default=None, description="As /v1/models names it; left out, the one there is.")
    user: str | None = Field(default=None, description="Taken and ignored.")

    unsupported_fields: ClassVar[tuple[unsupported.Fields, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        return refuse(given, *cls.unsupported_fields)

    @property
    def unknown_fields(self) -> list[str]:
        """Names of fields that mean nothing here."""
        known = unsupported.IGNORED.union(*self.unsupported_fields)
        return [name for name in self.model_extra or {} if name not in known]


def _truncate(value: Any) -> Any:
    """Return a policy by gemify's name, or as text-embeddings-inference (a boolean) and others (NONE, END) say it."""
    if isinstance(value, bool):
        return "end" if value else "error"
    if not isinstance(value, str) or (name := {"none": "error"}.get(value.lower(), value.lower())) not in TRUNCATIONS:
        raise ValueError(f"must be one of {', '.join(TRUNCATIONS)}, or true or false, got {str(value)[:40]!r}")
    return name


Truncation = Annotated[
    Any, BeforeValidator(_truncate), WithJsonSchema({"anyOf": [{"enum": list(TRUNCATIONS)}, {"type": "boolean"}]})
]


class CreateEmbeddingRequest(ApiRequest):
    """Texts to embed."""

    unsupported_fields = (unsupported.EMBEDDING,)

    input: Inputs = Field(description="A text, texts, token ids or lists of token ids.")
    encoding_format: Literal["float", "base64", "int8", "uint8", "binary", "ubinary"] | None = Field(
        default=None,
        description="base64: little-endian float32. int8: the largest number is 127. binary: the signs, 8 in a number.",
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=MAX_INT, description="Keep so many numbers of each vector, and scale it to length 1."
    )
    truncate: Truncation | None = Field(
        default=None,
        description="Of a text that is too long: error (the default), end or start (cut there), mean (of its parts).",
    )
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(
        default=None, description="With truncate true: left cuts at the start."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, le=MAX_INT, description="Keep a text's last so many tokens; -1: as many as fit."
    )
    normalize: bool | None = Field(default=None, description="False: vectors as the model gives them.")
    prompt_name: str | None = Field(default=None, max_length=100, description="A prompt of the model, by its name.")
    input_type: str | None = Field(
        default=None, max_length=100, description="query or document: the model's prompt of this name, if it has one."
    )

    @model_validator(mode="after")
    def _require_one_policy(self) -> Self:
        if self.truncate_prompt_tokens is not None and self.truncate not in (None, "start"):
            raise ValueError("truncate_prompt_tokens: cuts at the start, leave truncate out")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: must be -1 or at least 1")
        if self.truncation_direction is not None and self.truncate not in ("end", "start"):
            raise ValueError("truncation_direction: needs truncate true")
        if self.prompt_name is not None and self.input_type is not None:
            raise ValueError("prompt_name: give it or input_type, not both")
        return self


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = Field(default=None, description="A last chunk says how many tokens it was.")


class GenerationRequestBody(ApiRequest, StructuredRequest):
    """What chats and completions have in common."""

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT, description="Longest answer.")
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        default=None, description="0: greedy. Default 1."
    )
    top_p: Unit | None = Field(default=None, description="Nucleus sampling. Default 1.")
    seed: int | None = Field(default=None, ge=-MAX_INT - 1, le=MAX_INT, description="Same seed, same answer.")
    stop: Stops = Field(default=(), description="The answer ends before the first of these.")
    n: int | None = Field(default=None, ge=1, le=_MAX_N, description="How many answers.")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases = Field(default_factory=dict, description="Added to tokens' logits, by token id.")
    top_k: int | None = Field(
        default=None, ge=-1, le=MAX_INT, description="Draw from so many of the most likely tokens."
    )
    min_p: Unit | None = Field(default=None, description="Draw from tokens of this part of the largest probability.")
    typical_p: Annotated[float, Field(ge=1e-6, le=1.0)] | None = Field(default=None, description="Typical sampling.")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = Field(
        default=None, description="Above 1: tokens of the prompt and the answer are less likely to come again."
    )
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_INT, description="Shortest answer.")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_INT)]] | None = Field(
        default=None, max_length=_MAX_BIASES, description="Tokens that end the answer."
    )
    ignore_eos: bool | None = Field(default=None, description="The model's end tokens do not end the answer.")
    skip_special_tokens: bool | None = Field(default=None, description="Leave out control tokens. Default true.")
    stream: bool | None = Field(default=None, description="Server-sent events, the last of them [DONE].")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _require_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream true")
        return self


class CreateCompletionRequest(GenerationRequestBody):
    """Prompts to continue as they are, without a chat template."""

    unsupported_fields = (unsupported.GENERATION, unsupported.COMPLETION)

    prompt: Inputs = Field(description="A prompt, prompts, token ids or lists of token ids.")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Log probabilities of the tokens, and of so many others at their place."
    )
    best_of: int | None = Field(default=None, ge=1, le=_MAX_N, description="Only as many as n.")
    max_tokens: int | None = Field(
        default=None, ge=0, le=MAX_INT, description="Longest answer. 0, with echo: the prompt alone."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the answer, with its logprobs.")

    @model_validator(mode="after")
    def _require_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: must be at least 1 without echo, got 0")
        return self

    @model_validator(mode="after")
    def _require_best_of(self) -> Self:
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise unsupported_parameter("best_of", "ask for n answers and choose one")
        return self


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = Field(default=None, description="Taken and ignored.")
    tool_calls: list[MessageToolCall] | None = Field(default=None, max_length=128)
    tool_call_id: str | None = Field(default=None, max_length=256, description="Which call a tool's message answers.")
    reasoning_content: str | None = Field(default=None, description="Thoughts, for chat templates that read them.")

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") == "assistant" and given.get("content", 0) is None:
            given = given | {"content": ""}
        return refuse(given, unsupported.MESSAGE)

    @model_validator(mode="after")
    def _require_content(self) -> Self:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: the field is required")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only the assistant's messages have them")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it."""
        fields: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.reasoning_content:
            fields["reasoning_content"] = self.reasoning_content
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields


class ChatSearch(BaseModel):
    """Passages of a store, put into the prompt."""

    model_config = ConfigDict(strict=True, extra="forbid")

    store: str | None = Field(default=None, description=_STORE)
    k: int = Field(default=3, ge=1, le=50, description="How many passages.")
    mode: SearchMode = "hybrid"
    filter: Filter | None = None
    rerank: Rerank = Field(default="none", description=_RERANK)


class GemifyOptions(BaseModel):
    """What OpenAI's API does not have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    return_embedding: bool = Field(default=False, description="The prompt's vector, from the run that answers.")
    search: ChatSearch | None = Field(default=None, description="Answer the last message from the index.")


class CreateChatCompletionRequest(GenerationRequestBody, ToolRequest):
    """A conversation to answer."""

    unsupported_fields = (unsupported.GENERATION, unsupported.CHAT)

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_INT, description="Longest answer; beats max_tokens."
    )
    logprobs: bool | None = Field(default=None, description="Log probabilities of the tokens.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Of so many others at each place.")
    continue_final_message: bool | None = Field(
        default=None, description="The answer goes on from the last message, which should be the assistant's."
    )
    add_generation_prompt: bool | None = Field(default=None, description="False: no start of an answer. Default true.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables for the model's chat template, such as enable_thinking."
    )
    reasoning_effort: str | None = Field(default=None, max_length=100, description="Templates may not read it: 400.")
    gemify: GemifyOptions | None = None

    @model_validator(mode="after")
    def _require_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs true")
        return self

    @model_validator(mode="after")
    def _require_one_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: needs add_generation_prompt false")
        return self


class SearchRequest(ApiRequest):
    """A question to a store."""

    unsupported_fields = (unsupported.SEARCH,)

    store: str | None = Field(default=None, description=_STORE)
    query: str = Field(min_length=1, max_length=100_000)
    k: int = Field(default=5, ge=1, le=100)
    mode: SearchMode = Field(default="hybrid", description="vector: meaning; fts: words (BM25); hybrid: both.")
    filter: Filter | None = None
    rerank: Rerank = Field(default="none", description=_RERANK)
    truncate: Truncation | None = Field(default=None, description="Of a query that is too long. Default end.")


class RecoverRequest(ApiRequest):
    """A text to write back from its special tokens alone."""

    input: str = Field(min_length=1)
    max_tokens: int = Field(default=64, ge=1, le=1024)


class RerankRequest(ApiRequest):
    """A query and documents."""

    unsupported_fields = (unsupported.RERANK,)

    query: str = Field(min_length=1)
    documents: Annotated[Any, BeforeValidator(_documents), WithJsonSchema(_DOCUMENTS)]
    top_n: int | None = Field(default=None, ge=1, le=MAX_INT, description="How many of the best. Default all.")
    return_documents: bool | None = Field(default=None, description="Default true; in /v2/rerank false.")
    rerank: Literal["bi", "lm"] = Field(default="bi", description="bi: vectors; lm: the model's odds of yes.")
