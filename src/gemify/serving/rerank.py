"""Scores of texts for a question, in the engine's batches: by vectors, or by the base model's odds of yes against no.

A question's prompts share their first tokens, which run once. A few prompts are in the engine at a time, so that chats
go on in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
from fastapi import Request

from gemify.engine.requests import PromptStart
from gemify.io.tables import first_line
from gemify.io.vectors import normalize
from gemify.retrieval.rerank import YesNoPrompts
from gemify.serving.dispatch import EngineClient, run_until_disconnect
from gemify.serving.embedding import embed
from gemify.serving.errors import bad_request
from gemify.serving.state import add_log_fields, get_key_name, get_state
from gemify.serving.tokenization import TextOptions

if TYPE_CHECKING:
    from gemify.engine.engine import Engine
    from gemify.model.chat_template import Ids

_MAX_IN_ENGINE = 8


async def score(
    request: Request, question: str, texts: Sequence[str], rerank: Literal["bi", "lm"]
) -> tuple[np.ndarray, int]:
    """Score texts for a question, as `gemify.retrieval.rerank` does. The request's key is charged.

    Args:
        request: the HTTP request; the work is given up if its client disconnects.
        question: the question.
        texts: they are cut if they are too long.
        rerank: how.

    Returns:
        Scores [N], higher is better, and the number of tokens that were run.

    Raises:
        ApiError: the model cannot score so, the question is too long, or a limit is reached.
    """
    if not texts:
        return np.empty(0), 0
    return await (_score_by_vectors if rerank == "bi" else _score_by_odds)(request, question, texts)


async def _score_by_vectors(request: Request, question: str, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    tokenizer = get_state(request).tokenizer
    rows: list[list[int]] = []
    for given, kind in (([question], "query"), (list(texts), "document")):
        options = TextOptions("end", prompt=tokenizer.prompt_of(None, kind))
        rows += (await tokenizer.tokenize_texts(given, options)).rows
    vectors_ND, num_tokens = await embed(request, rows)
    query_D, *documents_D = normalize(vectors_ND)
    return np.stack(documents_D) @ query_D, num_tokens


async def _score_by_odds(request: Request, question: str, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    state, key = get_state(request), get_key_name(request)
    if state.yes_no_prompts is None:
        raise bad_request("this model has no chat template, or no tokens for yes and no: rerank with bi", "rerank")
    try:
        laid_out = state.tokenizer.run_in_thread(state.yes_no_prompts, question, texts)
        prefix, rows = await run_until_disconnect(request.receive, laid_out, state.settings.timeout)
    except ValueError as error:
        raise bad_request(first_line(error), "query") from error
    num_tokens = len(prefix) + sum(len(row) - len(prefix) for row in rows)
    state.rate_limiter.check_tokens(key, num_tokens)
    state.rate_limiter.add_tokens(key, num_tokens)
    add_log_fields(request, prompt_tokens=num_tokens, texts=len(rows))
    with EngineClient() as client:
        work = _run(client, state.engine, state.yes_no_prompts, prefix, rows, key)
        return await run_until_disconnect(request.receive, work, state.settings.timeout), num_tokens


async def _run(
    client: EngineClient, engine: Engine, prompts: YesNoPrompts, prefix: Ids, rows: Sequence[Ids], key: str
) -> np.ndarray:
    """Run the prompts, the prefix first. Return the log odds [N]."""
    start: PromptStart | None = None
    if prefix:
        client.submit(partial(engine.prefill, prefix, cache_salt=key))
        async for _, output in client.prefills():
            # not exact, so that no passage takes a chat's place in the prefix cache
            start = PromptStart(output.text, cached_tokens=len(prefix), is_exact=False)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))  # neighbours share a pass
    waiting, first, scores_N = iter(order), len(client.requests), np.empty(len(rows))

    def submit(count: int) -> None:
        for at in islice(waiting, count):
            client.submit(partial(engine.prefill, rows[at], cache_salt=key, start=start))

    submit(_MAX_IN_ENGINE)
    async for number, output in client.prefills():
        scores_N[order[number - first]] = prompts.log_odds(output.logits_BV)[0]
        submit(1)
    return scores_N
