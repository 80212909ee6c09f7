"""Parts of an answer: thoughts, text and calls of tools, told apart while it is generated, by transformers' parser."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What response templates call thoughts."""
MAX_BEGUN = 256
"""Tokens at a prompt's end that may be the beginning of the answer."""
_HINTS = re.compile("think|thought|channel")  # no chat template of a model with thoughts is without


@dataclass(frozen=True)
class ToolCall:
    """A call of a function."""

    id: str
    name: str
    arguments: str
    """JSON of an object."""


@dataclass(frozen=True)
class AnswerDelta:
    """What one answer has more of."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[Any, ...] = ()
    """Log probabilities of its tokens, as the engine has them."""


class ThoughtFormat:
    """How a model writes thoughts.

    Args:
        tokenizer: its tokenizer, which has a chat template.
        response_template: how it writes answers. None: thoughts stand between <think> and </think>, if the chat
            template has these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, response_template: dict[str, Any] | None) -> None:
        self._tokenizer, self._response_template = tokenizer, response_template
        fields = (response_template or {}).get("fields", {})
        has_thoughts = any(field in fields for field in _REASONING_FIELDS)
        self.thinks = has_thoughts or "<think>" in str(tokenizer.get_chat_template())
        """Whether answers may have thoughts."""

    @classmethod
    def of(cls, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Return a model's: the tokenizer's own, or what transformers or the chat template knows."""
        known = getattr(tokenizer, "response_template", None)
        if known is None and _HINTS.search(str(tokenizer.get_chat_template())):
            known = model_response_template(lm)
        return cls(tokenizer, known)

    def parser_after(self, ids: Sequence[int]) -> AnswerParser | None:
        """Return a parser for the answer to a prompt. None: the model has no thoughts."""
        return self.parser(str(self._tokenizer.decode(list(ids[-MAX_BEGUN:])))) if self.thinks else None

    def parser(self, prompt: str, fields: Mapping[str, Any] | None = None) -> AnswerParser:
        """Return a parser for one answer.

        Args:
            prompt: the end of the prompt as text, from which the answer goes on.
            fields: further fields of answers, if there is no response template.
        """
        if self._response_template is not None:
            return AnswerParser(self._response_template, prompt)
        template = make_response_template(fields or {}, thinks=self.thinks)
        return AnswerParser(template, "<think>" if has_begun_thoughts(prompt) else "")


class AnswerParser:
    """Tells the parts of one answer apart.

    Args:
        response_template: as transformers' tokenizers have it.
        prefix: what the prompt has of the answer.
    """

    def __init__(self, response_template: dict[str, Any], prefix: str) -> None:
        self._parser: ResponseParser | None = ResponseParser(response_template, prefix=prefix)
        self._unparsed = ""
        self._trims = False

    def feed(self, text: str) -> list[AnswerDelta]:
        """Add text. Return what it completes."""
        if self._parser is None:
            return [AnswerDelta(text=text)] if text else []
        try:
            return self._read(self._parser.feed(text))
        except Exception:  # no JSON where there should be: the rest is text
            self._unparsed += text
            return self._give_up()

    def finish(self) -> list[AnswerDelta]:
        """Return what was held back."""
        if self._parser is None:
            return []
        try:
            return self._read(self._parser.finalize()[1])
        except Exception:
            return self._give_up()

    def _give_up(self) -> list[AnswerDelta]:
        self._parser = None
        return [AnswerDelta(text=self._unparsed)] if self._unparsed else []

    def _read(self, events: Sequence[dict[str, Any]]) -> list[AnswerDelta]:
        deltas: list[AnswerDelta] = []
        for event in events:
            field, kind = event.get("field"), event["type"]
            if kind == "region_chunk" and event.get("dirty"):
                self._unparsed += event["text"]
            elif kind == "region_chunk" and field in _REASONING_FIELDS:
                deltas.append(AnswerDelta(reasoning=event["text"]))
                self._trims = True
            elif kind == "region_chunk" and field == "content":
                text = event["text"].lstrip() if self._trims else event["text"]
                self._trims = self._trims and not text
                deltas += [AnswerDelta(text=text)] if text else []
            elif kind == "region_close" and field == "tool_calls":
                deltas.append(AnswerDelta(tool_calls=(_tool_call(event["value"]),)))
                self._unparsed = ""
        return deltas


def has_begun_thoughts(prompt: str) -> bool:
    """Whether an answer that goes on from a prompt begins inside of thoughts."""
    return prompt.rfind("<think>") > prompt.rfind("</think>")


def make_response_template(fields: Mapping[str, Any], *, thinks: bool) -> dict[str, Any]:
    """Return a response template with these fields, a text, and thoughts between <think> and </think>."""
    thoughts = {"reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"}} if thinks else {}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "\ue000",  # in no prompt: all of the prefix is the answer's
        "fields": {**thoughts, **fields, "content": {"content": "text"}},
    }


def model_response_template(lm: PreTrainedModel) -> dict[str, Any] | None:
    """Return what transformers knows of this kind of model."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return None
    found: dict[str, Any] | None = get_response_template(None, lm)
    return found


def _tool_call(value: Any) -> ToolCall:
    function = value["function"]
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{secrets.token_hex(12)}", str(function["name"]), text)
