"""Tokenization of requests, in threads of its own, with tokenizers of its own.

The engine turns tokens into text with the model's own tokenizer. Requests are tokenized with copies, one for each
thread, and never wait for a step of the model.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from gemify.io.tables import first_line
from gemify.model.base import max_positions
from gemify.model.chat_template import ChatTemplate
from gemify.model.gem import GemModel
from gemify.model.tokenization import TextTokenizer, Truncate, truncate_row
from gemify.serving.answer_format import AnswerFormat
from gemify.serving.errors import bad_request, unsupported_parameter

if TYPE_CHECKING:
    from gemify.serving.protocol.requests import ChatMessage, CreateChatCompletionRequest, Input

T = TypeVar("T")
_THREADS = 2
_SPARE = 1024  # characters kept beyond those that the model can read: tokens depend on what is beside them
_MAX_CHARACTERS = 1 << 16  # that a thread tokenizes at a time, so that other requests come in between


@dataclass(frozen=True)
class _ThreadTokenizer:
    """The copies of one thread."""

    tokenizer: Any
    texts: TextTokenizer
    chat: ChatTemplate | None


@dataclass(frozen=True)
class TextOptions:
    """What a request asks of its texts."""

    truncate: Truncate = "error"
    max_tokens: int | None = None
    """Most tokens of a text. None: what the model embeds."""
    prompt: str | None = None
    """What stands before every text. None: the model's default."""


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts to embed, as token ids."""

    parts: list[list[list[int]]]
    """Rows of each text: one, or several whose vectors are averaged."""
    truncated: int
    """How many texts were cut."""
    overhead: int
    """Tokens of a row that are not the text's."""

    @property
    def rows(self) -> list[list[int]]:
        """All rows, one text after the other."""
        return [row for rows in self.parts for row in rows]


def _shorten(text: str, characters: int, truncate: Truncate) -> str:
    """Drop what cannot be among a text's first or last tokens, so that megabytes are not tokenized."""
    if truncate == "end":
        return text[: characters + _SPARE]
    return text[-characters - _SPARE :] if truncate == "start" else text


class RequestTokenizer:
    """Tokenizes texts, prompts and conversations. End it with `close`."""

    def __init__(self, gem: GemModel) -> None:
        self._copies: SimpleQueue[_ThreadTokenizer] = SimpleQueue()
        for _ in range(_THREADS):
            tokenizer = copy.deepcopy(gem.tokenizer)
            chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
            self._copies.put(_ThreadTokenizer(tokenizer, replace(gem.text_tokenizer, tokenizer=tokenizer), chat))
        self._vocab_size = int(gem.lm.get_input_embeddings().weight.shape[0])
        self._max_seq_length, self._max_text_tokens = gem.max_seq_length, gem.config.max_text_tokens
        self._max_model_len: int | None = max_positions(gem.lm)
        self._max_token_length = max(map(len, gem.tokenizer.get_vocab()))  # characters of a token
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="gemify-prompts")
        self.has_chat = bool(gem.tokenizer.chat_template)
        self._answer_format = None
        if self.has_chat:
            tokenizer = copy.deepcopy(gem.tokenizer)
            self._answer_format = AnswerFormat(gem.lm, tokenizer, ChatTemplate(tokenizer))
        self._overhead = gem.text_tokenizer.overhead
        self._prompts = gem.config.prompts
        self._default_prompt = self._prompts.get(gem.config.default_prompt_name or "", "")
        self._query_prompt = self._prompts.get("query", self._default_prompt)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run_in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Run something short in a tokenizing thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def tokenize_texts(self, given: Input, options: TextOptions | None = None) -> TokenizedTexts:
        """Tokenize texts to embed, and make them fit. Control tokens that a text spells are text."""
        options = options or TextOptions()
        limit = min(options.max_tokens or self._max_text_tokens, self._max_text_tokens)
        characters = limit * self._max_token_length
        parts: list[list[list[int]]] = []
        long = 0
        batch: list[str] = []
        size = 0

        async def flush() -> None:
            nonlocal long, batch, size
            if batch:
                made, are_long = await self.run_in_thread(self._split, batch, limit, options)
                parts.extend(made)
                long += sum(are_long)
            batch, size = [], 0

        for item in given:
            if isinstance(item, list):  # token ids run as they are
                await flush()
                parts.append(truncate_row(item, limit, options.truncate))
                long += len(item) > limit
                continue
            if options.truncate == "error":
                self._require_fit(item, self._max_seq_length)
            batch.append(_shorten(item, characters, options.truncate))
            size += len(batch[-1])
            if size > _MAX_CHARACTERS:
                await flush()
        await flush()
        return TokenizedTexts(parts, long if options.truncate in ("end", "start") else 0, self._overhead)

    def prompt_of(self, prompt_name: str | None, input_type: str | None) -> str:
        """Return the prompt that a request names, or the default; ApiError 400 for one that the model has not."""
        name = prompt_name
        if input_type is not None:
            kind = {"passage": "document"}.get(input_type.removeprefix("search_"), input_type.removeprefix("search_"))
            if kind not in self._prompts and kind in ("query", "document"):
                return self._default_prompt
            name = kind
        if name is None:
            return self._default_prompt
        if name not in self._prompts:
            param = "input_type" if input_type is not None else "prompt_name"
            raise bad_request(f"no prompt named {name!r}: this model has {sorted(self._prompts) or 'none'}", param)
        return self._prompts[name]

    async def tokenize_query(self, text: str) -> list[int]:
        """Tokenize a question to an index, cut at the end as the library does."""
        cut = text[: self._max_seq_length * self._max_token_length]
        return (await self.run_in_thread(self._texts, [self._query_prompt + cut], self._max_text_tokens))[0]

    async def tokenize_prompts(self, given: Input, *, add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenize prompts to continue, as the base model's own tokenizer does."""
        for item in given:
            if isinstance(item, str):
                self._require_fit(item, self._max_model_len)
        work = partial(self._prompt, add_special_tokens=add_special_tokens)
        return [item if isinstance(item, list) else await self.run_in_thread(work, item) for item in given]

    async def tokenize_chat(self, body: CreateChatCompletionRequest) -> tuple[int, ...]:
        """Tokenize a conversation, up to where the answer starts."""
        self.require_chat(body.messages)
        return await self.run_in_thread(self._chat, body)

    def require_chat(self, messages: Sequence[ChatMessage]) -> None:
        """Raise ApiError 400 if there is no chat template, or a message is too long."""
        if not self.has_chat:
            raise bad_request("this model has no chat template: use /v1/completions", code="no_chat_template")
        for message in messages:
            self._require_fit(message.content, self._max_model_len)

    @property
    def answer_format(self) -> AnswerFormat:
        """How the model writes thoughts and calls of tools."""
        assert self._answer_format is not None
        return self._answer_format

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens included."""
        if odd := [i for i in ids if i >= self._vocab_size]:
            raise bad_request(f"the token id {odd[0]} is none of this model's: 0..{self._vocab_size - 1}")
        return await self.run_in_thread(lambda: str(self._tokenizer().tokenizer.decode(ids)))

    async def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return the tokenizer's names of tokens."""
        return await self.run_in_thread(lambda: list(self._tokenizer().tokenizer.convert_ids_to_tokens(list(ids))))

    async def tokenize_plain(self, text: str) -> list[int]:
        """Tokenize a text alone, nothing before it."""
        return await self.run_in_thread(lambda: list(self._tokenizer().texts.tokenize_plain([text])[0]))

    def _require_fit(self, text: str, tokens: int | None) -> None:
        """Raise ApiError 400 for a text that cannot fit, without tokenizing megabytes to find out."""
        if tokens is not None and len(text) > tokens * self._max_token_length:
            raise bad_request(
                f"a text has {len(text):,} characters, more than the {tokens:,} tokens that this model takes can hold:"
                " cut it up"
            )

    # In a tokenizing thread

    def _tokenizer(self) -> _ThreadTokenizer:
        tokenizer: _ThreadTokenizer | None = getattr(self._local, "own", None)
        if tokenizer is None:
            tokenizer = self._local.own = self._copies.get_nowait()
        return tokenizer

    def _texts(self, texts: list[str], max_tokens: int | None = None) -> list[list[int]]:
        return self._tokenizer().texts(texts, max_tokens=max_tokens)

    def _split(self, texts: list[str], limit: int, options: TextOptions) -> tuple[list[list[list[int]]], list[bool]]:
        prompt = self._default_prompt if options.prompt is None else options.prompt
        if options.truncate == "error":  # the engine refuses the long ones, by their number
            return [[row] for row in self._texts([prompt + text for text in texts])], [False] * len(texts)
        return self._tokenizer().texts.split(texts, max_tokens=limit, truncate=options.truncate, prompt=prompt)

    def _prompt(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer().texts.tokenize_prompts(
            [text], add_special_tokens=add_special_tokens, vocab_size=self._vocab_size
        )[0]

    def _chat(self, body: CreateChatCompletionRequest) -> tuple[int, ...]:
        chat = self._tokenizer().chat
        assert chat is not None
        try:
            messages = [message.for_template() for message in body.messages]
            tools = [tool.model_dump(exclude_none=True) for tool in body.offered_tools]
            if not self.answer_format.reads_tools:
                messages, tools = describe_tools(messages, tools), []
            return bind_template(chat, body).apply(
                messages,
                tools=tools,
                continue_final_message=bool(body.continue_final_message),
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        except ValueError as error:
            raise bad_request(first_line(error), "messages") from error


def bind_template(template: ChatTemplate, body: CreateChatCompletionRequest) -> ChatTemplate:
    """Return the template with the variables that a request sets; ApiError 400 for one that it cannot honour."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        if not template.reads("reasoning_effort"):
            raise unsupported_parameter(
                "reasoning_effort", "this model's chat template reads none: give its own words in chat_template_kwargs"
            )
    try:
        return template.bind(variables)
    except ValueError as error:
        raise bad_request(str(error), "chat_template_kwargs") from error


_TOOLS = """You can call these functions:
{tools}
To call one, answer with nothing but
<tool_call>
{{"name": NAME, "arguments": {{...}}}}
</tool_call>"""


def describe_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in which tools, calls and their results are plain words, for templates that know none."""
    plain: list[dict[str, Any]] = []
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        plain.append({"role": "system", "content": _TOOLS.format(tools=listed)})
    for message in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        said = [message["content"]] * bool(message["content"] or not calls)
        content = "\n".join([*said, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        elif message["role"] == "system" and tools and len(plain) == 1:
            plain[0]["content"] = f"{content}\n\n{plain[0]['content']}"
        else:
            plain.append({"role": message["role"], "content": content})
    return plain
