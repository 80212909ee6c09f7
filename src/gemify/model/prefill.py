"""One prefill for embedding and generation: the only file that knows how transformers' `generate` starts.

`generate` runs the prompt once (`_prefill`) and decodes from the result. A `Prefill` is a prompt that has run already:
inside `use_prefill`, `_prefill` returns a fork of its cache and its last logits. So the continuation goes through
transformers' own code (sampling, stopping, streaming) and equals a plain `generate` to the last bit.

Recovery decodes a text from the KV cache of its special tokens alone (GEM, Appendix B).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemify.model.forward import Specials, positions_of, special_pass, text_and_special_pass
from gemify.model.kv_cache import (
    CachedText,
    RunningCache,
    cache_argument,
    fork,
    keeps_all_positions,
    new_cache,
    select,
    size_in_bytes,
)


@dataclass(frozen=True)
class Prefill:
    """A batch of texts that has run once. `GemModel.embed`, `generate` and `recover` continue from it."""

    text: CachedText
    """The KV cache, and where its rows hold text."""
    ids_BT: Tensor
    """Token ids [B, T], padded on the left."""
    logits_BV: Tensor
    """Next-token logits after each text, [B, V]."""
    single: bool
    """Whether one string was given: results then have no batch dimension."""

    @property
    def nbytes(self) -> int:
        """Memory of the KV cache, in bytes."""
        return size_in_bytes(self.text.cache)


_current: ContextVar[Prefill | None] = ContextVar("gemify_prefill", default=None)


def run_prefill(lm: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, *, single: bool) -> Prefill:
    """Run left-padded prompts [B, T] as `generate` would, and keep the cache and the last logits."""
    none = ids_BT[:, :0]
    return extend(lm, CachedText(new_cache(lm), mask_BT[:, :0]), none, ids_BT, mask_BT, single=single)


@torch.no_grad()
def extend(
    lm: PreTrainedModel, text: CachedText, before_BT: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, single: bool
) -> Prefill:
    """Run more tokens after texts that have run.

    Args:
        lm: The model.
        text: The texts that have run; their cache is not changed.
        before_BT: The ids of ``text``.
        ids_BT: The new ids, padded on the left.
        mask_BT: False at padding of the new ids.
        single: Whether the caller gave one string.

    Returns:
        A prefill of both together.
    """
    cache = fork(text.cache)
    whole_BT = torch.cat([text.mask_BT, mask_BT], dim=1)
    out = lm(
        input_ids=ids_BT,
        attention_mask=whole_BT.long(),
        position_ids=positions_of(whole_BT)[:, -ids_BT.shape[1] :],
        **cache_argument(cache),
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefill(CachedText(cache, whole_BT), torch.cat([before_BT, ids_BT], dim=1), out.logits[:, -1], single)


def append_tokens(lm: PreTrainedModel, text: CachedText, suffix_ids: Sequence[int]) -> CachedText:
    """Run the same tokens after each of the texts, whose cache is not changed."""
    if not suffix_ids:
        return text
    ids_BT = torch.tensor([list(suffix_ids)] * text.mask_BT.shape[0], device=text.mask_BT.device)
    return extend(lm, text, ids_BT[:, :0], ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), single=False).text


@torch.no_grad()
def embed(
    lm: PreTrainedModel,
    prefill: Prefill,
    special_ids: Sequence[int],
    *,
    shared_position: bool,
    start: int = 0,
    suffix_ids: Sequence[int] = (),
) -> Tensor:
    """Run the special tokens on a prefill's cache, which is not changed.

    Args:
        lm: The model.
        prefill: The texts.
        special_ids: Ids of the special tokens.
        shared_position: Give all special tokens the same position id.
        start: The first position they see.
        suffix_ids: The template's words between the text and them.

    Returns:
        Their last hidden states, [B, K, D].

    Raises:
        ValueError: ``start`` is no position of the prefill.
    """
    text, length = prefill.text, prefill.ids_BT.shape[1]
    if not 0 <= start < max(length, 1):
        raise ValueError(f"start must be a position of the prefill, 0..{length - 1}, got {start}")
    if suffix_ids and special_ids and keeps_all_positions(text.cache):
        none, shared = (prefill.ids_BT[:, :0], text.mask_BT[:, :0]), shared_position
        return text_and_special_pass(
            lm, text, *none, special_ids, start=start, shared_position=shared, suffix_ids=suffix_ids
        )[1]
    text = append_tokens(lm, text, suffix_ids)
    seen_BT = (torch.arange(text.mask_BT.shape[1], device=text.mask_BT.device) >= start)[None] if start else None
    hidden_BKD = special_pass(lm, text, special_ids, shared_position=shared_position, seen_BT=seen_BT).hidden_BKD
    assert hidden_BKD is not None
    return hidden_BKD


@torch.no_grad()
def generate_ids(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefill: Prefill | None,
    ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    suppressed_ids: Sequence[int],
    **options: Any,
) -> Any:
    """Call transformers' `generate` for left-padded prompts.

    Args:
        lm: The model.
        tokenizer: Its tokenizer, for stop strings and end tokens.
        prefill: A run of the same prompts, to continue from. None: they run here.
        ids_BT: The prompts' ids.
        mask_BT: False at padding.
        suppressed_ids: Ids that are never emitted: the special tokens'.
        options: Those of transformers' `generate`.

    Returns:
        What `generate` returns.
    """
    vocab_size = lm.get_output_embeddings().out_features
    if suppressed := [i for i in suppressed_ids if i < vocab_size]:
        processors = [_Suppress(suppressed), *(options.pop("logits_processor", None) or ())]
        options["logits_processor"] = LogitsProcessorList(processors)
    if "stop_strings" in options:
        options.setdefault("tokenizer", tokenizer)
    if (config := lm.generation_config).pad_token_id is None:
        ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        options.setdefault("pad_token_id", ends[0] if isinstance(ends, list) else ends)
    with use_prefill(lm, prefill) if prefill is not None else contextlib.nullcontext():
        return lm.generate(input_ids=ids_BT, attention_mask=mask_BT.long(), **options)


class _Suppress(LogitsProcessor):
    """Emits some tokens never.

    transformers' own `SuppressTokensLogitsProcessor` compares the whole vocabulary with its list at each step, which
    takes 1 to 2 ms on a CPU.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = torch.tensor(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._ids = self._ids.to(scores.device)  # once: a copy to a GPU waits for it
        return scores.index_fill(-1, self._ids, -torch.inf)


@contextlib.contextmanager
def use_prefill(lm: PreTrainedModel, prefill: Prefill) -> Iterator[None]:
    """Let `lm.generate` start from ``prefill`` instead of running the prompt, inside this context."""
    _install(lm)
    token = _current.set(prefill)
    try:
        yield
    finally:
        _current.reset(token)


def _install(lm: PreTrainedModel) -> None:
    original = lm._prefill
    if getattr(original, "gemify", False):
        return

    def start(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefill = _current.get()
        if prefill is None:
            return original(input_ids, *args, **kwargs)
        logits_BV, cache = prefill.logits_BV, prefill.text.cache
        if input_ids.shape[0] == prefill.ids_BT.shape[0]:
            grown = RunningCache.continuing(lm, cache) if keeps_all_positions(cache) else fork(cache)
            return CausalLMOutputWithPast(logits=logits_BV[:, None], **cache_argument(grown))
        # beams, or several answers a prompt: transformers has repeated each row
        rows = torch.arange(prefill.ids_BT.shape[0]).repeat_interleave(input_ids.shape[0] // prefill.ids_BT.shape[0])
        return CausalLMOutputWithPast(
            logits=logits_BV[rows.to(logits_BV.device), None], **cache_argument(select(cache, rows))
        )

    start.gemify = True  # type: ignore[attr-defined]
    lm._prefill = start


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
    blocked_N = torch.tensor(blocked, device=logits_BV.device, dtype=torch.long)
    for _ in range(max_new_tokens):
        next_B = logits_BV.index_fill(1, blocked_N, -torch.inf).argmax(-1)
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
