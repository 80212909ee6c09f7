"""Conversations as token ids: exactly those of the base model's own `apply_chat_template`.

The whole conversation is rendered and tokenised at once, whatever the template does to contents (trims them, drops
earlier thoughts, moves the system message) and whatever the tokenizer does at a beginning. Where a content starts and
ends is then found in the ids: the positions at which they begin to differ from those of another content.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gemify.io.rows import replace_surrogates
from gemify.io.tables import first_line
from gemify.model.kv_cache import common_prefix_length

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]
Message = Mapping[str, Any]
"""One message of a conversation: ``role``, ``content``, and what else the template reads."""

_PARAMETERS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
_PROBES = ("a", "Z")  # no text begins, or ends, with both
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def pop_chat_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take what concerns the prompt of a conversation out of the options of a generation."""
    names = ("tools", "continue_final_message", "chat_template_kwargs")
    return {name: options.pop(name) for name in names if name in options}


class ChatTemplate:
    """A tokenizer's chat template. Several threads may use it.

    A control token's name in a message is text. A system message that the template refuses goes before the first user
    message.

    Args:
        tokenizer: The base model's. Nobody else may use it from another thread at the same time.
        own_system: A system message that is this program's, not the user's: it is also kept where the template would
            drop it, and moved without a word.
        template_kwargs: Further variables of the template, such as ``enable_thinking``.

    Raises:
        ValueError: The tokenizer has no chat template, or a variable has a name that is not the template's to read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        own_system: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the base model has no chat template: take an instruction-tuned one, or generate from a plain prompt"
            )
        self._tokenizer, self._own_system = tokenizer, own_system
        self._lock = threading.Lock()  # tokenising a text as plain text flips a switch of the tokenizer
        names = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
        self._control_tokens = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._keeps_own_system: bool | None = None
        self._has_warned = False
        self._template_kwargs = _require_variables(template_kwargs or {})

    def bind(self, template_kwargs: Mapping[str, Any]) -> ChatTemplate:
        """Return this template with further variables of its own."""
        if not template_kwargs:
            return self
        bound = copy.copy(self)  # the lock and the tokenizer are shared
        bound._template_kwargs = {**self._template_kwargs, **_require_variables(template_kwargs)}
        bound._keeps_own_system = None
        return bound

    def reads(self, variable: str) -> bool:
        """Whether the template reads a variable of this name."""
        return re.search(rf"\b{re.escape(variable)}\b", str(self._tokenizer.get_chat_template())) is not None

    def apply(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> Ids:
        """Token ids of a conversation, up to where the assistant's next answer starts.

        Args:
            messages: The oldest first.
            tools: JSON schemas of tools, for templates that name them.
            continue_final_message: The answer goes on from the last message instead.
            add_generation_prompt: False: end after the last message.

        Raises:
            ValueError: The template refuses the conversation.
        """
        options = {
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            **self._template_kwargs,
        }
        if isinstance(messages, str | Mapping) or not messages:
            got = type(messages).__name__ if messages else "none"
            raise ValueError(f"messages must be a list of at least one message with role and content, got {got}")
        given: list[dict[str, Any]] = _replace_surrogates([dict(message) for message in messages])
        with self._lock:
            own = bool(given) and self._own_system and given[0] == self._own_message()
            if own and not self._keeps(options):
                return self._tokenize(_fold_system(given), options)
            try:
                return self._tokenize(given, options)
            except Exception as error:  # templates raise what they like
                return self._tokenize_folded(given, options, error)

    def assistant_mask(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, since: int = 0
    ) -> tuple[Ids, tuple[bool, ...]]:
        """Token ids of a whole conversation, and which of them the assistant writes, the ends of its turns included.

        A template with ``{% generation %}`` says so itself. In others an answer is what follows the generation prompt.

        Args:
            messages: The oldest first.
            tools: JSON schemas of tools, for templates that name them.
            since: The first message that counts.

        Raises:
            ValueError: The template refuses the conversation.
        """
        if since == 0 and (marked := self._marked_mask(messages, tools)) is not None:
            return marked
        ids = self.apply(messages, tools=tools, add_generation_prompt=False)
        mask = [False] * len(ids)
        for index, message in enumerate(messages):
            if index >= since and message.get("role") == "assistant":
                start, end = self._answer_span(ids, messages, index, tools)
                mask[start:end] = [True] * (end - start)
        return ids, tuple(mask)

    def _marked_mask(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[Ids, tuple[bool, ...]] | None:
        """The mask by the template's own marks, or None where it has none or cannot be asked."""
        given = _replace_surrogates([dict(message) for message in messages])
        options = {"tools": list(tools) if tools else None, **self._template_kwargs}
        template = str(self._tokenizer.get_chat_template())
        if not _GENERATION_MARK.search(template) or self._spells_control_token([given, options]):
            return None  # control tokens as text and marks do not go together in transformers
        with self._lock:
            try:
                found = self._tokenizer.apply_chat_template(given, return_assistant_tokens_mask=True, **options)
            except Exception:  # `apply` then says why, or mends it
                return None
        return tuple(found["input_ids"]), tuple(map(bool, found["assistant_masks"]))

    def _answer_span(
        self, ids: Ids, messages: Sequence[Message], index: int, tools: Sequence[Any] | None
    ) -> tuple[int, int]:
        """Start and end position of an answer in a conversation's ids, its end of turn included."""
        before = self._apply_or_none(messages[:index], tools, add_generation_prompt=True)
        after = self._apply_or_none(messages[: index + 1], tools, add_generation_prompt=False)
        starts, ends = (known is not None and ids[: len(known)] == known for known in (before, after))
        start, end = len(before or ()), len(after or ())
        if not (starts and ends):  # earlier messages are rendered otherwise, or a token crosses the border
            first, last = self.content_span(messages, index=index, tools=tools, add_generation_prompt=False)
            start = start if starts else first
            end = end if ends else last + self._turn_end(ids[last:], messages[: index + 1], after, tools)
        stops = [at for at in range(start, end) if ids[at] == self._tokenizer.eos_token_id]
        return start, stops[-1] + 1 if stops else max(start, end)

    def _turn_end(self, rest: Ids, messages: Sequence[Message], ids: Ids | None, tools: Sequence[Any] | None) -> int:
        """How many ids behind the last message's content belong to its turn, in a conversation that goes on."""
        if ids is None:
            return 0
        _, end = self.content_span(messages, tools=tools, add_generation_prompt=False)
        return common_prefix_length(ids[end:], rest)

    def _apply_or_none(self, messages: Sequence[Message], tools: Sequence[Any] | None, **options: bool) -> Ids | None:
        """As `apply`; None for a part of a conversation that the template refuses."""
        try:
            return self.apply(messages, tools=tools, **options)
        except ValueError:
            return None

    def content_span(self, messages: Sequence[Message], *, index: int = -1, **options: Any) -> tuple[int, int]:
        """Start and end position of a message's content in the ids. An empty span: it cannot be told.

        Args:
            messages: The oldest first.
            index: Which message.
            options: Those of `apply`.
        """
        ids = self.apply(messages, **options)
        others = []
        for probe in _PROBES:
            changed = list(messages)
            changed[index] = {**messages[index], "content": probe}
            others.append(self.apply(changed, **options))
        start = min(common_prefix_length(ids, other) for other in others)
        end = len(ids) - min(common_prefix_length(ids[::-1], other[::-1]) for other in others)
        return (start, end) if start < end else (start, start)

    def stable_prefix(self, messages: Sequence[Message], *, index: int = -1, length: int | None = None) -> Ids:
        """The ids that a conversation begins with, however message ``index`` goes on.

        Args:
            messages: The conversation.
            index: Which message goes on.
            length: After how many characters of its content. None: after all of it.
        """
        content, changed = messages[index]["content"][:length], list(messages)
        variants: list[Ids] = []
        for probe in _PROBES:
            changed[index] = {**messages[index], "content": content + probe}
            variants.append(self.apply(changed))
        first, second = variants
        return first[: common_prefix_length(first, second)]

    def _own_message(self) -> dict[str, Any]:
        return {"role": "system", "content": self._own_system}

    def _keeps(self, options: Mapping[str, Any]) -> bool:
        """Whether the template takes our own system message and repeats it."""
        if self._keeps_own_system is None:
            messages = [self._own_message(), {"role": "user", "content": "a"}]
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception:
                text = ""
            self._keeps_own_system = self._own_system.strip() in str(text)
        return self._keeps_own_system

    def _tokenize_folded(self, messages: list[dict[str, Any]], options: dict[str, Any], error: Exception) -> Ids:
        """Tokenise with the system message in the first user message: the template refused it with ``error``."""
        roles = ", ".join(" ".join(str(message.get("role")).split()) for message in messages)
        refused = ValueError(f"the chat template refuses messages of {roles}: {first_line(error)}")
        if not any(message.get("role") == "system" for message in messages):
            raise refused from error
        try:
            ids = self._tokenize(_fold_system(messages), options)
        except Exception:
            raise refused from error
        if not self._has_warned:
            self._has_warned = True
            logger.warning("the chat template takes no system message: its words go before the first user message")
        return ids

    def _tokenize(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Ids:
        sanitize = {"sanitize_control_tokens": True} if self._spells_control_token([messages, options]) else {}
        return tuple(self._tokenizer.apply_chat_template(messages, return_dict=False, **options, **sanitize))

    def _spells_control_token(self, given: Any) -> bool:
        if isinstance(given, str):
            return self._control_tokens.search(given) is not None
        if isinstance(given, Mapping):
            return any(map(self._spells_control_token, given.values()))
        return isinstance(given, list | tuple) and any(map(self._spells_control_token, given))


def _replace_surrogates(given: Any) -> Any:
    """Return messages without lone surrogates, which no tokenizer takes."""
    if isinstance(given, str):
        return replace_surrogates(given)
    if isinstance(given, Mapping):
        return {name: _replace_surrogates(value) for name, value in given.items()}
    return [_replace_surrogates(item) for item in given] if isinstance(given, list | tuple) else given


def _require_variables(template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if taken := sorted(_PARAMETERS & set(template_kwargs)):
        raise ValueError(f"chat_template_kwargs must be the template's own variables, got {taken[0]!r}: leave it out")
    return dict(template_kwargs)


def _text(content: Any) -> str:
    """A content's text: a string, or the texts of its parts."""
    return "".join(str(part["text"]) for part in content) if isinstance(content, list) else str(content)


def _fold_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with every system message before the content of the user message that follows it."""
    folded: list[dict[str, Any]] = []
    words: list[str] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "system":
            words.append(_text(message["content"]))
        elif words and (message is None or message["role"] == "user"):
            said = [_text(message["content"])] if message is not None else []
            folded.append({**(message or {"role": "user"}), "content": "\n\n".join([*words, *said])})
            words = []
        elif message is not None:
            folded.append(dict(message))
    return folded
