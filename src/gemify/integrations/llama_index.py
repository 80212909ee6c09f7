"""LlamaIndex's embedding and language model over one loaded GEM (``pip install 'gemify[llama-index]'``).

Both may be used from many threads; the model serves one call at a time. LlamaIndex counts tokens with
``Settings.tokenizer``: set it to ``gem.tokenizer.encode``, so that a prompt it fills fits this model.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "llama-index-core is not installed: pip install 'gemify[llama-index]'", name=error.name
    ) from error

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from gemify.integrations.shared_model import SharedGem, SharesModel, embed, joined_text, sampling
from gemify.model.base import max_positions
from gemify.model.streaming import TextStream, stream, stream_chat

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


class GemEmbedding(SharesModel, BaseEmbedding):
    """Texts to vectors: `GemModel.encode_document` and `encode_query`, to the bit.

    ``embed_batch_size`` texts come in one call. ``normalize_embeddings`` gives vectors of length 1, for stores that
    compare by inner product.
    """

    gem: SharedGem
    embed_batch_size: int = 32
    normalize_embeddings: bool = False
    truncate_dim: int | None = None

    def __init__(self, **settings: Any) -> None:
        if "gem" in settings:
            settings.setdefault("model_name", settings["gem"].config.base)
        super().__init__(**settings)

    @classmethod
    def class_name(cls) -> str:
        return "GemEmbedding"

    def _embed(self, texts: Sequence[str], *, query: bool = False) -> list[list[float]]:
        options = self.model_dump(include={"normalize_embeddings", "truncate_dim"})
        options.pop("class_name")
        return embed(self.gem, texts, query=query, batch_size=self.embed_batch_size, **options)

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


class GemLLM(SharesModel, CustomLLM):
    """The language model. `complete` continues a plain prompt; `chat` answers in the base model's own chat format.

    A gated GEM writes exactly as its base model does. Every setting can be given for one call too; further options of a
    call are those of transformers' `generate`. A base without chat template gets a plain transcript to continue.
    """

    gem: SharedGem
    temperature: float | None = None
    """0: always the likeliest token. None: as the base model's generation settings say."""
    top_p: float | None = None
    max_tokens: int = 256
    """Most tokens of an answer."""
    stop: list[str] | None = None
    """An answer ends before the first of these strings."""
    seed: int | None = None

    @classmethod
    def class_name(cls) -> str:
        return "GemLLM"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=max_positions(self.gem.lm) or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=bool(self.gem.tokenizer.chat_template),
            model_name=self.gem.config.base,
        )

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        names = ("temperature", "top_p", "max_tokens", "stop", "seed")
        given = {name: options.pop(name, getattr(self, name)) for name in names}
        return {
            "max_new_tokens": given["max_tokens"],
            "stop": given["stop"],
            "seed": given["seed"],
            **sampling(given["temperature"], given["top_p"]),
            **options,
        }

    def _continue(self, prompt: str, formatted: bool, options: dict[str, Any]) -> TextStream:
        assert self.completion_to_prompt is not None
        return stream(self.gem, prompt if formatted else self.completion_to_prompt(prompt), **self._options(options))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        pieces = self._continue(prompt, formatted, kwargs)
        return CompletionResponse(text="".join(pieces), **_counts(pieces))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        pieces = self._continue(prompt, formatted, kwargs)

        def responses() -> CompletionResponseGen:
            text = ""
            with contextlib.closing(pieces):
                for piece in pieces:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
            yield CompletionResponse(text=text, delta="", **_counts(pieces))

        return responses()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        pieces = self._answer(messages, kwargs)
        return ChatResponse(message=_said("".join(pieces)), **_counts(pieces))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        pieces = self._answer(messages, kwargs)

        def responses() -> ChatResponseGen:
            text = ""
            with contextlib.closing(pieces):
                for piece in pieces:
                    text += piece
                    yield ChatResponse(message=_said(text), delta=piece)
            yield ChatResponse(message=_said(text), delta="", **_counts(pieces))

        return responses()

    def _answer(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> TextStream:
        plain = [_message(m) for m in messages]
        if not self.metadata.is_chat_model:
            assert self.messages_to_prompt is not None
            return self._continue(self.messages_to_prompt(messages), True, options)
        return stream_chat(self.gem, plain, **self._options(options))


def _said(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _counts(pieces: TextStream) -> dict[str, Any]:
    """Where LlamaIndex's token counter looks for them."""
    read, written = pieces.prompt_tokens, pieces.new_tokens
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"raw": {"finish_reason": pieces.finish_reason, "usage": usage}, "additional_kwargs": usage}


def _message(message: ChatMessage) -> dict[str, str]:
    if message.role not in _ROLES:
        raise ValueError(
            f"a message must be of the system, the user or the assistant, got {message.role.value!r}: leave it out"
        )
    role = _ROLES[message.role]
    return {"role": role, "content": joined_text(message.blocks, role=role)}
