"""LangChain's embeddings and chat model over one loaded GEM (``pip install 'gemify[langchain]'``).

Both may be used from many threads; the model serves one call at a time. LangChain's asynchronous methods run these in
its thread pool. Tools and structured output are not supported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

try:
    import langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "langchain-core is not installed: pip install 'gemify[langchain]'", name=error.name
    ) from error

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForLLMRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from gemify.integrations.shared_model import (
    GenerationSettings,
    SharedGem,
    SharedModelMixin,
    embed_texts,
    join_text_blocks,
    passage_metadata,
    search_index,
)
from gemify.model.streaming import TextStream, stream_chat
from gemify.model.tokenization import Truncate


class GemEmbeddings(SharedModelMixin, BaseModel, Embeddings):
    """LangChain's `Embeddings` with the vectors of `GemModel.encode_document` and `encode_query`.

    Attributes:
        gem: The model.
        batch_size: Most texts of a batch.
        normalize_embeddings: Scale vectors to length 1, for stores that compare by inner product.
        truncate_dim: Keep only the first dimensions. None: all.
        truncate: What becomes of a text that is too long: see `GemModel.encode`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    gem: SharedGem
    batch_size: int = 32
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    truncate: Truncate = "end"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed N documents: N vectors."""
        return embed_texts(self.gem, texts, **self._options)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query: one vector."""
        return embed_texts(self.gem, [text], query=True, **self._options)[0]

    @property
    def _options(self) -> dict[str, Any]:
        return self.model_dump(include={"batch_size", "normalize_embeddings", "truncate_dim", "truncate"})


class GemRetriever(SharedModelMixin, BaseRetriever):
    """LangChain's retriever over an index of `gemify index`: the passages of `GemIndex.search` as documents.

    Attributes:
        index: A `GemIndex`, or one that reranks.
        k: How many passages.
        mode: vector, fts or hybrid.
        filter: Only passages whose metadata fits, in SQL. Also for one call: ``invoke(query, filter="lang = 'de'")``.
    """

    index: SkipJsonSchema[Any] = Field(exclude=True, repr=False)
    k: int = 4
    mode: str = "hybrid"
    filter: str | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **given: Any
    ) -> list[Document]:
        options = {"k": self.k, "mode": self.mode, "filter": self.filter, **given}
        found = search_index(self.index, query, where=options.pop("filter"), **options)
        return [Document(p.text, id=p.id, metadata={**passage_metadata(p), "score": p.score}) for p in found]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **given: Any
    ) -> list[Document]:
        find = functools.partial(self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **given)
        return await run_in_executor(None, find)


class ChatGem(SharedModelMixin, GenerationSettings, BaseChatModel):
    """LangChain's chat model, in the base model's own chat format. A gated GEM answers exactly as its base model does.

    Every setting can be given for one call too (``chat.invoke(..., temperature=0)``, ``chat.bind(seed=1)``). Further
    options of a call are those of transformers' `generate`.
    """

    gem: SharedGem
    """The model."""

    @property
    def model_name(self) -> str:
        """The base model's name."""
        return self.gem.config.base

    @property
    def _llm_type(self) -> str:
        return "gemify"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What an answer depends on: LangChain's caches compare it."""
        settings = self.model_dump(include=set(GenerationSettings.model_fields))
        config = self.gem.config
        return {"model_name": self.model_name, "weights": config.base_fingerprint, "tune": config.tune, **settings}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(**{**super()._get_ls_params(stop=stop, **kwargs), "ls_provider": "gemify"})

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of a text: LangChain then counts in this model's tokens."""
        tokenize = self.gem.text_tokenizer
        ids: list[int] = tokenize.bos_ids + tokenize.tokenize_plain([text])[0]
        return ids

    def bind_tools(self, tools: Any, **options: Any) -> Any:
        """Raise NotImplementedError: as does ``with_structured_output``, which needs tools."""
        raise NotImplementedError(
            "ChatGem calls no tools: run `gemify serve`, and langchain-openai's ChatOpenAI(base_url=...) calls them and"
            " gives structured output"
        )

    def _start(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> TextStream:
        if stop is not None:
            options = {**options, "stop": stop}
        return stream_chat(self.gem, [_message(m) for m in messages], **self.stream_options(options))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        pieces = self._start(messages, stop, kwargs)
        answer = AIMessage(content="".join(pieces), usage_metadata=_usage(pieces))
        return ChatResult(generations=[ChatGeneration(message=answer, generation_info=self._info(pieces))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        pieces = self._start(messages, stop, kwargs)
        with contextlib.closing(pieces):
            for piece in pieces:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        last = AIMessageChunk(content="", usage_metadata=_usage(pieces), chunk_position="last")
        yield ChatGenerationChunk(message=last, generation_info=self._info(pieces))

    def _info(self, pieces: TextStream) -> dict[str, Any]:
        return {"finish_reason": pieces.finish_reason, "model_name": self.model_name}


def _usage(pieces: TextStream) -> UsageMetadata:
    read, written = pieces.prompt_tokens, pieces.new_tokens
    return UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written)


def _message(message: BaseMessage) -> dict[str, str]:
    match message:
        case SystemMessage():
            role = "system"
        case HumanMessage():
            role = "user"
        case AIMessage():
            role = "assistant"
        case ChatMessage():
            role = message.role
        case _:
            role = message.type
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message must be of the system, the user or the assistant, got {role!r}: leave it out")
    if isinstance(message, AIMessage) and message.tool_calls:
        raise ValueError("an assistant message calls tools, which this model cannot: leave the calls out")
    content = message.content
    return {"role": role, "content": content if isinstance(content, str) else join_text_blocks(content, role=role)}
