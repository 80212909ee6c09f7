"""Log-likelihoods for lm-eval with every token computed once.

A few-shot benchmark asks the same beginning again and again: five solved questions before each of a subject's hundred,
one context before each of four endings. lm-eval runs each request whole, with the LM head on every position. Here the
beginning that all requests share runs once, each distinct context once on its KV, each continuation on its context's
KV, and the head only where a continuation is scored::

    header | context A | ending 1          header: once a task
                       | ending 2          contexts: once each, padded on the left
           | context B | ending 1          endings: on a copy of their context's KV, padded on the right

The figures are lm-eval's own to rounding. Models that measure distances in columns (sliding windows) share no header:
padding would stand between it and the context. Through lm-eval's own code go requests longer than the model's context,
which it cuts, and models with recurrent layers, whose state has no columns to go on from.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from gemify.model.attention import require_maskable
from gemify.model.forward import left_pad, length_groups, positions_of, right_pad
from gemify.model.kv_cache import cache_argument, common_prefix_length, new_cache, select

Request = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]
_LOGITS = 2**27  # most logits of one pass: half a GB in float32


@dataclass(frozen=True)
class _Context:
    """A distinct context (after the header) and the continuations asked of it, as (request, ids)."""

    ids: list[int]
    asked: list[tuple[int, list[int]]]


def share_prefixes(harness: Any, *, max_tokens: int = 8192) -> Any:
    """Make an lm-eval ``HFLM`` compute log-likelihoods this way, if its model can. Returns it."""
    try:
        require_maskable(harness.model)
    except ValueError:  # recurrent layers
        return harness
    own = harness._loglikelihood_tokens

    def loglikelihood_tokens(
        requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        room = harness.max_length + 1
        long = [at for at, (_, context, ending) in enumerate(requests) if len(context) + len(ending) > room]
        short = sorted(set(range(len(requests))) - set(long))
        answers: dict[int, Answer] = {}
        if long:
            answers.update(zip(long, own([requests[i] for i in long], disable_tqdm=True), strict=True))
        chosen = [(requests[i][1], requests[i][2]) for i in short]
        scored = score(harness.model, chosen, max_tokens=max_tokens)
        answers.update(zip(short, scored, strict=True))
        return [answers[at] for at in range(len(requests))]

    harness._loglikelihood_tokens = loglikelihood_tokens
    return harness


@torch.inference_mode()
def score(lm: Any, requests: Sequence[tuple[list[int], list[int]]], *, max_tokens: int = 8192) -> list[Answer]:
    """Score each (context ids, continuation ids): the log-probability, and whether greedy decoding gives it.

    ``max_tokens``: most columns, cached ones included, of one forward pass.
    """
    if empty := [at for at, (context, ending) in enumerate(requests) if not context or not ending]:
        raise ValueError(f"request {empty[0]} has an empty context or continuation: nothing to score it from")
    header = 0 if _counts_columns(lm) else _shared_length([context for context, _ in requests])
    contexts: dict[tuple[int, ...], _Context] = {}
    for at, (context, ending) in enumerate(requests):
        key = tuple(context[header:])
        contexts.setdefault(key, _Context(list(key), [])).asked.append((at, ending))
    cache = None
    if header:
        cache = new_cache(lm)
        ids = torch.tensor([requests[0][0][:header]], device=lm.device)
        lm.get_decoder()(input_ids=ids, **cache_argument(cache), use_cache=True)
    answers: dict[int, Answer] = {}
    waiting = list(contexts.values())
    for group in length_groups([header + len(c.ids) for c in waiting], max_tokens=max_tokens):
        _score_group(lm, [waiting[i] for i in group], header, cache, answers, max_tokens)
    return [answers[at] for at in range(len(requests))]


def _score_group(
    lm: Any,
    contexts: list[_Context],
    header: int,
    cache: DynamicCache | None,
    answers: dict[int, Answer],
    max_tokens: int,
) -> None:
    """Contexts of like length: one pass for them, then passes for what follows them."""
    ids_BT, mask_BT = (t.to(lm.device) for t in left_pad([c.ids for c in contexts]))
    seen_BT = torch.cat([mask_BT.new_ones(len(contexts), header), mask_BT], dim=1)
    endings = [(row, at, ending) for row, c in enumerate(contexts) for at, ending in c.asked]
    longer = [e for e in endings if len(e[2]) > 1]
    past = select(cache, [0] * len(contexts)) if cache is not None else (new_cache(lm) if longer else None)
    first_BV = lm(
        input_ids=ids_BT,
        attention_mask=seen_BT.long(),
        position_ids=header + positions_of(mask_BT),
        **cache_argument(past),
        use_cache=past is not None,
        logits_to_keep=1,
    ).logits[:, -1]
    first_BV = first_BV.float().log_softmax(-1)
    best_B = first_BV.argmax(-1)
    for row, at, ending in endings:
        answers[at] = (float(first_BV[row, ending[0]]), int(best_B[row]) == ending[0])
    if not longer:
        return
    assert past is not None
    width = seen_BT.shape[1]
    rows_at_once = max(1, _LOGITS // (first_BV.shape[1] * max(len(e[2]) for e in longer)))
    groups = length_groups([width + len(e[2]) for e in longer], max_tokens=max_tokens, pass_overhead_tokens=max_tokens)
    parts = [g[i : i + rows_at_once] for g in groups for i in range(0, len(g), rows_at_once)]
    for part in parts:
        some = [longer[i] for i in part]
        rows = torch.tensor([row for row, _, _ in some], device=lm.device)
        inputs_BT, real_BT = (t.to(lm.device) for t in right_pad([ending[:-1] for _, _, ending in some]))
        targets_BT, _ = right_pad([ending[1:] for _, _, ending in some])
        targets_BT = targets_BT.to(lm.device)
        start_B1 = seen_BT[rows].sum(-1, keepdim=True)
        logits_BTV = lm(
            input_ids=inputs_BT,
            attention_mask=torch.cat([seen_BT[rows], real_BT], dim=1).long(),
            position_ids=start_B1 + positions_of(real_BT),  # padding's too must be positions that the model has
            **cache_argument(select(past, rows)),
            use_cache=True,
        ).logits.float()
        picked_BT = logits_BTV.log_softmax(-1).gather(2, targets_BT[..., None])[..., 0]
        greedy_B = ((logits_BTV.argmax(-1) == targets_BT) | ~real_BT).all(-1).tolist()
        total_B = picked_BT.masked_fill(~real_BT, 0.0).sum(-1).tolist()
        for (_, at, _), total, greedy in zip(some, total_B, greedy_B, strict=True):
            answers[at] = (answers[at][0] + total, answers[at][1] and greedy)


def _shared_length(contexts: list[list[int]]) -> int:
    """Tokens that all contexts begin with, less one: every context keeps at least a token of its own."""
    if len(contexts) < 2:
        return 0
    common = common_prefix_length(min(contexts), max(contexts))  # in lexical order all others lie between these two
    return min(common, min(len(c) for c in contexts) - 1)


def _counts_columns(lm: Any) -> bool:
    """Whether a gap of padding would change distances: in a window, or without position ids to tell them (MPT)."""
    if "position_ids" not in inspect.signature(lm.forward).parameters:
        return True
    config = lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    return bool(getattr(config, "sliding_window", None)) or any(kind != "full_attention" for kind in kinds)
