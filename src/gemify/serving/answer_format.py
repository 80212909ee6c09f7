"""How a model writes calls of tools, and its thoughts.

A tokenizer's own ``response_template`` says how its model writes them. Without one, the chat template does: it is given
a call to write, and what stands around the name and the arguments is read off. transformers' `ResponseParser` does the
rest. A call that must come is written under a grammar of that form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemify.model.answer_parser import AnswerParser, ThoughtFormat, make_response_template, model_response_template
from gemify.model.chat_template import ChatTemplate
from gemify.serving.protocol.structured_outputs import inline_schema
from gemify.serving.protocol.tools import Tool

_NAME, _KEY = "NAMEOFTOOL", "KEYOFARGUMENT"


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

    def response_fields(self) -> dict[str, Any]:
        """Return this form as fields of a response template."""
        close = self.end.partition("}")[2].strip()
        calls = {"open_pattern": r"\s*" + re.escape(self.tag), "repeats": True, "content": "json"}
        calls |= {"transform": {"type": "function", "function": "{content}"}, **({"close": close} if close else {})}
        return {"tool_calls": calls}

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
        known = getattr(tokenizer, "response_template", None) or (None if derived else model_response_template(lm))
        self.follows_grammar = known is None
        """Whether calls are written in the form of ``tools``."""
        self._thoughts = ThoughtFormat(tokenizer, known)
        self.thinks = self._thoughts.thinks
        self.can_switch_thoughts = template.reads("enable_thinking")

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
            return AnswerParser(make_response_template(self.tools.response_fields(), thinks=False), "")
        return self._thoughts.parser(prompt, self.tools.response_fields() if has_tools else {})


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
