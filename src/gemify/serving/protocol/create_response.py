"""OpenAI's newer form of a chat, /v1/responses, which is translated to the older one."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gemify.serving.protocol import unsupported
from gemify.serving.protocol.messages import to_chat_request
from gemify.serving.protocol.requests import MAX_INT, ApiRequest, CreateChatCompletionRequest, Unit, join_text_parts
from gemify.serving.protocol.tools import FunctionCall, FunctionDefinition, ToolName

_MAX_ITEMS = 4096
_Id = Annotated[str, Field(max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class InputText(BaseModel):
    """A part of a text."""

    type: Literal["input_text", "output_text"]
    text: str


_read_text = partial(join_text_parts, kinds=("input_text", "output_text", "text"))
Text = Annotated[Any, BeforeValidator(_read_text, json_schema_input_type=str | list[InputText])]


class MessageItem(_Part):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text

    def to_chat(self) -> dict[str, Any]:
        """Return the message in the form of a chat."""
        return {"role": self.role, "content": self.content}


class FunctionCallItem(FunctionCall):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: _Id

    def to_chat(self) -> dict[str, Any]:
        """Return the message that begins with this call, without the call."""
        return {"role": "assistant", "content": ""}

    def to_call(self) -> dict[str, Any]:
        """Return the call in the form of a chat."""
        return {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}


class FunctionCallOutputItem(_Part):
    """What a call has returned."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: Text

    def to_chat(self) -> dict[str, Any]:
        """Return the output in the form of a chat: a message."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class ReasoningText(_Part):
    """A part of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Part):
    """Thoughts of an earlier answer, for chat templates that read them. Summaries and encrypted ones are left out."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None


Item = Annotated[MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem, Field(discriminator="type")]


def _items(value: Any) -> Any:
    """Return a text as the user's message, and items, of which a message need not say that it is one."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in value]


class ResponseTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="Tools that run at OpenAI are not here.")

    def to_chat(self) -> dict[str, Any]:
        """Return the function in the form of a chat."""
        names = ("name", "description", "parameters", "strict")
        return {"type": "function", "function": {name: getattr(self, name) for name in names}}


class ResponseToolChoice(_Part):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class TextFormat(_Part):
    """What the answer's text is."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, max_length=256)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="False: ignore keywords that cannot be followed.")

    def to_chat(self) -> dict[str, Any]:
        """Return the format in the form of a chat."""
        form: dict[str, Any] = {"type": self.type}
        if self.type == "json_schema" and self.schema_ is not None:
            form["json_schema"] = {"name": self.name, "schema": self.schema_, "strict": self.strict}
        return form


class TextConfig(_Part):
    """What the answer is like."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(default=None, description="Ask for others in the instructions.")


class Reasoning(_Part):
    """How the model thinks."""

    effort: str | None = Field(
        default=None, max_length=100, description="For chat templates that read reasoning_effort."
    )
    summary: str | None = Field(default=None, max_length=100, description="Thoughts come whole.")


class ResponseStreamOptions(_Part):
    """What a stream has beside the answer."""

    include_obfuscation: Literal[False] | None = None


class CreateResponseRequest(ApiRequest):
    """A conversation to answer. Nothing is stored."""

    unsupported_fields = (unsupported.RESPONSES,)

    input: Annotated[list[Item], BeforeValidator(_items, json_schema_input_type=str | list[Item])] = Field(
        min_length=1, max_length=_MAX_ITEMS, description="A text, or messages, calls, their outputs and thoughts."
    )
    instructions: str | None = Field(default=None, description="The system message.")
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_INT, description="Longest answer.")
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        default=None, description="0: greedy. Default 1."
    )
    top_p: Unit | None = Field(default=None, description="Nucleus sampling. Default 1.")
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="False: at most one call. Default true.")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(
        default=None, max_length=16, description="Thoughts come whole, and not encrypted."
    )
    metadata: dict[str, str] | None = Field(default=None, max_length=64, description="Comes back in the response.")
    stream: bool | None = Field(default=None, description="Server-sent events, the last of them response.completed.")
    stream_options: ResponseStreamOptions | None = None

    @model_validator(mode="after")
    def _require_message(self) -> Self:
        if all(isinstance(item, ReasoningItem) for item in self.input):
            raise ValueError("input: must hold a message, not only thoughts")
        return self

    def to_chat(self) -> CreateChatCompletionRequest:
        """Return the same request in the form of a chat; ApiError 400 if there is none."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "top_p", "stream")}
        fields |= {"messages": self._messages(), "parallel_tool_calls": self.parallel_tool_calls}
        fields["max_completion_tokens"] = self.max_output_tokens
        if self.tools:
            fields["tools"] = [tool.to_chat() for tool in self.tools]
        choice = self.tool_choice
        if isinstance(choice, ResponseToolChoice):
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = choice
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.to_chat()
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        return to_chat_request(fields)

    def _messages(self) -> list[dict[str, Any]]:
        """Return the messages of a chat: thoughts, a text and calls that follow each other are one answer."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        thoughts = ""
        for item in self.input:
            if isinstance(item, ReasoningItem):
                thoughts += "".join(part.text for part in item.content or ())
                continue
            goes_on = bool(messages) and messages[-1]["role"] == "assistant" and not thoughts
            if not (isinstance(item, FunctionCallItem) and goes_on):
                messages.append(item.to_chat())
            if thoughts and messages[-1]["role"] == "assistant":
                messages[-1]["reasoning_content"] = thoughts
            thoughts = ""
            if isinstance(item, FunctionCallItem):
                messages[-1].setdefault("tool_calls", []).append(item.to_call())
        return messages
