"""The generation scheduler: schedules prompts, prefills them, and decodes one token a step for every running sequence.

waiting requests --> schedule --> prefill --> running batch --> decode --> finished: leaves the batch
                        ^            |                              |
                        +--- prefix cache: KV of prompts and answers that have run

`EmbeddingScheduler` takes small batches of texts from the waiting requests in turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from gemify.engine.requests import (
    Done,
    EmbeddingOutput,
    EmbeddingRequest,
    GenerationRequest,
    PrefillOutput,
    PromptLogprobs,
)
from gemify.engine.running_batch import (
    GeneratedSequence,
    RunningBatch,
    prefill_batch,
    prefill_with_logits,
    supports_batched_prefill,
)
from gemify.engine.sampling import TokenBytes, TokenLogprob, token_logprob
from gemify.model.config import require_finite
from gemify.model.encode import encode_ids
from gemify.model.forward import length_groups, special_pass, text_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import CachedText, PrefixCache, empty_text, size_in_bytes
from gemify.model.prefill import Prefill

_MAX_SCORED_TOKENS = 512  # tokens of a prompt whose logits are in memory at a time


class GenerationScheduler:
    """Waiting requests and running sequences.

    Args:
        gem: the model.
        max_num_seqs: most sequences that run at a time.
        kv_cache_bytes: memory for the KV of running sequences.
        prefix_cache_bytes: memory for the prefix cache.
        max_num_batched_tokens: most prompt tokens that one step prefills.
    """

    def __init__(
        self,
        gem: GemModel,
        *,
        max_num_seqs: int,
        kv_cache_bytes: int,
        prefix_cache_bytes: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._gem, self._max_num_seqs, self._kv_cache_bytes = gem, max_num_seqs, kv_cache_bytes
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[GenerationRequest] = deque()
        self.running: list[GeneratedSequence] = []
        """The sequences of the batch's rows, in order."""
        self._batch = RunningBatch(gem.lm)
        self.prefix_cache = PrefixCache(gem.lm, prefix_cache_bytes)
        self._token_bytes = TokenBytes(gem.tokenizer)
        self._batched_prefill = supports_batched_prefill(gem.lm)
        self._kv_bytes_per_token = 0
        vocabulary = gem.lm.get_output_embeddings().out_features
        suppressed = [i for i in gem.config.special_ids if i < vocabulary]
        self._suppressed_ids = torch.tensor(suppressed, dtype=torch.long, device=gem.device)
        self._counts = dict.fromkeys(
            ("prompt_tokens", "cached_tokens", "generation_tokens", "finished_seqs", "cancelled", "failed"), 0
        )

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def requests(self) -> list[GenerationRequest]:
        """All requests that wait or run."""
        return [*self.waiting, *dict.fromkeys(sequence.request for sequence in self.running)]

    def counts(self) -> dict[str, int]:
        """Counters since the start, and the present size of batch and prefix cache."""
        now = {"num_running_seqs": len(self.running), "prefix_cache_bytes": self.prefix_cache.nbytes}
        return self._counts | now

    def kv_bytes_for(self, num_seqs: int, num_tokens: int) -> int:
        """Bytes of KV that sequences of so many tokens take; 0 until the first prompt has shown the size of a token."""
        return num_seqs * num_tokens * self._kv_bytes_per_token

    def step(self) -> None:
        """Prefill up to ``max_num_batched_tokens`` of waiting prompts, then decode one token for each sequence."""
        self._remove_cancelled()
        budget = self._max_num_batched_tokens
        while budget > 0 and self.waiting and self._can_allocate([self.waiting[0]]):
            # 1) Schedule: choose waiting prompts that fit into one pass and into memory.
            requests = self._schedule_prefill(budget)
            try:
                # 2) Prefill: run them; each complete prompt adds its sequences to the running batch.
                first = requests[0]
                if first.is_recovery:
                    budget -= self._prefill_recovery(first)
                elif first.sampling.prompt_logprobs is not None:
                    budget -= self._prefill_scored(first, first.sampling.prompt_logprobs, budget)
                else:
                    budget -= self._run_prefill(requests, budget)
            except Exception as error:
                for request in requests:
                    self._fail(request, error)
        if self.running:
            try:
                # 3) Sample the next token of every sequence.
                finished = self._sample()
                # 4) Finish: complete sequences leave the batch; their KV goes into the prefix cache.
                self._remove_finished(finished)
                # 5) Decode: run the new tokens, one row each.
                if self.running:
                    self._batch.step([sequence.ids[-1] for sequence in self.running])
            except Exception as error:
                for request in dict.fromkeys(sequence.request for sequence in self.running):
                    self._fail(request, error)
                self.running, self._batch = [], RunningBatch(self._gem.lm)

    def abort_all(self, error: Exception) -> None:
        """Drop all requests; each emits the error."""
        for request in self.requests():
            self._fail(request, error)
        self.running, self._batch = [], RunningBatch(self._gem.lm)

    # 1) Schedule

    def _can_allocate(self, requests: Sequence[GenerationRequest]) -> bool:
        """Whether rows and memory suffice for these requests beside the running ones. One request alone always may."""
        if not self.running and len(requests) == 1:
            return True
        num_seqs = len(self.running) + sum(request.n for request in requests)
        num_tokens = max(
            *(len(request.ids) + request.sampling.max_tokens for request in requests),
            *(self._batch.padded_length + s.request.sampling.max_tokens - len(s.ids) for s in self.running),
            0,
        )
        return num_seqs <= self._max_num_seqs and self.kv_bytes_for(num_seqs, num_tokens) <= self._kv_cache_bytes

    def _schedule_prefill(self, budget: int) -> list[GenerationRequest]:
        """Choose the prompts of the next pass: the first that waits, and those after it while the pass fits the budget.

        A prompt that could reuse the prefix of another one in the pass waits until that one has run.
        """
        chosen: list[GenerationRequest] = []
        longest = 0
        for request in self.waiting:
            longest = max(longest, len(request.ids) - request.num_prefilled)
            scored = request.sampling.prompt_logprobs is not None
            alone = request.is_recovery or scored or not self._batched_prefill
            alone = alone or longest * (len(chosen) + 1) > budget
            if chosen and (alone or not self._can_allocate([*chosen, request]) or self._must_wait(request, chosen)):
                break
            chosen.append(request)
            request.start()
            if alone:
                break
        return chosen

    def _must_wait(self, request: GenerationRequest, chosen: Sequence[GenerationRequest]) -> bool:
        if request.prefilled is not None:
            return False
        others = [other.ids for other in chosen if other.cache_salt == request.cache_salt]
        return self.prefix_cache.would_match_after(request.ids, others, request.cache_salt)

    # 2) Prefill

    def _run_prefill(self, requests: Sequence[GenerationRequest], budget: int) -> int:
        """Run the prompts, of a single one as much as the budget allows. Return the tokens of the pass with padding."""
        parts: list[tuple[int, ...]] = []
        prefixes: list[CachedText] = []
        for request in requests:
            if request.prefilled is None:
                request.prefilled = self.prefix_cache.match(request.ids, request.cache_salt)
                request.cached_tokens = request.num_prefilled
                self._counts["cached_tokens"] += request.cached_tokens
            prefixes.append(request.prefilled)
            parts.append(request.ids[request.num_prefilled : request.num_prefilled + budget])
        results = prefill_batch(self._gem.lm, prefixes, parts)
        for request, (text, logits_BV) in zip(requests, results, strict=True):
            request.prefilled = text
            if request.num_prefilled == len(request.ids):
                self._finish_prefill(request, text, logits_BV)
        self._counts["prompt_tokens"] += sum(map(len, parts))
        return len(parts) * max(map(len, parts))

    def _prefill_scored(self, request: GenerationRequest, count: int, budget: int) -> int:
        """Run as much of a prompt as the budget allows, all of it anew, and keep its tokens' log probabilities."""
        if request.prefilled is None:
            request.prefilled = empty_text(self._gem.lm)
        start = request.num_prefilled
        ids = request.ids[start : start + min(budget, _MAX_SCORED_TOKENS)]
        request.prefilled, logits_TV = prefill_with_logits(self._gem.lm, request.prefilled, ids)
        if not start:
            first = request.ids[0]
            request.prompt_logprobs.append(TokenLogprob(first, *self._token_bytes(first), math.nan))
        request.prompt_logprobs += [
            token_logprob(self._token_bytes, logits_V, token, count)
            for logits_V, token in zip(logits_TV, request.ids[start + 1 :], strict=False)
        ]
        self._counts["prompt_tokens"] += len(ids)
        if request.num_prefilled == len(request.ids):
            request.emit(PromptLogprobs(tuple(request.prompt_logprobs)))
            self._finish_prefill(request, request.prefilled, logits_TV[-1:])
        return len(ids)

    def _finish_prefill(self, request: GenerationRequest, text: CachedText, logits_BV: torch.Tensor) -> None:
        self.waiting.remove(request)
        if request.is_exact:
            self.prefix_cache.insert(request.ids, text, request.cache_salt)
        self._kv_bytes_per_token = size_in_bytes(text.cache) // len(request.ids)
        if request.embed_from is not None:
            ids_BT = torch.tensor([request.ids], device=self._gem.device)
            prefill = Prefill(text, ids_BT, logits_BV, single=True)
            request.emit(EmbeddingOutput(self._embed(prefill, request.embed_from)))
        self._add_sequences(request, text, logits_BV)
        request.prefilled = None
        if not request.n:
            request.emit(PrefillOutput(text, logits_BV))
            request.emit(Done())

    def _prefill_recovery(self, request: GenerationRequest) -> int:
        """Run a text and its special tokens, and let the sequence see the special tokens alone (GEM, Appendix B)."""
        lm, config, device = self._gem.lm, self._gem.config, self._gem.device
        ids_BT = torch.tensor([request.ids], dtype=torch.long, device=device).view(1, -1)
        text = text_pass(lm, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
        specials = special_pass(lm, text, config.special_ids, shared_position=config.shared_position, with_logits=True)
        self.waiting.popleft()
        self._counts["prompt_tokens"] += len(request.ids)
        assert specials.logits_BV is not None
        seen_BK = torch.ones(1, config.k, dtype=torch.bool, device=device)
        position = int(specials.next_position_B[0])
        self._add_sequences(request, CachedText(specials.cache, seen_BK), specials.logits_BV, position=position)
        return len(request.ids)

    def _add_sequences(
        self, request: GenerationRequest, text: CachedText, logits_BV: torch.Tensor, *, position: int | None = None
    ) -> None:
        for index in range(request.n):
            sequence = GeneratedSequence(self._gem, request, index, self._token_bytes)
            self._batch.add(text, logits_BV, position=position)
            self.running.append(sequence)

    def _embed(self, prefill: Prefill, start: int) -> np.ndarray:
        vectors_1D: np.ndarray = self._gem.embed(prefill, start=start).numpy()[None]  # of one string: [D]
        return vectors_1D

    # 3) Sample and finish

    def _sample(self) -> list[bool]:
        """Append a token to every sequence. Return which of them are over."""
        logits_BV = self._batch.logits_BV
        logits_BV.index_fill_(-1, self._suppressed_ids, -torch.inf)
        argmax_B = logits_BV.argmax(-1).tolist()
        over = [self._append_token(s, logits_BV[row], argmax_B[row]) for row, s in enumerate(self.running)]
        self._counts["generation_tokens"] += len(over)
        return over

    def _append_token(self, sequence: GeneratedSequence, logits_V: torch.Tensor, argmax_id: int) -> bool:
        """Append a token and return whether the sequence is over. An error ends this request alone."""
        try:
            return sequence.append_token(logits_V, argmax_id)
        except Exception as error:
            self._fail(sequence.request, error)
            return True

    def _remove_finished(self, over: Sequence[bool]) -> None:
        for row in reversed(range(len(over))):
            if over[row]:
                self._counts["finished_seqs"] += self.running[row].finished
                self._remove(row, keep_kv=self.running[row].finished)

    def _remove(self, row: int, *, keep_kv: bool = False) -> None:
        sequence = self.running[row]
        request = sequence.request
        if keep_kv and request.is_exact and not request.is_recovery:
            ids = request.ids + tuple(sequence.ids[:-1])
            self.prefix_cache.insert(ids, self._batch.copy_row(row), request.cache_salt)
        self._batch.remove(row)
        self.running[row] = self.running[-1]
        self.running.pop()

    def _remove_cancelled(self) -> None:
        for request in [request for request in self.requests() if request.cancelled]:
            self._counts["cancelled"] += not request.done
            request.emit(Done())
        for row in reversed(range(len(self.running))):
            if self.running[row].request.cancelled:
                self._remove(row)
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)

    def _fail(self, request: GenerationRequest, error: Exception) -> None:
        self._counts["failed"] += not request.done and not isinstance(error, ValueError)  # which is the client's fault
        if request in self.waiting:
            self.waiting.remove(request)
        request.fail(error)


_Scheduled = tuple[EmbeddingRequest, tuple[int, ...]]
"""A request and one of its texts."""


class EmbeddingScheduler:
    """Texts that wait to be embedded.

    Args:
        gem: the model.
        max_num_batched_tokens: most tokens that one step embeds.
    """

    def __init__(self, gem: GemModel, *, max_num_batched_tokens: int) -> None:
        self._gem, self._max_num_batched_tokens = gem, max_num_batched_tokens
        self.waiting: deque[EmbeddingRequest] = deque()
        self._counts = dict.fromkeys(("texts", "tokens", "cancelled", "failed"), 0)

    @property
    def busy(self) -> bool:
        """Whether a text waits."""
        return bool(self.waiting)

    def counts(self) -> dict[str, int]:
        """Counters since the start."""
        return dict(self._counts)

    def step(self) -> None:
        """Embed waiting texts of up to ``max_num_batched_tokens`` tokens, at least one text."""
        self._remove_cancelled()
        scheduled = self._schedule()
        lengths = [len(row) + self._gem.config.k for _, row in scheduled]
        for group in length_groups(lengths, max_tokens=self._max_num_batched_tokens):
            self._embed([scheduled[i] for i in group])

    def abort_all(self, error: Exception) -> None:
        """Drop all requests; each emits the error."""
        for request in list(self.waiting):
            self._fail(request, error)

    def _schedule(self) -> list[_Scheduled]:
        """Choose one text of each request in turn: a request of many texts does not hold up one of a single text."""
        scheduled: list[_Scheduled] = []
        num_tokens = 0
        while self.waiting:
            request = self.waiting.popleft()
            num_tokens += len(request.waiting[-1]) + self._gem.config.k
            if scheduled and num_tokens > self._max_num_batched_tokens:
                self.waiting.appendleft(request)
                break
            scheduled.append((request, request.waiting.pop()))
            if request.waiting:
                self.waiting.append(request)
        return scheduled

    def _embed(self, scheduled: list[_Scheduled]) -> None:
        try:
            rows = [row for _, row in scheduled]
            vectors = encode_ids(self._gem.lm, self._gem.config, rows, self._gem.projection)
            vectors_BD = require_finite(vectors.cpu()).numpy()
        except Exception as error:
            for request in dict.fromkeys(request for request, _ in scheduled):
                self._fail(request, error)
            return
        for (request, row), vector_D in zip(scheduled, vectors_BD, strict=True):
            request.set_embedding(row, vector_D)
            self._counts["texts"] += 1
            self._counts["tokens"] += len(row)

    def _remove_cancelled(self) -> None:
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            self._counts["cancelled"] += not request.done
            request.emit(Done())

    def _fail(self, request: EmbeddingRequest, error: Exception) -> None:
        self._counts["failed"] += not request.done
        if request in self.waiting:
            self.waiting.remove(request)
        request.fail(error)
