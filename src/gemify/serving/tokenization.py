"""Texts and conversations as token ids: in threads of their own, with tokenizers of their own.

The model's own tokenizer is the engine's, which spells answers with it. So requests are read with copies, one for each
thread, and never wait for a step of the model.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from gemify.io.errors import first_line
from gemify.model.base import max_positions
from gemify.model.chat_template import ChatTemplate
from gemify.model.encode import TextTokenizer
from gemify.model.gem import GemModel
from gemify.serving.errors import bad_request

if TYPE_CHECKING:
    from gemify.serving.protocol.requests import ChatMessage, Input

T = TypeVar("T")
_THREADS = 2
_AT_A_TIME = 1 << 16  # characters, after which another request has its turn


@dataclass(frozen=True)
class _Tools:
    """What one thread reads with."""

    tokenizer: Any
    texts: TextTokenizer
    chat: ChatTemplate | None


class RequestTokenizer:
    """Reads what requests say. Give it back with `close`."""

    def __init__(self, gem: GemModel) -> None:
        self._copies: SimpleQueue[_Tools] = SimpleQueue()
        for _ in range(_THREADS):
            tokenizer = copy.deepcopy(gem.tokenizer)
            chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
            self._copies.put(_Tools(tokenizer, replace(gem.text_tokenizer, tokenizer=tokenizer), chat))
        self._table = int(gem.lm.get_input_embeddings().weight.shape[0])
        self._room, self._columns = gem.max_seq_length, gem.config.max_text_tokens
        self._limit: int | None = max_positions(gem.lm)
        self._longest = max(map(len, gem.tokenizer.get_vocab()))  # characters of a token
        self._tools = threading.local()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="gemify-prompts")
        self.has_chat = bool(gem.tokenizer.chat_template)
        prompts = gem.config.prompts
        self._before = prompts.get(gem.config.default_prompt_name or "", "")
        self._before_query = prompts.get("query", self._before)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run_in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Run something short in a reading thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def tokenize_texts(self, given: Input) -> list[list[int]]:
        """Ids of texts to embed: in them, every control token's name that is a special token's is text."""
        rows: list[list[int]] = []
        some: list[str] = []
        size = 0
        for item in given:
            if isinstance(item, list):
                rows.append(item)
                continue
            self._require_room(item, self._room)
            some.append(self._before + item)
            size += len(item)
            if size > _AT_A_TIME:
                rows += await self.run_in_thread(self._texts, some)
                some, size = [], 0
        return rows + (await self.run_in_thread(self._texts, some) if some else [])

    async def tokenize_query(self, text: str) -> list[int]:
        """Ids of a question to an index, cut at the end as the library does."""
        cut = text[: self._room * self._longest]
        return (await self.run_in_thread(self._texts, [self._before_query + cut], self._columns))[0]

    async def tokenize_prompts(self, given: Input) -> list[list[int]]:
        """Ids of prompts to continue, as the base's own tokenizer reads them."""
        for item in given:
            if isinstance(item, str):
                self._require_room(item, self._limit)
        return [item if isinstance(item, list) else await self.run_in_thread(self._prompt, item) for item in given]

    async def tokenize_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Ids of a conversation, up to where the answer starts."""
        self.require_chat(messages)
        return await self.run_in_thread(self._chat, messages)

    def require_chat(self, messages: Sequence[ChatMessage]) -> None:
        """Refuse a conversation where there is no chat template, or with a message that is too long."""
        if not self.has_chat:
            raise bad_request("this model has no chat template: use /v1/completions", code="no_chat_template")
        for message in messages:
            self._require_room(message.content, self._limit)

    async def tokenize_plain(self, text: str) -> list[int]:
        """Ids of a text, nothing before it."""
        return await self.run_in_thread(lambda: list(self._own().texts.tokenize_plain([text])[0]))

    def _require_room(self, text: str, tokens: int | None) -> None:
        """Refuse at once what cannot fit, instead of reading megabytes to find out."""
        if tokens is not None and len(text) > tokens * self._longest:
            raise bad_request(
                f"a text has {len(text):,} characters, more than the {tokens:,} tokens that this model takes can hold:"
                " cut it up"
            )

    # In a reading thread

    def _own(self) -> _Tools:
        tools: _Tools | None = getattr(self._tools, "own", None)
        if tools is None:
            tools = self._tools.own = self._copies.get_nowait()
        return tools

    def _texts(self, texts: list[str], max_tokens: int | None = None) -> list[list[int]]:
        return self._own().texts(texts, max_tokens=max_tokens)

    def _prompt(self, text: str) -> list[int]:
        return self._own().texts.tokenize_prompts([text], add_special_tokens=True, vocab_size=self._table)[0]

    def _chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        chat = self._own().chat
        assert chat is not None
        try:
            return chat.apply([chat.message(chat_role(m), m.content) for m in messages]).ids
        except ValueError as error:
            raise bad_request(first_line(error), "messages") from error


def chat_role(message: ChatMessage) -> str:
    """The role as chat templates name it: OpenAI's ``developer`` is ``system``."""
    return "system" if message.role == "developer" else message.role
