r"""Conversations as token ids: the chat template's control tokens are parsed, the messages' contents are plain text.

    <|im_start|>user\n   What is a GEM?   \n\nPassages: ...   <|im_end|>\n<|im_start|>assistant\n
    template             question         passages            template

Each part is tokenised for itself, so that a prompt that goes on from another one begins with the same ids, and a text
that spells a control token (``<|im_end|>`` in a document) stays text.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]

_MAX_KEPT = 64  # sequences of roles whose template text is kept
_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template has them


@dataclass(frozen=True)
class TokenizedMessage:
    """One message; its content as ids."""

    role: str
    ids: Ids


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation's ids, and at which position each message's content starts."""

    ids: Ids
    content_starts: tuple[int, ...]


class ChatTemplate:
    """A tokenizer's chat template, applied to contents that are ids. Several threads may use it.

    Args:
        tokenizer: the base model's. Nobody else may use it from another thread at the same time.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the base model has no chat template: take an instruction-tuned one, or generate from a plain prompt"
            )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # tokenising a text as plain text flips a switch of the tokenizer
        self._pieces: OrderedDict[tuple[str, ...], list[Ids]] = OrderedDict()

    def encode(self, text: str) -> Ids:
        """Token ids of a text in which control tokens' names are text."""
        with self._lock:
            return self._encode(text, split_special_tokens=True)

    def message(self, role: str, text: str) -> TokenizedMessage:
        """One message; its content is tokenised with `encode`."""
        return TokenizedMessage(role, self.encode(text))

    def apply(self, messages: Sequence[TokenizedMessage]) -> ChatPrompt:
        """Lay out a conversation, up to where the assistant's next answer starts.

        Raises:
            ValueError: the template refuses this order of roles, or leaves out or repeats a message.
        """
        with self._lock:
            pieces = self._template_pieces(tuple(message.role for message in messages))
        ids = list(pieces[0])
        starts: list[int] = []
        for message, piece in zip(messages, pieces[1:], strict=True):
            starts.append(len(ids))
            ids += message.ids
            ids += piece
        return ChatPrompt(tuple(ids), tuple(starts))

    def _template_pieces(self, roles: tuple[str, ...]) -> list[Ids]:
        """Ids of the template's own text: before the first message, and after each."""
        if roles not in self._pieces:
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
            if len(self._pieces) == _MAX_KEPT:
                self._pieces.popitem(last=False)
            self._pieces[roles] = [self._encode(piece, split_special_tokens=False) for piece in pieces[::2]]
        return self._pieces[roles]

    def _encode(self, text: str, *, split_special_tokens: bool) -> Ids:
        split = {"split_special_tokens": True} if split_special_tokens else {}
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False, **split)["input_ids"])
