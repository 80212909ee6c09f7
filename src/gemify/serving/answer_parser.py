"""Parts of an answer: thoughts, text and calls of tools, told apart while it is generated.

A tokenizer's own ``response_template`` says how its model writes them. Without one, the chat template does: it is given
a call to write, and what stands around the name and the arguments is read off. transformers' `ResponseParser` does the
rest. A call that must come is written under a grammar of that form.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser

from gemify.engine.sampling import TokenLogprob
from gemify.model.chat_template import ChatTemplate
from gemify.serving.protocol.structured_outputs import inline_schema
from gemify.serving.protocol.tools import Tool

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_NAME, _KEY = "NAMEOFTOOL", "KEYOFARGUMENT"


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
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call: ``begin`` NAME ``middle`` ARGUMENTS ``end``."""

    begin: str = '<tool_call>\n{"name": "'
    middle: str = '", "arguments": '
    end: str = "}\n</tool_call>"

    @property
    def tag(self) -> str:
        """What no answer without a call has."""
        return self.begin.partition("{")[0].strip()

    def response_template(self, *, thinks: bool) -> dict[str, Any]:
        """Return this form for `ResponseParser`."""
        close = self.end.partition("}")[2].strip()
        calls = {"open_pattern": r"\s*" + re.escape(self.tag), "repeats": True, "content": "json"}
        calls |= {"transform": {"type": "function", "function": "{content}"}, **({"close": close} if close else {})}
        return _response_template({"tool_calls": calls}, thinks=thinks)

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, control_tokens: Mapping[str, int]
    ) -> str:
        """Return a grammar of answers with calls.

        Args:
            tools: what may be called.
            required: the answer is a call. False: it is text, or has calls after it.
            parallel: there may be several calls.
            control_tokens: ids of the tokenizer's control tokens by their names.
        """
        quote = partial(_quote, control_tokens=control_tokens)
        head, rest = self.tag, self.begin.partition("{")
        body = f"{quote(rest[0][len(head) :] + '{' + rest[2])} ( {' | '.join(f'call_{i}' for i in range(len(tools)))} )"
        lines = [
            f"call_{i}: {quote(tool.function.name + self.middle)} %json "
            + json.dumps(inline_schema(tool.function.schema_of_arguments(), lenient=not tool.function.strict))
            for i, tool in enumerate(tools)
        ]
        call = f"call: {body} {quote(self.end)}"
        if required:
            more = f" ( {quote(chr(10))} {quote(head)} call )~0..15" if parallel else ""
            return "\n".join([f"start: {quote(head)} call{more}", call, *lines])
        many = "*" if parallel else "?"
        trigger = f"trigger[lazy]: TEXT {quote(head)}"
        if head in control_tokens:
            trigger = f"trigger: TEXT {quote(head)}"
        return "\n".join([f"start: ( trigger call ){many} TEXT", "TEXT: /(.|\\n)*/", trigger, call, *lines])


class AnswerFormat:
    """How a model writes thoughts and calls.

    Args:
        lm: the model; its kind may be known to transformers.
        tokenizer: its tokenizer.
        template: its chat template.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.reads_tools = template.reads("tools")
        self.control_tokens = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        derived = _derive_tool_format(tokenizer, template) if self.reads_tools else None
        self.tools = derived or ToolFormat()
        known = getattr(tokenizer, "response_template", None) or (None if derived else _template_of(lm, tokenizer))
        self.follows_grammar = known is None
        """Whether calls are written in the form of ``tools``."""
        chat_template = str(tokenizer.get_chat_template())
        thoughts = known is not None and any(field in known.get("fields", {}) for field in _REASONING_FIELDS)
        self.thinks = thoughts or "<think>" in chat_template
        self.can_switch_thoughts = template.reads("enable_thinking")
        self._known = known

    def parser(self, prompt: str, *, has_tools: bool, must_call: bool) -> AnswerParser | None:
        """Return a parser for one answer; None: there is nothing to tell apart.

        Args:
            prompt: the end of the prompt as text, from which the answer goes on.
            has_tools: whether tools may be called.
            must_call: whether the answer is nothing but calls, in the form of ``tools``.
        """
        if not has_tools and not self.thinks:
            return None
        if must_call:
            return AnswerParser(self.tools.response_template(thinks=False), "")
        if self._known is not None:
            return AnswerParser(self._known, prompt)
        prefix = "<think>" if prompt.rfind("<think>") > prompt.rfind("</think>") else ""
        thinks = _response_template({}, thinks=True)
        return AnswerParser(self.tools.response_template(thinks=self.thinks) if has_tools else thinks, prefix)


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


def _tool_call(value: Any) -> ToolCall:
    function = value["function"]
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{secrets.token_hex(12)}", str(function["name"]), text)


def _response_template(fields: dict[str, Any], *, thinks: bool) -> dict[str, Any]:
    thoughts = {"reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"}} if thinks else {}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "\ue000",  # in no prompt: all of the prefix is the answer's
        "fields": {**thoughts, **fields, "content": {"content": "text"}},
    }


def _template_of(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return what transformers knows of this kind of model."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return None
    found: dict[str, Any] | None = get_response_template(tokenizer, lm)
    return found


def _derive_tool_format(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> ToolFormat | None:
    """Read the form of a call off the chat template; None: it is not JSON with a tag before it."""
    function: dict[str, Any] = {"name": _NAME, "arguments": {_KEY: 1}}
    call = {"id": "call00000", "type": "function", "function": function}
    tool = {"type": "function", "function": {"name": _NAME, "description": "a", "parameters": {"type": "object"}}}

    def written(answer: dict[str, Any]) -> str:
        ids = template.apply([{"role": "user", "content": "a"}, answer], tools=[tool], add_generation_prompt=False)
        return str(tokenizer.decode(ids))

    try:
        plain = written({"role": "assistant", "content": _KEY})
        written_call = written({"role": "assistant", "content": "", "tool_calls": [call]})
    except ValueError:
        return None
    head, _, tail = plain.rpartition(_KEY)
    same = next((at for at, (a, b) in enumerate(zip(head, written_call, strict=False)) if a != b), len(head))
    written_call = written_call[same:].removesuffix(tail)
    found = re.fullmatch(rf'(.*?){_NAME}(.*?)\{{\s*"{_KEY}":\s*1\s*\}}(.*)', written_call, re.DOTALL)
    if found is None:
        return None
    form = ToolFormat(found[1].lstrip(), found[2], found[3].rstrip())
    json_text = written_call.strip()[len(form.tag) :].removesuffix(form.end.partition("}")[2].strip())
    try:
        return form if form.tag and json.loads(json_text) == function else None
    except ValueError:
        return None


def _quote(text: str, control_tokens: Mapping[str, int]) -> str:
    """Return a text for a Lark grammar, its control tokens as tokens."""
    names = sorted(control_tokens, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    quoted = [f"<[{control_tokens[p]}]>" if p in control_tokens else json.dumps(p) for p in parts if p]
    return " ".join(quoted) or '""'
