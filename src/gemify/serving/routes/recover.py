"""POST /v1/recover: what an embedding's KV remembers of its text (GEM, Appendix B)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gemify.engine.requests import Vectors
from gemify.serving.completion import Choice, usage
from gemify.serving.dispatch import Asking, while_there
from gemify.serving.protocol.requests import RecoverRequest
from gemify.serving.protocol.responses import Recovery
from gemify.serving.request_body import JsonRoute
from gemify.serving.state import house_of, key_of, note

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/recover", response_model=None, responses={200: {"model": Recovery}}, tags=["gemify"])
async def recover(wish: RecoverRequest, request: Request) -> Response:
    """Write a text back from its special tokens alone."""
    house = house_of(request)
    house.require_model(wish.model)
    ids = (await house.prompts.texts([wish.input]))[0]
    house.limits.require_tokens(key_of(request), len(ids))
    choice = Choice()
    with Asking() as asking:
        asking.start(partial(house.engine.recover, ids, max_tokens=wish.max_tokens))
        house.limits.add_tokens(key_of(request), len(ids))

        async def collect() -> None:
            async for _, event in asking.events():
                if not isinstance(event, Vectors):
                    choice.take(event)

        try:
            await while_there(request.receive, collect(), house.settings.timeout)
        finally:
            house.limits.add_tokens(key_of(request), choice.completion_tokens)
            note(request, prompt_tokens=len(ids), completion_tokens=choice.completion_tokens)
    said, back = await house.prompts.ids(wish.input), await house.prompts.ids(choice.text)
    return JSONResponse(
        {
            "object": "recovery",
            "model": house.model,
            "input": wish.input,
            "output": choice.text,
            "input_tokens": len(said),
            "output_tokens": len(back),
            "matching_tokens": await house.prompts.run(longest_common, said, back),
            "usage": usage(len(ids), 0, choice.completion_tokens),
        }
    )


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many items the longest common subsequence has: the table's rows as the bits of one number each."""
    where: dict[Hashable, int] = {}
    for at, item in enumerate(a):
        where[item] = where.get(item, 0) | 1 << at
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        matches = row & where.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()
