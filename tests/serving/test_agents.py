"""Agents of other frameworks against the server: a call that the grammar forces, its result, and an answer in words.

The model is random: the grammar makes its calls valid, and the prompts that the server was sent show that the loop ran.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict
from test_tools import TEMPLATE, WEATHER, dense

import children
from running_server import Served, serving, tiny_gem

QUESTION = "What is the weather in Rome?"


class Arguments(BaseModel):
    """Arguments of the tool; a random model makes more of them where it may."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    with serving(tiny_gem(tmp_path_factory.mktemp("agents"), TEMPLATE)) as running:
        yield running


@pytest.fixture
def made() -> list[dict[str, Any]]:
    """The calls that an agent's tool has had."""
    return []


@pytest.fixture
def weather(made: list[dict[str, Any]]) -> Callable[[str, int], str]:
    def weather(city: str, days: int) -> str:
        """The weather in a city for some days."""
        made.append({"city": city, "days": days})
        return f"sunny in {city} </s>"

    return weather


def require_called(made: list[dict[str, Any]]) -> None:
    assert made
    for arguments in made:
        jsonschema.validate(arguments, WEATHER)


def test_a_langchain_agent_calls_a_tool_and_answers(served: Served, weather: Any, made: list[dict[str, Any]]) -> None:
    agents = pytest.importorskip("langchain.agents", reason="langchain is not installed")
    middleware = pytest.importorskip("langchain.agents.middleware")

    def call_first(request: Any) -> Any:
        choice = "none" if request.messages[-1].type == "tool" else "required"
        return request.override(tool_choice=choice, model_settings={"strict": True, "parallel_tool_calls": False})

    class CallFirst(middleware.AgentMiddleware):  # type: ignore[misc,name-defined]
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(call_first(request))

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return await handler(call_first(request))

    from langchain_core.tools import StructuredTool

    tools = [StructuredTool.from_function(weather, args_schema=Arguments)]
    agent = agents.create_agent(chat_openai(served), tools=tools, middleware=[CallFirst()])
    asked: Any = {"messages": [{"role": "user", "content": QUESTION}]}
    _, call, result, answer = agent.invoke(asked)["messages"]
    require_called(made)
    assert [c["args"] for c in call.tool_calls] == made
    assert (result.content, result.tool_call_id) == (f"sunny in {made[0]['city']} </s>", call.tool_calls[0]["id"])
    assert answer.content
    assert not answer.tool_calls
    shown = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": made[0]}}]},
        {"role": "tool", "content": result.content},
    ]
    ids = served.gem.tokenizer.apply_chat_template(
        shown, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert answer.usage_metadata["input_tokens"] == len(ids)
    streamed = [step for step in agent.stream(asked, stream_mode="updates") if "model" in step]
    assert [step["model"]["messages"][-1].content for step in streamed] == ["", answer.content]
    again = asyncio.run(agent.ainvoke(asked))["messages"]
    assert again[-1].content == answer.content


def test_a_langchain_agent_ends_with_a_structured_answer(served: Served) -> None:
    agents = pytest.importorskip("langchain.agents", reason="langchain is not installed")
    structured = pytest.importorskip("langchain.agents.structured_output")
    for strategy in (structured.ToolStrategy(Pet), structured.ProviderStrategy(Pet)):
        agent = agents.create_agent(chat_openai(served), tools=[], response_format=strategy)
        got = agent.invoke({"messages": [{"role": "user", "content": "Invent a pet."}]})
        assert isinstance(got["structured_response"], Pet)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchains_structured_output(served: Served, method: Any) -> None:
    model = chat_openai(served)
    assert isinstance(model.with_structured_output(Pet, method=method).invoke("Invent a pet."), Pet)
    bound = model.bind_tools([Pet], tool_choice="Pet").invoke("Invent a pet.")
    (call,) = bound.tool_calls
    Pet(**call["args"])
    streamed = None
    for chunk in model.bind_tools([Pet], tool_choice="Pet").stream("Invent a pet."):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]


def test_langchains_embeddings(served: Served) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="tiny", base_url=f"{served.url}/v1", api_key="any", check_embedding_ctx_length=False
    )
    expected = served.gem.encode(["a cat", "wörds 猫"], normalize_embeddings=True)
    for row, vector in zip(embeddings.embed_documents(["a cat", "wörds 猫"]), expected, strict=True):
        assert row == pytest.approx(vector.tolist(), abs=1e-5)


def chat_openai(served: Served) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    return langchain_openai.ChatOpenAI(
        model="tiny", base_url=f"{served.url}/v1", api_key="any", temperature=0, max_tokens=200, max_retries=0,
        logit_bias=dense(served),
    )  # fmt: skip


def openai_like(served: Served) -> Any:
    module = pytest.importorskip(
        "llama_index.llms.openai_like",
        reason="llama-index-llms-openai-like is not installed: `make setup` does, without its bound on openai",
    )
    return module.OpenAILike(
        model="tiny", api_base=f"{served.url}/v1", api_key="any", is_chat_model=True, is_function_calling_model=True,
        temperature=0, max_tokens=200, max_retries=0, context_window=1024,
        additional_kwargs={"logit_bias": dense(served)},
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [True, False])
def test_llama_indexs_function_agent(served: Served, weather: Any, made: list[dict[str, Any]], streaming: bool) -> None:
    llm = openai_like(served)
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool

    async def ask() -> Any:
        agent = FunctionAgent(
            tools=[FunctionTool.from_defaults(weather, fn_schema=Arguments)],
            llm=llm,
            system_prompt="Be brief.",
            streaming=streaming,
            initial_tool_choice="weather",
        )
        return await agent.run(QUESTION)

    got = asyncio.run(ask())
    require_called(made)
    assert [call.tool_kwargs for call in got.tool_calls] == made
    assert got.tool_calls[0].tool_output.content == f"sunny in {made[0]['city']} </s>"
    assert str(got)


def test_llama_indexs_structured_prediction(served: Served) -> None:
    llm = openai_like(served)
    from llama_index.core.prompts import PromptTemplate

    assert isinstance(llm.structured_predict(Pet, PromptTemplate("Invent a pet.")), Pet)


@pytest.fixture
def run_llm(served: Served, tmp_path: Path) -> Callable[..., str]:
    """The command `llm`, which knows the server as the model tiny."""
    pytest.importorskip("llm", reason="llm is not installed")
    facts = {"model_id": "tiny", "model_name": "tiny", "api_base": f"{served.url}/v1"}
    models = [facts | {"supports_tools": True, "supports_schema": True}]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    return partial(children.run_llm, tmp_path)


def test_the_command_llm(served: Served, run_llm: Callable[..., str]) -> None:
    greedy = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "8"]
    said: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = served.client().chat.completions.create(model="tiny", messages=said, temperature=0, max_tokens=8)
    assert (
        run_llm("prompt", *greedy, "-s", "Be brief.", QUESTION).strip()
        == (chat.choices[0].message.content or "").strip()
    )
    forced = ["-o", "temperature", "0", "-o", "logit_bias", json.dumps(dense(served))]
    schema = json.dumps(Pet.model_json_schema())
    Pet.model_validate_json(
        run_llm("prompt", "-m", "tiny", *forced, "--no-stream", "--schema", schema, "Invent a pet.")
    )


@pytest.mark.parametrize("form", [[], ["--responses"]], ids=["chat", "responses"])
def test_the_command_llm_at_an_endpoint(served: Served, run_llm: Callable[..., str], form: list[str]) -> None:
    pytest.importorskip("llm.default_plugins.openai_models")
    if "endpoint" not in run_llm("openai", "--help"):
        pytest.skip("this llm has no `llm openai endpoint`")
    endpoint = ["openai", "endpoint", f"{served.url}/v1", "-m", "tiny", *form]
    schema = json.dumps(Pet.model_json_schema())
    Pet.model_validate_json(run_llm(*endpoint, "--schema", schema, "Invent a pet."))
