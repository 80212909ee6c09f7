"""LlamaIndex's embedding and language model over one loaded GEM (``pip install 'gemify[llama-index]'``).

Both may be used from many threads; the model serves one call at a time. LlamaIndex counts tokens with
``Settings.tokenizer``: set it to ``gem.tokenizer.encode``, so that a prompt it fills fits this model.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "llama-index-core is not installed: pip install 'gemify[llama-index]'", name=error.name
    ) from error

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

from gemify.integrations.shared_model import (
    GenerationSettings,
    SharedGem,
    SharedModelMixin,
    embed_texts,
    join_text_blocks,
    passage_metadata,
    search_index,
)
from gemify.model.base import max_positions
from gemify.model.streaming import TextStream, stream, stream_chat
from gemify.model.tokenization import Truncate

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


class GemEmbedding(SharedModelMixin, BaseEmbedding):
    """LlamaIndex's embedding model with the vectors of `GemModel.encode_document` and `encode_query`.

    Attributes:
        gem: The model.
        embed_batch_size: Texts of one call.
        normalize_embeddings: Scale vectors to length 1, for stores that compare by inner product.
        truncate_dim: Keep only the first dimensions. None: all.
        truncate: What becomes of a text that is too long: see `GemModel.encode`.
    """

    gem: SharedGem
    embed_batch_size: int = 32
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    truncate: Truncate = "end"

    def __init__(self, **settings: Any) -> None:
        if "gem" in settings:
            settings.setdefault("model_name", settings["gem"].config.base)
        super().__init__(**settings)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of this class."""
        return "GemEmbedding"

    def _embed(self, texts: Sequence[str], *, query: bool = False) -> list[list[float]]:
        options = self.model_dump(include={"normalize_embeddings", "truncate_dim", "truncate"})
        options.pop("class_name")
        return embed_texts(self.gem, texts, query=query, batch_size=self.embed_batch_size, **options)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query], query=True)[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class GemRetriever(BaseRetriever):
    """LlamaIndex's retriever over an index of `gemify index`: the passages of `GemIndex.search` as nodes.

    Args:
        index: A `GemIndex`, or one that reranks.
        similarity_top_k: How many passages.
        mode: vector, fts or hybrid.
        filters: Only passages whose metadata fits: LlamaIndex's filters, or an expression in SQL.
        options: Those of LlamaIndex's `BaseRetriever`.
    """

    def __init__(
        self,
        index: Any,
        *,
        similarity_top_k: int = 4,
        mode: str = "hybrid",
        filters: MetadataFilters | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._index, self._k, self._mode = index, similarity_top_k, mode
        self._where = to_sql(filters) if isinstance(filters, MetadataFilters) else filters

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = search_index(self._index, query_bundle.query_str, k=self._k, mode=self._mode, where=self._where)
        return [
            NodeWithScore(node=TextNode(id_=p.id, text=p.text, metadata=passage_metadata(p)), score=p.score)
            for p in found
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


_LISTS = {FilterOperator.ANY: "array_has_any", FilterOperator.ALL: "array_has_all"}


def to_sql(filters: MetadataFilters) -> str | None:
    """Return LlamaIndex's filters as an expression in SQL, None if there are none.

    Raises:
        ValueError: A key is no name of a column.
    """
    parts = [f"({to_sql(f)})" if isinstance(f, MetadataFilters) else _comparison(f) for f in filters.filters]
    condition = filters.condition.value if filters.condition else "and"
    if condition == "not":
        return f"not ({' or '.join(parts)})" if parts else None
    return f" {condition} ".join(parts) or None


def _comparison(given: MetadataFilter) -> str:
    key, operator, value = given.key, given.operator, given.value
    if not key.isidentifier():
        raise ValueError(f"a filter's key must be the name of a column, got {key!r}")
    listed = ", ".join(_literal(key, item) for item in (value if isinstance(value, list) else [value]))
    match operator:
        case FilterOperator.IS_EMPTY:
            return f"{key} is null"
        case FilterOperator.IN | FilterOperator.NIN:
            listed = (
                ", ".join(_literal(key, item) for item in value) if isinstance(value, list) else _literal(key, value)
            )
            return f"{key} {'in' if operator is FilterOperator.IN else 'not in'} ({listed})"
        case FilterOperator.ANY | FilterOperator.ALL:
            listed = (
                ", ".join(_literal(key, item) for item in value) if isinstance(value, list) else _literal(key, value)
            )
            return f"{_LISTS[operator]}({key}, [{listed}])"
        case FilterOperator.CONTAINS:
            return f"array_has({key}, {_literal(key, value)})"
        case FilterOperator.TEXT_MATCH:
            return f"contains({key}, {_literal(key, value)})"
        case FilterOperator.TEXT_MATCH_INSENSITIVE:
            return f"contains(lower({key}), {_literal(key, str(value).lower())})"
    sign = {"==": "=", "!=": "<>"}.get(operator.value, operator.value)
    return f"{key} {sign} {_literal(key, value)}"


def _literal(key: str, value: Any) -> str:
    if isinstance(value, bool | int | float):
        return str(value)
    quoted = "'" + str(value).replace("'", "''") + "'"
    return f"date {quoted}" if key == "date" else quoted


class GemLLM(SharedModelMixin, GenerationSettings, CustomLLM):
    """LlamaIndex's language model. `complete` continues a prompt; `chat` answers in the base model's own chat format.

    A gated GEM writes exactly as its base model does. Every setting can be given for one call too; further options of a
    call are those of transformers' `generate`. A base without a chat template gets a plain transcript to continue.
    """

    gem: SharedGem
    """The model."""

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of this class."""
        return "GemLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex asks of a model: context window, longest answer, whether it chats."""
        return LLMMetadata(
            context_window=max_positions(self.gem.lm) or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=bool(self.gem.tokenizer.chat_template),
            model_name=self.gem.config.base,
        )

    def _continue(self, prompt: str, formatted: bool, options: dict[str, Any]) -> TextStream:
        assert self.completion_to_prompt is not None
        return stream(
            self.gem, prompt if formatted else self.completion_to_prompt(prompt), **self.stream_options(options)
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt."""
        pieces = self._continue(prompt, formatted, kwargs)
        return CompletionResponse(text="".join(pieces), **_usage(pieces))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Continue a prompt in pieces."""
        pieces = self._continue(prompt, formatted, kwargs)

        def responses() -> CompletionResponseGen:
            text = ""
            with contextlib.closing(pieces):
                for piece in pieces:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
            yield CompletionResponse(text=text, delta="", **_usage(pieces))

        return responses()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        pieces = self._answer(messages, kwargs)
        return ChatResponse(message=_assistant_message("".join(pieces)), **_usage(pieces))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation in pieces."""
        pieces = self._answer(messages, kwargs)

        def responses() -> ChatResponseGen:
            text = ""
            with contextlib.closing(pieces):
                for piece in pieces:
                    text += piece
                    yield ChatResponse(message=_assistant_message(text), delta=piece)
            yield ChatResponse(message=_assistant_message(text), delta="", **_usage(pieces))

        return responses()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt, in a thread: the event loop stays free."""
        pieces = self._continue(prompt, formatted, kwargs)
        text = await asyncio.to_thread("".join, pieces)
        return CompletionResponse(text=text, **_usage(pieces))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Continue a prompt in pieces; the event loop stays free."""
        pieces = self._continue(prompt, formatted, kwargs)

        async def responses() -> CompletionResponseAsyncGen:
            text = ""
            async for piece in _in_thread(pieces):
                text += piece
                yield CompletionResponse(text=text, delta=piece)
            yield CompletionResponse(text=text, delta="", **_usage(pieces))

        return responses()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation, in a thread: the event loop stays free."""
        pieces = await asyncio.to_thread(self._answer, messages, kwargs)
        text = await asyncio.to_thread("".join, pieces)
        return ChatResponse(message=_assistant_message(text), **_usage(pieces))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation in pieces; the event loop stays free."""
        pieces = await asyncio.to_thread(self._answer, messages, kwargs)

        async def responses() -> ChatResponseAsyncGen:
            text = ""
            async for piece in _in_thread(pieces):
                text += piece
                yield ChatResponse(message=_assistant_message(text), delta=piece)
            yield ChatResponse(message=_assistant_message(text), delta="", **_usage(pieces))

        return responses()

    def _answer(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> TextStream:
        plain = [_message(m) for m in messages]
        if not self.metadata.is_chat_model:
            assert self.messages_to_prompt is not None
            return self._continue(self.messages_to_prompt(messages), True, options)
        return stream_chat(self.gem, plain, **self.stream_options(options))


async def _in_thread(pieces: TextStream) -> AsyncGenerator[str, None]:
    """The pieces of a stream, each awaited in a thread. The stream is closed when no more are wanted."""
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        pieces.close()


def _assistant_message(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _usage(pieces: TextStream) -> dict[str, Any]:
    """Token counts, where LlamaIndex's counter looks for them."""
    read, written = pieces.prompt_tokens, pieces.new_tokens
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"raw": {"finish_reason": pieces.finish_reason, "usage": usage}, "additional_kwargs": usage}


def _message(message: ChatMessage) -> dict[str, str]:
    if message.role not in _ROLES:
        raise ValueError(
            f"a message must be of the system, the user or the assistant, got {message.role.value!r}: leave it out"
        )
    role = _ROLES[message.role]
    return {"role": role, "content": join_text_blocks(message.blocks, role=role)}
