"""Conversations as token ids: the chat template's own words parsed as such, everybody's contents as plain text.

    <|im_start|>user\n   What is a GEM?   \n\nPassages: ...   <|im_end|>\n<|im_start|>assistant\n
    template             question         passages            template

Each part is tokenised for itself, so that a prompt that goes on from another one begins with the same ids, and a text
that spells a control token (``<|im_end|>`` in a document) stays text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]
_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template has them


@dataclass(frozen=True)
class TokenizedMessage:
    """One message; its content as ids."""

    role: Role
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation's ids, and at which position each message's content starts."""

    ids: tuple[int, ...]
    content_starts: tuple[int, ...]


class ChatTemplate:
    """A tokenizer's chat template, applied to contents that are ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the base model has no chat template: answers need an instruction-tuned model")
        self._tokenizer = tokenizer
        self._templates: dict[tuple[str, ...], list[str]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text in which control tokens' names are text."""
        return tuple(
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        )

    def message(self, role: Role, text: str) -> TokenizedMessage:
        return TokenizedMessage(role, self.encode(text))

    def apply(self, messages: Sequence[TokenizedMessage]) -> ChatPrompt:
        """The prompt of a conversation, up to where the assistant's next answer starts."""
        ids: list[int] = []
        starts: list[int] = []
        for at, piece in enumerate(self._pieces(tuple(message.role for message in messages))):
            if at % 2 == 0:
                ids += self._tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                starts.append(len(ids))
                ids += messages[int(piece)].ids
        return ChatPrompt(tuple(ids), tuple(starts))

    def _pieces(self, roles: tuple[str, ...]) -> list[str]:
        """The template's own text and the messages' numbers, in alternation."""
        if roles not in self._templates:
            messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
            try:
                text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except Exception as error:  # templates raise what they like
                raise ValueError(f"the chat template refuses messages of {', '.join(roles)}: {error}") from error
            pieces = _MARK.split(text)
            if pieces[1::2] != [str(i) for i in range(len(roles))]:
                raise ValueError(
                    f"the chat template leaves out or repeats messages of {', '.join(roles)}: it cannot be cached"
                )
            self._templates[roles] = pieces
        return self._templates[roles]
