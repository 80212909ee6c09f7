"""Conversations as training data: the usual shapes of rows -> messages, their token ids, and which of them are learned.

    messages             a list of role and content (OpenAI); also with tools
    conversations        a list of from and value (ShareGPT), or of role and content; also with system, tools
    prompt, completion   texts (a question and its answer), or two lists of messages: the second is learned

Raw rows have the base's chat template, and the loss is on the assistant's tokens only. Rows with special tokens are cut
from the same conversations: at a token that is learned, or a message's text and its repetition. The first question and
its answer are a pair.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from gemify.io.rows import on_one_line, replace_surrogates
from gemify.model.chat_template import ChatTemplate
from gemify.paper.tokens import Row, reconstruction_row, split_row

_SHAPES = (("messages",), ("conversations",), ("prompt", "completion"))
_BESIDE = ("tools", "system")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of roles, and ours."""
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def conversation_columns(names: Collection[str]) -> set[str]:
    """Which of a row's columns hold a conversation; none if it holds none."""
    for shape in _SHAPES:
        if all(name in names for name in shape):
            return {*shape, *(name for name in _BESIDE if name in names)}
    return set()


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content, as a chat template takes them."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] = ()
    """JSON schemas of tools."""
    since: int = 0
    """The first message of which something is learned."""

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Conversation | None:
        """Read a row in one of the shapes of this module; None if it has another.

        Raises:
            ValueError: A message is none, or no answer of the assistant is there to learn.
        """
        shape = next((shape for shape in _SHAPES if all(name in row for name in shape)), None)
        if shape is None:
            return None
        parts = [_messages(row[name], name) for name in shape]
        messages = [message for part in parts for message in part]
        since = len(parts[0]) if len(parts) > 1 else 0
        if isinstance(system := row.get("system"), str) and system.strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": replace_surrogates(system)})
            since += bool(since)
        if not any(message["role"] == "assistant" for message in messages[since:]):
            raise ValueError(f"{shape[-1]!r} holds no message of the assistant: there is nothing to learn")
        return Conversation(tuple(messages), _tools(row.get("tools")), since)

    @property
    def pair(self) -> tuple[str, str | None]:
        """The first question and its answer, without thoughts; or an answer and None, where nothing was asked."""
        said = [(m["role"], _THOUGHTS.sub("", m["content"]).strip()) for m in self.messages]
        for (role, question), (next_role, answer) in itertools.pairwise(said):
            if (role, next_role) == ("user", "assistant") and question and answer:
                return question, answer
        return next((text for role, text in said if role == "assistant" and text), ""), None

    def tokenize(self, template: ChatTemplate, *, max_tokens: int) -> ChatTokens:
        """Return the ids by the base's template; a longer conversation is cut at its end.

        Raises:
            ValueError: The template refuses the conversation, or leaves its answers out.
        """
        ids, learned = template.assistant_mask(self.messages, tools=self.tools or None, since=self.since)
        if not any(learned[1:]):
            raise ValueError("the chat template leaves the assistant's messages out: there is nothing to learn")
        return ChatTokens(ids[:max_tokens], learned[:max_tokens])


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of a conversation, and which of them are learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def targets(self) -> list[int]:
        """Positions that are learned. The first token is none: nothing stands before it."""
        return [at for at, flag in enumerate(self.learned) if flag and at]

    def raw_row(self) -> Row:
        """The conversation without special tokens."""
        return Row("raw", self.ids, learned=self.learned)

    def split_row(self, rng: Random) -> Row:
        """The conversation with special tokens before a random token that is learned."""
        made = split_row(self.ids, rng.choice(self.targets))
        return Row(made.kind, made.prefix, made.suffix, self.learned)

    @staticmethod
    def reconstruction_row(text: Sequence[int], *, bos_ids: Sequence[int], end_ids: Sequence[int]) -> Row:
        """A message's text and its repetition, which alone is learned."""
        made = reconstruction_row(text, bos_ids=bos_ids, end_ids=end_ids)
        learned = (False,) * len(made.prefix) + (True,) * len(made.suffix)
        return Row(made.kind, made.prefix, made.suffix, learned)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages in a column: a list of them, or the text of one."""
    if isinstance(value, str) and column in ("prompt", "completion"):
        value = [{"role": "user" if column == "prompt" else "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        got = "an empty one" if value == [] else _describe(value)
        raise ValueError(f"{column!r} must hold a list of messages, got {got}")
    return [_message(item, column) for item in value]


def _message(item: Any, column: str) -> dict[str, Any]:
    role = item.get("role", item.get("from")) if isinstance(item, Mapping) else None
    if not isinstance(role, str) or (role not in _ROLES and role != "developer"):
        raise ValueError(
            f"{column!r} must hold messages with a role (or from) of {', '.join(_ROLES)}, got {_describe(role or item)}"
        )
    content = item.get("content", item.get("value"))
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of a message in {column!r} must be text, got {_describe(content)}")
    other = _without_none({k: v for k, v in item.items() if k not in ("role", "from", "content", "value")})
    return {"role": _ROLES.get(role, role), "content": replace_surrogates(content or ""), **other}


def _without_none(value: Any) -> Any:
    """A value less what is None in it: `datasets` gives every message all keys that any message has."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _tools(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' must be a list of JSON schemas, got text that is no JSON: {error}") from error
    if not value:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"'tools' must be a list of JSON schemas, got {_describe(value)}")
    return tuple(value)


def _describe(value: Any) -> str:
    return on_one_line([value[:40]]) if isinstance(value, str) else type(value).__name__
