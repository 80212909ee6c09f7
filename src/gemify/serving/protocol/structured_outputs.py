"""What an answer must look like: OpenAI's ``response_format`` and vLLM's ``structured_outputs``, as one grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gemify.io.tables import first_line
from gemify.serving.errors import bad_request

_MAX_CHOICES = 1024
_END_OF_THOUGHTS = "</think>"
_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"  # between the parts of JSON: enough to indent, too little to go on for ever


class JsonSchemaFormat(BaseModel):
    """A JSON schema that the answer follows."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    name: str | None = Field(default=None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="False: ignore keywords that cannot be followed.")


class ResponseFormat(BaseModel):
    """OpenAI's form."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: the field is required with this type")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's form: one of these."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="A JSON schema.")
    json_object: Literal[True] | None = None
    regex: str | None = Field(default=None, description="Rust's syntax: no look-around, no back references.")
    choice: list[str] | None = Field(default=None, min_length=1, max_length=_MAX_CHOICES)
    grammar: str | None = Field(default=None, description="Lark's or GBNF's syntax.")

    @model_validator(mode="after")
    def _require_one(self) -> Self:
        if len(self.given()) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self

    def given(self) -> dict[str, Any]:
        """Return what is asked for: its name and its value."""
        return {name.rstrip("_"): value for name, value in self if value is not None}


class StructuredRequest(BaseModel):
    """The fields that ask for such an answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(default=None, description="vLLM's.")
    guided_json: dict[str, Any] | str | None = Field(default=None, description="vLLM's: a JSON schema.")
    guided_regex: str | None = Field(default=None, description="vLLM's.")
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=_MAX_CHOICES, description="vLLM's.")
    guided_grammar: str | None = Field(default=None, description="vLLM's: Lark's or GBNF's syntax.")

    def grammar(self) -> str | None:
        """Return the grammar of the answer, as llguidance writes it; None: any text.

        Raises:
            ApiError: 400, several are asked for, or one is none.
        """
        found: dict[str, Any] = {}
        if (form := self.response_format) is not None and form.type != "text":
            schema = form.json_schema if form.type == "json_schema" else None
            found["response_format"] = json_grammar(
                schema.schema_ if schema is not None else {"type": "object"},
                lenient=schema is not None and schema.strict is False,
            )
        guided: dict[str, Any] = {"json": self.guided_json, "regex": self.guided_regex}
        guided |= {"choice": self.guided_choice, "grammar": self.guided_grammar}
        found |= {f"guided_{kind}": _grammar(kind, value) for kind, value in guided.items() if value is not None}
        if (outputs := self.structured_outputs) is not None:
            ((kind, value),) = outputs.given().items()
            found["structured_outputs"] = _grammar(kind, value)
        if len(found) > 1:
            raise bad_request(f"give one of {' and '.join(found)}", next(iter(found)))
        return next(iter(found.values()), None)


def json_grammar(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """Return the grammar of JSON that follows a schema.

    Args:
        schema: the schema.
        lenient: ignore keywords that cannot be followed. False: they are an error of the grammar.

    Raises:
        ApiError: 400, a number in it is too large.
    """
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(inline_schema(schema, lenient=lenient))
    except ValueError as error:  # a number that llguidance cannot hold
        raise bad_request(f"the schema: {first_line(error)}", "schema") from error


def inline_schema(schema: Mapping[str, Any], *, lenient: bool) -> dict[str, Any]:
    """Return a schema with llguidance's options in it, as it may stand inside another grammar."""
    options = {"whitespace_pattern": _WHITESPACE, "lenient": lenient, "coerce_one_of": lenient}
    return {**schema, "x-guidance": options}


def after_thoughts(grammar: str, control_tokens: Mapping[str, int]) -> str:
    """Return the grammar of thoughts, which have begun and end with </think>, and then of what ``grammar`` says.

    Args:
        grammar: as llguidance writes it.
        control_tokens: ids of the tokenizer's control tokens by their names.
    """
    answer = json.loads(grammar)["grammars"][0] if grammar.lstrip().startswith("{") else {"lark_grammar": grammar}
    end = control_tokens.get(_END_OF_THOUGHTS)
    thoughts = f"thoughts[lazy]: TEXT {json.dumps(_END_OF_THOUGHTS)}" if end is None else f"thoughts: TEXT <[{end}]>"
    lines = ["start: thoughts SPACE @answer", r"TEXT: /(.|\n)*/", r"SPACE: /[\n ]{0,4}/", thoughts]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, {**answer, "name": "answer"}]})


def _grammar(kind: str, value: Any) -> str:
    from llguidance import grammar_from

    try:
        if kind == "json_object":
            return json_grammar({"type": "object"})
        if kind == "json":
            return json_grammar(json.loads(value) if isinstance(value, str) else value)
        return grammar_from(kind, value)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError) as error:
        raise bad_request(f"{kind}: {first_line(error)}", kind) from error
