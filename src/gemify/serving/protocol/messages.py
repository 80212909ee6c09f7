"""Anthropic's form of a chat, which is translated to OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gemify.serving.errors import bad_request, unsupported_parameter
from gemify.serving.protocol import unsupported
from gemify.serving.protocol.requests import MAX_INT, ApiRequest, Content, CreateChatCompletionRequest, Stops, Unit
from gemify.serving.protocol.tools import ToolName

_MAX_MESSAGES = 2048
_Id = Annotated[str, Field(max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class TextBlock(_Part):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Part):
    """Thoughts of an earlier answer, for chat templates that read them."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Part):
    """Thoughts that cannot be read: left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Part):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: _Id
    name: ToolName
    input: dict[str, Any]

    def to_chat(self) -> dict[str, Any]:
        """Return the call in OpenAI's form."""
        return {"id": self.id, "function": {"name": self.name, "arguments": json.dumps(self.input)}}


class ToolResultBlock(_Part):
    """What a call has returned."""

    type: Literal["tool_result"]
    tool_use_id: _Id
    content: Content = ""
    is_error: bool | None = Field(default=None, description="The model reads Error: before the content.")

    def to_chat(self) -> dict[str, Any]:
        """Return the result in OpenAI's form: a message of its own."""
        content = f"Error: {self.content}" if self.is_error else self.content
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


def _blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class MessageParam(_Part):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks, json_schema_input_type=str | list[Block])]

    def to_chat(self) -> Iterator[dict[str, Any]]:
        """Yield the message in OpenAI's form, after the results of tools."""
        rest = []
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                yield block.to_chat()
            else:
                rest.append(block)
        if self.content and not rest:
            return
        message: dict[str, Any] = {"role": self.role}
        message["content"] = "".join(block.text for block in rest if isinstance(block, TextBlock))
        if calls := [block.to_chat() for block in rest if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        if thoughts := "".join(block.thinking for block in rest if isinstance(block, ThinkingBlock)):
            message["reasoning_content"] = thoughts
        yield message


class MessagesTool(_Part):
    """A function that the model may call."""

    type: Literal["custom"] | None = Field(default=None, description="Tools that run at Anthropic are not here.")
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def to_chat(self) -> dict[str, Any]:
        """Return the function in OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {**function, "strict": self.strict}}


class MessagesToolChoice(_Part):
    """Whether, or which, function is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = Field(default=None, description="With the type tool.")
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _require_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise ValueError("name: the field is required with this type")
        return self

    def to_chat(self) -> dict[str, Any]:
        """Return OpenAI's fields."""
        named = {"type": "function", "function": {"name": self.name}}
        choice = {"any": "required", "tool": named}.get(self.type, self.type)
        return {"tool_choice": choice, "parallel_tool_calls": not self.disable_parallel_tool_use}


class ThinkingConfig(_Part):
    """Whether the model thinks: enable_thinking of its chat template."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1024, le=MAX_INT, description="max_tokens is the only limit.")
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="summarized, the default: thoughts come whole. omitted: they do not come."
    )


class JsonOutputFormat(_Part):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Part):
    """What the answer is like."""

    format: JsonOutputFormat | None = None
    effort: str | None = Field(
        default=None, max_length=100, description="For chat templates that read reasoning_effort."
    )


class CountTokensRequest(ApiRequest):
    """A conversation in Anthropic's form."""

    unsupported_fields = (unsupported.MESSAGES,)

    messages: list[MessageParam] = Field(min_length=1, max_length=_MAX_MESSAGES)
    system: Content | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    def to_chat(self, *, thinks: bool, can_switch_thoughts: bool) -> CreateChatCompletionRequest:
        """Return the same request in OpenAI's form.

        Args:
            thinks: whether the model has thoughts.
            can_switch_thoughts: whether its chat template reads enable_thinking.

        Raises:
            ApiError: 400, there is none.
        """
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages += [message for given in self.messages for message in given.to_chat()]
        fields: dict[str, Any] = {"messages": messages, **self._sampling()}
        if messages[-1]["role"] == "assistant":
            fields["continue_final_message"] = True
        if self.tools:
            fields["tools"] = [tool.to_chat() for tool in self.tools]
        if self.tool_choice is not None:
            fields |= self.tool_choice.to_chat()
        if self.thinking is not None and self.thinking.type != "adaptive":
            enabled = self.thinking.type == "enabled"
            fields["chat_template_kwargs"] = {"enable_thinking": enabled}
            if not can_switch_thoughts and enabled != thinks:
                raise unsupported_parameter("thinking", "this model's chat template reads no enable_thinking")
        if self.output_config is not None:
            fields["reasoning_effort"] = self.output_config.effort
            if (form := self.output_config.format) is not None:
                fields["response_format"] = {"type": form.type, "json_schema": {"schema": form.schema_}}
        return to_chat_request(fields)

    def _sampling(self) -> dict[str, Any]:
        return {}


class CreateMessageRequest(CountTokensRequest):
    """A conversation to answer, in Anthropic's form."""

    max_tokens: int = Field(ge=1, le=MAX_INT, description="Longest answer, thoughts included.")
    temperature: Unit | None = Field(default=None, description="0: greedy. Default 1.")
    top_p: Unit | None = Field(default=None, description="Nucleus sampling. Default 1.")
    top_k: int | None = Field(
        default=None, ge=0, le=MAX_INT, description="Draw from so many of the most likely tokens."
    )
    stop_sequences: Stops = Field(default=(), description="The answer ends before the first of these.")
    stream: bool | None = Field(default=None, description="Server-sent events, the last of them message_stop.")

    def _sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        return {name: getattr(self, name) for name in names} | {"stop": list(self.stop_sequences)}


def to_chat_request(fields: dict[str, Any]) -> CreateChatCompletionRequest:
    """Return the request of a chat that another form has been translated to; ApiError 400 if it is not valid."""
    try:
        return CreateChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise bad_request(f"{where}: {message}" if where else message, where or None) from error
