"""POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.model.answer_parser import MAX_BEGUN, has_begun_thoughts
from gemify.serving.answer_format import AnswerFormat
from gemify.serving.completion import CompletionHandler
from gemify.serving.dispatch import ThreadCalls, run_until_disconnect
from gemify.serving.errors import bad_request, from_engine_error, unsupported_parameter
from gemify.serving.protocol.requests import (
    ChatSearch,
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    GemifyOptions,
)
from gemify.serving.protocol.responses import CreateChatCompletionResponse, CreateCompletionResponse
from gemify.serving.protocol.structured_outputs import after_thoughts
from gemify.serving.protocol.tools import NamedToolChoice
from gemify.serving.rag import RagPrompt
from gemify.serving.request_body import JsonRoute
from gemify.serving.rerank import score
from gemify.serving.response_builder import AnswerBuilder
from gemify.serving.state import admit, get_key_name, get_state
from gemify.serving.tokenization import bind_template

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": CreateChatCompletionResponse, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_chat_completion(body: CreateChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation; with ``stream`` in server-sent events.

    ``gemify`` asks for the prompt's embedding from the same run, or for passages of the index to answer from.
    """
    admit(request, body)
    return await answer_chat(body, request)


async def answer_chat(
    body: CreateChatCompletionRequest,
    request: Request,
    *,
    make_builder: Callable[[int], AnswerBuilder] | None = None,
) -> Response:
    """Answer a conversation.

    Args:
        body: the request; other forms than OpenAI's are translated to it.
        request: the HTTP request.
        make_builder: makes what builds the response, given the prompt's length. None: it is in the form of a chat.

    Raises:
        ApiError: the request cannot be answered.
    """
    state = get_state(request)
    options = body.gemify or GemifyOptions()
    gemify_fields: dict[str, Any] = {}
    start, charged_tokens = None, 0
    if options.search is not None:
        prompt = await _prepare(body, options.search, request)
        ids, start, charged_tokens = prompt.ids, prompt.start, prompt.charged_tokens
        gemify_fields["sources"] = [p.to_json() for p in prompt.passages]
    else:
        ids = await state.tokenizer.tokenize_chat(body)
    form, has_tools = state.tokenizer.answer_format, bool(body.offered_tools)
    prompt_end = await state.tokenizer.detokenize(ids[-MAX_BEGUN:]) if has_tools or form.thinks else ""
    handler = CompletionHandler(
        request,
        body,
        "chat",
        [ids],
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        return_embedding=options.return_embedding,
        start=start,
        charged_tokens=charged_tokens,
        gemify_fields=gemify_fields,
        builder=None if make_builder is None else make_builder(len(ids)),
        grammar=_grammar(body, form, prompt_end),
        parser=partial(form.parser, prompt_end, has_tools=has_tools, must_call=bool(body.must_call)),
    )
    return await handler.respond()


def _grammar(body: CreateChatCompletionRequest, form: AnswerFormat, prompt: str) -> str | None:
    """Return the grammar of the answer to a prompt: of its calls, or of its text after its thoughts."""
    wanted = body.grammar()
    if not body.offered_tools:
        thinks = wanted is not None and form.thinks and has_begun_thoughts(prompt)
        return after_thoughts(wanted, form.control_tokens) if wanted is not None and thinks else wanted
    if wanted is not None:
        raise bad_request("response_format and tools go together only with tool_choice none", "response_format")
    if not body.must_call and not form.reads_tools:
        raise unsupported_parameter(
            "tool_choice", "this model's chat template reads no tools, so auto finds none: say required, or a name"
        )
    if not body.must_call and not form.follows_grammar:
        return None
    named = isinstance(body.tool_choice, NamedToolChoice)
    return form.tools.grammar(
        body.must_call or body.offered_tools,
        required=bool(body.must_call),
        parallel=body.parallel_tool_calls is not False and not named,
        control_tokens=form.control_tokens,
    )


async def _prepare(body: CreateChatCompletionRequest, search: ChatSearch, request: Request) -> RagPrompt:
    """Prepare the prompt of a question to the index, with the passages that are found."""
    state, key = get_state(request), get_key_name(request)
    store = state.require_store(search.store)
    if body.messages[-1].role != "user" or not body.messages[-1].content.strip():
        raise bad_request(
            "gemify.search looks for the last message, which must be the user's and not empty", "messages"
        )
    if body.continue_final_message or body.add_generation_prompt is False:
        raise bad_request("gemify.search answers in a new message: leave continue_final_message out", "messages")
    state.tokenizer.require_chat(body.messages)
    assert state.rag is not None

    def charge(tokens: int) -> None:
        state.rate_limiter.check_tokens(key, tokens)
        state.rate_limiter.add_tokens(key, tokens)

    with ThreadCalls() as calls:

        def score_passages(question: str, texts: Sequence[str]) -> np.ndarray:
            return calls.run(score, request, question, texts, search.rerank)[0]

        work = state.rag.prepare(
            [message.for_template() for message in body.messages],
            store,
            bind=lambda template: bind_template(template, body),
            k=search.k,
            mode=search.mode,
            where=search.filter,
            score=None if search.rerank == "none" else score_passages,
            max_tokens=body.max_completion_tokens or body.max_tokens or 1,
            tokenize_query=partial(calls.run, state.tokenizer.tokenize_query),
            charge=charge,
            cache_salt=key,
        )
        try:
            return await run_until_disconnect(request.receive, work, state.settings.timeout)
        except Exception as error:
            raise from_engine_error(error) from error


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": CreateCompletionResponse, "content": {"text/event-stream": {}}}},
    tags=["OpenAI"],
)
async def create_completion(body: CreateCompletionRequest, request: Request) -> Response:
    """Continue prompts as they are, several at a time if asked; with ``stream`` in server-sent events."""
    state = admit(request, body)
    limit = state.settings.max_prompts
    if len(body.prompt) > limit:
        raise bad_request(
            f"prompt must hold at most {limit} prompts, got {len(body.prompt)}: send several requests", "prompt"
        )
    rows = await state.tokenizer.tokenize_prompts(body.prompt)
    echoed = None
    if body.echo:
        echoed = [text if isinstance(text, str) else await state.tokenizer.detokenize(text) for text in body.prompt]
    handler = CompletionHandler(
        request, body, "completion", rows, top_logprobs=body.logprobs, echoed=echoed, grammar=body.grammar()
    )
    return await handler.respond()
