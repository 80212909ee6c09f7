"""POST /v1/recover: what an embedding's KV remembers of its text (GEM, Appendix B)."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.engine.requests import EmbeddingOutput
from gemify.model.prefill import common_subsequence_length
from gemify.serving.completion import ChoiceState, build_usage
from gemify.serving.dispatch import EngineClient, run_until_disconnect
from gemify.serving.protocol.requests import RecoverRequest
from gemify.serving.protocol.responses import RecoverResponse
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import add_log_fields, get_key_name, get_state

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/recover", response_model=None, responses={200: {"model": RecoverResponse}}, tags=["gemify"])
async def recover(body: RecoverRequest, request: Request) -> Response:
    """Generate a text from its special tokens alone."""
    state = get_state(request)
    state.require_model(body.model)
    ids = (await state.tokenizer.tokenize_texts([body.input]))[0]
    state.rate_limiter.check_tokens(get_key_name(request), len(ids))
    choice = ChoiceState()
    with EngineClient() as client:
        client.submit(partial(state.engine.recover, ids, max_tokens=body.max_tokens))
        state.rate_limiter.add_tokens(get_key_name(request), len(ids))

        async def collect() -> None:
            async for _, event in client.events():
                if not isinstance(event, EmbeddingOutput):
                    choice.add(event)

        try:
            await run_until_disconnect(request.receive, collect(), state.settings.timeout)
        finally:
            state.rate_limiter.add_tokens(get_key_name(request), choice.completion_tokens)
            add_log_fields(request, prompt_tokens=len(ids), completion_tokens=choice.completion_tokens)
    input_ids = await state.tokenizer.tokenize_plain(body.input)
    output_ids = await state.tokenizer.tokenize_plain(choice.text)
    return RecoverResponse(
        object="recovery",
        model=state.model,
        input=body.input,
        output=choice.text,
        input_tokens=len(input_ids),
        output_tokens=len(output_ids),
        matching_tokens=await state.tokenizer.run_in_thread(common_subsequence_length, input_ids, output_ids),
        usage=build_usage(len(ids), 0, choice.completion_tokens),
    ).to_response()
