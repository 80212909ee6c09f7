"""Tools that a chat may call, and the calls in its messages: OpenAI's forms."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_MAX_TOOLS = 128
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class FunctionDefinition(_Part):
    """What the model knows of a function."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema; left out: no arguments.")
    strict: bool | None = Field(default=None, description="True: refuse schemas that cannot be followed exactly.")

    @field_validator("parameters")
    @classmethod
    def _require_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is not None and parameters.get("type", "object") != "object":
            raise ValueError("must be the schema of an object")
        return parameters

    def schema_of_arguments(self) -> dict[str, Any]:
        """Return the JSON schema of the arguments: of an object."""
        return {"type": "object", **(self.parameters or {"properties": {}, "additionalProperties": False})}


class Tool(_Part):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(_Part):
    """A function's name."""

    name: ToolName


class NamedToolChoice(_Part):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(_Part):
    """A call in an earlier answer."""

    name: ToolName
    arguments: str = Field(description="JSON of an object.")

    @field_validator("arguments")
    @classmethod
    def _require_object(cls, arguments: str) -> str:
        try:
            if isinstance(json.loads(arguments or "{}"), dict):
                return arguments or "{}"
        except (ValueError, RecursionError):
            pass
        raise ValueError("must be the JSON of an object")


class MessageToolCall(_Part):
    """A call in an earlier answer, with its id."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates read it: the arguments are an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class ToolRequest(BaseModel):
    """The fields of a request that offer tools."""

    tools: list[Tool] | None = Field(default=None, max_length=_MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        default=None, description="Whether, or which, function is called. Default auto, if there are tools."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="False: at most one call. Default true.")

    @model_validator(mode="after")
    def _require_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice: needs tools")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is none of the tools")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> list[Tool]:
        """Tools of which one must be called; empty: none must."""
        if isinstance(self.tool_choice, NamedToolChoice):
            return [tool for tool in self.offered_tools if tool.function.name == self.tool_choice.function.name]
        return self.offered_tools if self.tool_choice == "required" else []
