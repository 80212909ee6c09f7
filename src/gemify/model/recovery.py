"""Recovery: decoding a text from the KV cache of its special tokens alone (GEM, Appendix B)."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemify.model.forward import Specials
from gemify.model.kv_cache import cache_argument, fork


def find_eos_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: the tokenizer's and the generation configuration's."""
    ends = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    return {e for e in [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])] if e is not None}


@torch.no_grad()
def greedy_from_specials(
    lm: PreTrainedModel,
    specials: Specials,
    *,
    eos_ids: Collection[int],
    suppressed_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Decode greedily after the special tokens.

    transformers' own `generate` starts a row at position 0 and cannot be told that these few cached positions stand at
    the end of a text, hence this loop.

    Args:
        lm: The model.
        specials: The special tokens, from a pass with logits.
        eos_ids: Ids that end a row.
        suppressed_ids: Ids that are never emitted.
        max_new_tokens: Most tokens of a row.

    Returns:
        Token ids of each row, up to its end token.
    """
    assert specials.logits_BV is not None
    logits_BV, cache, position_B = specials.logits_BV, fork(specials.cache), specials.next_position_B
    rows: list[list[int]] = [[] for _ in range(logits_BV.shape[0])]
    done = [False] * len(rows)
    blocked = [i for i in suppressed_ids if i < logits_BV.shape[1]]
    for _ in range(max_new_tokens):
        next_B = logits_BV.index_fill(
            1, torch.tensor(blocked, device=logits_BV.device, dtype=torch.long), -torch.inf
        ).argmax(-1)
        for row, token in enumerate(next_B.tolist()):
            done[row] = done[row] or token in eos_ids
            if not done[row]:
                rows[row].append(token)
        if all(done):
            break
        seen_BT = torch.ones(len(rows), cache.get_seq_length() + 1, dtype=torch.long, device=next_B.device)
        logits_BV = lm(
            input_ids=next_B[:, None],
            attention_mask=seen_BT,
            position_ids=position_B[:, None],
            **cache_argument(cache),
            use_cache=True,
        ).logits[:, -1]
        position_B = position_B + 1
    return rows


def common_subsequence_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of two sequences.

    One integer holds a row of the usual table, a bit for each item of ``a`` (Hyyrö, 2004).
    """
    positions: dict[Hashable, int] = {}
    for at, item in enumerate(a):
        positions[item] = positions.get(item, 0) | 1 << at
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        matches = row & positions.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()
