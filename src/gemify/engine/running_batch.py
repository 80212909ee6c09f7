"""The running batch: every step gives each sequence its next token; sequences come and go between steps.

    position    0 ... T         a row's tokens stand at the right; what is left of them is padding, masked
    row 0       . . . a a a a
    row 1       . . . . . b b   position ids are counted for each row by itself, so a row may start anywhere:
    row 2       c c c c c c c   a text's special tokens alone (recovery) have the positions after the text

transformers' continuous batching was tried first (docs/log/). It was no faster than this on a CPU. It switches the
model to its own attention, under which nothing can be embedded beside it, and it has no seed for a single sequence.

Short prompts are prefilled in one pass, each after the prefix that has run already: a short prompt leaves most of a
machine idle, as a single token does.

    prefixes, padded         to run, padded
    . . a a a a a            . . . . b b        a row's tokens, in order, are its prompt: position ids are counted over
    . . . . . . .            c c c c c c        them alone, and its KV is cut out of the batch afterwards
    d d d d d d d            . . e e e e
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gemify.engine.requests import Completion, Done, GenerationRequest, TokenDelta
from gemify.engine.sampling import Sampler, TokenBytes, TokenLogprob, token_logprob
from gemify.model.forward import left_pad
from gemify.model.gem import GemModel
from gemify.model.kv_cache import (
    CachedText,
    RunningCache,
    cache_argument,
    fork,
    from_key_values,
    keeps_all_positions,
    key_values,
    new_cache,
    new_full_cache,
)
from gemify.model.prefill import Prefill, extend
from gemify.model.rope_shift import has_dynamic_rope
from gemify.model.streaming import IncrementalDetokenizer

_MIN_TRIM = 64  # positions of padding in all rows


class RunningBatch:
    """The KV cache and the next-token logits of all running sequences, one row each."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self._reset()

    def _reset(self) -> None:
        self._cache = RunningCache(self.lm)  # a new one: the memory of former rows is free
        self._lengths: list[int] = []
        self._positions: list[int] = []
        self.logits_BV = torch.empty(0, 0)
        """Logits of each row's next token."""

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def padded_length(self) -> int:
        """Positions of the cache, padding included."""
        return self._cache.length if self._lengths else 0

    def add(self, text: CachedText, logits_BV: Tensor, *, position: int | None = None) -> None:
        """Append a row that continues a text.

        Args:
            text: what has run, one row.
            logits_BV: logits of its next token, one row.
            position: position id of its next token; None: right after the text.
        """
        T = text.mask_BT.shape[1]
        self._cache.add_row(key_values(text.cache))
        self._lengths.append(T)
        self._positions.append(T if position is None else position)
        self.logits_BV = torch.cat([self.logits_BV, logits_BV]) if len(self) > 1 else logits_BV

    def remove(self, row: int) -> None:
        """Remove a row; the last row takes its number."""
        for listed in (self._lengths, self._positions):
            listed[row] = listed[-1]
            listed.pop()
        if not self._lengths:
            self._reset()
            return
        self._cache.remove_row(row)
        rows = list(range(len(self) + 1))
        rows[row] = rows[-1]
        self.logits_BV = self.logits_BV[rows[:-1]]
        if (spare := self.padded_length - max(self._lengths)) >= max(_MIN_TRIM, self.padded_length // 4):
            self._cache.trim_left(spare)

    def step(self, tokens: Sequence[int]) -> None:
        """Run one token for each row, and keep the logits of the next ones."""
        device = self.lm.device
        T = self.padded_length + 1
        tokens_B, positions_B, lengths_B = torch.tensor([tokens, self._positions, self._lengths]).to(device)
        out = self.lm(
            input_ids=tokens_B[:, None],
            attention_mask=(torch.arange(T, device=device) >= T - 1 - lengths_B[:, None]).long(),
            position_ids=positions_B[:, None],
            **cache_argument(self._cache),
            use_cache=True,
        )
        self._lengths = [n + 1 for n in self._lengths]
        self._positions = [p + 1 for p in self._positions]
        self.logits_BV = out.logits[:, -1]

    def copy_row(self, row: int) -> CachedText:
        """Copy all that a row has run."""
        length = self._lengths[row]
        cache = from_key_values(self.lm, self._cache.copy_row(row, length), into=new_full_cache(self.lm))
        return CachedText(cache, torch.ones(1, length, dtype=torch.bool, device=self.lm.device))


def supports_batched_prefill(lm: PreTrainedModel) -> bool:
    """Whether prompts of differing lengths can share a pass. Sliding windows would be measured over the padding."""
    return keeps_all_positions(new_cache(lm)) and not has_dynamic_rope(lm)


def prefill_batch(
    lm: PreTrainedModel, prefixes: Sequence[CachedText], rows: Sequence[Sequence[int]]
) -> list[tuple[CachedText, Tensor]]:
    """Run token ids after their prefixes, in one pass.

    Args:
        lm: the model.
        prefixes: for each prompt what has run, one row without padding, maybe empty.
        rows: for each prompt the token ids to run.

    Returns:
        For each prompt the text with its KV, and the logits [1, V] of its next token.
    """
    device = lm.device
    ids_BT, mask_BT = (t.to(device) for t in left_pad(rows))
    before = prefixes[0] if len(prefixes) == 1 else _stack(lm, prefixes)
    none_BT = torch.zeros_like(before.mask_BT, dtype=torch.long)
    handle = extend(lm, before, none_BT, ids_BT, mask_BT, single=False)
    if len(prefixes) == 1:
        return [(handle.text, handle.logits_BV)]
    return [(_cut_row(lm, handle, row), handle.logits_BV[row : row + 1]) for row in range(len(prefixes))]


def prefill_with_logits(lm: PreTrainedModel, prefix: CachedText, ids: Sequence[int]) -> tuple[CachedText, Tensor]:
    """Run token ids after a prefix. Return the text with its KV, and the logits [T, V] after each of the ids."""
    cache, start = fork(prefix.cache), prefix.mask_BT.shape[1]
    position_ids = torch.arange(start, start + len(ids), device=lm.device)[None]
    ids_1T = torch.tensor([ids], device=lm.device)
    mask_1T = torch.ones(1, start + len(ids), dtype=torch.bool, device=lm.device)
    passed = {"attention_mask": mask_1T.long(), "position_ids": position_ids, **cache_argument(cache)}
    out = lm(input_ids=ids_1T, use_cache=True, **passed)
    return CachedText(cache, mask_1T), out.logits[0]


def _stack(lm: PreTrainedModel, texts: Sequence[CachedText]) -> CachedText:
    """Stack texts of one row each into a batch, padded on the left."""
    lengths = [text.mask_BT.shape[1] for text in texts]
    T = max(lengths)
    mask_BT, cache = left_pad([[1] * n for n in lengths])[1].to(lm.device), new_full_cache(lm)
    if T:
        held = [key_values(text.cache) if n else None for text, n in zip(texts, lengths, strict=True)]
        like = next(pairs for pairs in held if pairs)
        layers = []
        for at, pair in enumerate(like):
            parts = ((pairs[at] if pairs else tuple(t[:, :, :0] for t in pair)) for pairs in held)
            padded = [tuple(F.pad(t, (0, 0, T - t.shape[2], 0)) for t in part) for part in parts]
            layers.append((torch.cat([k for k, _ in padded]), torch.cat([v for _, v in padded])))
        cache = from_key_values(lm, layers, into=cache)
    return CachedText(cache, mask_BT)


def _cut_row(lm: PreTrainedModel, handle: Prefill, row: int) -> CachedText:
    seen_T = handle.text.mask_BT[row].nonzero()[:, 0]  # once: every layer would wait for a GPU otherwise
    pairs = [(k[row : row + 1, :, seen_T], v[row : row + 1, :, seen_T]) for k, v in key_values(handle.text.cache)]
    mask_1T = torch.ones(1, len(seen_T), dtype=torch.bool, device=lm.device)
    return CachedText(from_key_values(lm, pairs, into=new_full_cache(lm)), mask_1T)


class GeneratedSequence:
    """Sequence number ``index`` of a request."""

    def __init__(self, gem: GemModel, request: GenerationRequest, index: int, token_bytes: TokenBytes) -> None:
        self.request, self.index = request, index
        self.finished = False
        params = request.sampling
        self._token_bytes = token_bytes
        self._new_text: list[str] = []
        self._pieces = IncrementalDetokenizer(
            gem,
            sink=self._new_text.append,
            stop=params.stop,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )
        if params.ignore_eos:
            self._pieces.eos_ids = set()
        self._pieces.eos_ids = self._pieces.eos_ids | set(params.stop_token_ids)
        self._sampler = Sampler(params, index=index, prompt_ids=request.ids, end_ids=self._pieces.eos_ids)

    @property
    def ids(self) -> list[int]:
        """Tokens generated so far."""
        return self._pieces.ids

    def append_token(self, logits_V: Tensor, argmax_id: int) -> bool:
        """Choose the next token and emit what it adds.

        Args:
            logits_V: the model's logits.
            argmax_id: the token with the largest logit.

        Returns:
            Whether it was the last token.
        """
        params = self.request.sampling
        token = argmax_id if params.is_greedy else self._sampler.sample(logits_V)
        is_end = token in self._pieces.eos_ids
        if token in params.stop_token_ids or (is_end and not params.skip_special_tokens):
            self._pieces.finish()
            self.ids.append(token)  # its text is none of the answer's
            finished = True
        else:
            stopped = self._pieces.append([token])
            finished = stopped or self._sampler.done or is_end
            finished = finished or len(self.ids) >= params.max_tokens
            if finished:
                self._pieces.finish()
        text, self._new_text[:] = "".join(self._new_text), []
        tokens: tuple[TokenLogprob, ...] = ()
        if params.top_logprobs is not None:
            tokens = (token_logprob(self._token_bytes, logits_V, token, params.top_logprobs),)
        if text or tokens:
            self.request.emit(TokenDelta(self.index, text, tokens))
        if finished:
            reason = "stop" if self._sampler.done else self._pieces.finish_reason
            self.request.emit(Completion(self.index, reason, len(self.ids), self._pieces.stop_string))
            self.request.num_unfinished -= 1
            if not self.request.num_unfinished:
                self.request.emit(Done())
            self.finished = True
        return finished
