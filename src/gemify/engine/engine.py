"""The engine: one copy of the weights generates and embeds at once, in two threads that share the cores.

    prompts --> `GenerationScheduler`: prefill, then one token a step for every sequence --> TokenDelta, Completion
    texts ----> `EmbeddingScheduler`: small batches, a text of each request in turn -------> EmbeddingOutput

Neither kind of work waits for the other: long chats do not hold up embeddings, nor bulk embeddings chats. Two passes on
half of the cores each also get more done than one after the other on all of them, because a single token for some rows
leaves little to divide. A kind that is alone has all cores. Steps are short: a cancelled
request is gone by the next one.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemify.engine.grammar import GrammarCompiler
from gemify.engine.requests import EmbeddingRequest, GenerationRequest, Listener, PromptStart, QueueFullError
from gemify.engine.sampling import SamplingParams
from gemify.engine.scheduler import EmbeddingScheduler, GenerationScheduler
from gemify.engine.worker import RequestT, Worker, release_threads
from gemify.model.base import max_positions
from gemify.model.gem import GemModel
from gemify.model.prefill import find_eos_ids
from gemify.model.rope_shift import has_dynamic_rope


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the engine's present load."""

    alive: bool = False
    num_running_seqs: int = 0
    num_waiting_seqs: int = 0
    num_waiting_texts: int = 0
    prompt_tokens: int = 0
    """Prompt tokens that were run; those of ``cached_tokens`` were not."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    generation_tokens: int = 0
    finished_seqs: int = 0
    embedded_texts: int = 0
    embedded_tokens: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    prefix_cache_bytes: int = 0
    generation_seconds: float = 0.0
    embedding_seconds: float = 0.0


class Engine:
    """Generates and embeds for many clients at once.

    Args:
        gem: the model.
        max_num_seqs: most sequences that are generated at a time.
        max_queue_size: most texts and sequences that wait; beyond it `QueueFullError`. A request to an empty queue may
            be larger.
        prefix_cache_bytes: memory for the KV of prompts and answers that have run (`PrefixCache`).
        kv_cache_bytes: memory for the KV of running sequences; a prompt waits until it fits. A single sequence runs
            whatever it takes.
        max_num_batched_tokens: most tokens that one step prefills or embeds. None: 512 on a CPU, 8,192 on an
            accelerator.
    """

    def __init__(
        self,
        gem: GemModel,
        *,
        max_num_seqs: int = 16,
        max_queue_size: int = 2048,
        prefix_cache_bytes: int = 512 << 20,
        kv_cache_bytes: int = 4 << 30,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_queue_size < 1:
            raise ValueError(
                f"max_num_seqs and max_queue_size must be at least 1, got {max_num_seqs} and {max_queue_size}"
            )
        gem.lm.eval()
        self.gem = gem
        self.max_model_len: int | None = max_positions(gem.lm)
        """Most tokens of a prompt and its answer together; None: no limit is known."""
        self._vocabulary = gem.lm.get_input_embeddings().weight.shape[0]
        self._max_num_seqs, self._max_queue_size = max_num_seqs, max_queue_size
        self._kv_cache_bytes = kv_cache_bytes
        max_num_batched_tokens = max_num_batched_tokens or (512 if gem.device.type == "cpu" else 8192)
        lock: contextlib.AbstractContextManager[object] = threading.RLock()
        embedding_lock = lock if has_dynamic_rope(gem.lm) else threading.RLock()
        cores = torch.get_num_threads()
        self._scheduler = GenerationScheduler(
            gem,
            max_num_seqs=max_num_seqs,
            kv_cache_bytes=kv_cache_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.generation_worker = Worker(
            self._scheduler,
            "generation",
            lock=lock,
            num_threads=lambda: max(1, cores // 2) if self.embedding_worker.busy else cores,
        )
        self.embedding_worker = Worker(
            EmbeddingScheduler(gem, max_num_batched_tokens=max_num_batched_tokens),
            "embedding",
            lock=embedding_lock,
            num_threads=lambda: max(1, cores - cores // 2) if self.generation_worker.busy else cores,
        )
        self._accepting = threading.Lock()

    def start(self) -> None:
        """Start both threads."""
        release_threads()  # those that loading the model has left
        self.generation_worker.start()
        self.embedding_worker.start()

    def stop(self, *, timeout_s: float | None = None) -> bool:
        """Accept no more requests and finish the accepted ones.

        Args:
            timeout_s: seconds after which unfinished requests are aborted. None: wait for all.

        Returns:
            Whether all were finished.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        workers = (self.generation_worker, self.embedding_worker)
        for worker in workers:
            worker.stop_accepting()
        done = True
        for worker in workers:
            remaining_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            done = worker.join(remaining_s) and done
        return done

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run no step inside this context: the model is the caller's."""
        with self.generation_worker.lock, self.embedding_worker.lock:
            yield

    def generate(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        listener: Listener,
        *,
        n: int = 1,
        embed_prompt: bool = False,
        cache_salt: str = "",
        start: PromptStart | None = None,
    ) -> GenerationRequest:
        """Continue a prompt.

        Args:
            ids: the prompt's token ids.
            sampling: how tokens are chosen.
            listener: called with each event, in the engine's thread.
            n: how many sequences.
            embed_prompt: also emit the prompt's embedding, before any text, from the same prefill.
            cache_salt: only requests with equal salts share prefixes.
            start: the first tokens of the prompt, which have run already, less than all of them.

        Returns:
            The request, which can be cancelled.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than the model's positions.
            QueueFullError: too much is waiting.
            EngineStoppingError: no more requests are accepted.
        """
        if not 1 <= n <= self._max_num_seqs:
            raise ValueError(f"n must lie in 1..{self._max_num_seqs}, got {n}: ask again for more answers")
        self._require_prompt(ids, sampling.max_tokens, embedded=embed_prompt)
        if unknown := [i for i in sampling.logit_bias if not 0 <= i < self._vocabulary]:
            raise ValueError(f"logit_bias must name tokens 0..{self._vocabulary - 1}, got {unknown[0]}")
        self._require_ids("stop_token_ids", sampling.stop_token_ids)
        if sampling.prompt_logprobs is not None and start is not None:
            raise ValueError("prompt_logprobs are those of a whole prompt: leave out the start that has run")
        num_tokens = len(ids) + sampling.max_tokens
        if n > 1 and (needed := self._scheduler.kv_bytes_for(n, num_tokens)) > self._kv_cache_bytes:
            raise ValueError(
                f"{n} answers of {num_tokens} tokens with their prompt may need {needed:,} bytes of memory, this server"
                f" gives {self._kv_cache_bytes:,}: ask for fewer, or lower max_tokens"
            )
        request = GenerationRequest(
            ids,
            sampling,
            listener,
            n=n,
            embed_from=0 if embed_prompt else None,
            cache_salt=cache_salt,
            start=start,
        )
        self._add_request(self.generation_worker, request)
        return request

    def prefill(
        self,
        ids: Sequence[int],
        listener: Listener,
        *,
        embed_from: int | None = None,
        cache_salt: str = "",
        start: PromptStart | None = None,
    ) -> GenerationRequest:
        """Run a prompt that will be continued: its KV comes back in a `PrefillOutput`, for the ``start`` of `generate`.

        Args:
            ids: the prompt's token ids.
            listener: called with each event, in the engine's thread.
            embed_from: also emit the prompt's embedding; its special tokens see the positions from this one on.
            cache_salt: only requests with equal salts share prefixes.
            start: the first tokens of the prompt, which have run already, less than all of them.

        Returns:
            The request, which can be cancelled.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than the model's positions.
            QueueFullError: too much is waiting.
            EngineStoppingError: no more requests are accepted.
        """
        sampling = SamplingParams(max_tokens=1)
        self._require_prompt(ids, sampling.max_tokens, embedded=embed_from is not None)
        request = GenerationRequest(
            ids, sampling, listener, n=0, embed_from=embed_from, cache_salt=cache_salt, start=start
        )
        self._add_request(self.generation_worker, request)
        return request

    def embed(self, rows: Sequence[Sequence[int]], listener: Listener) -> EmbeddingRequest:
        """Embed texts. Raises like `generate`.

        Args:
            rows: token ids of each text, as `GemModel.text_tokenizer` gives them.
            listener: called with each event, in the engine's thread.

        Returns:
            The request, which can be cancelled.
        """
        if not rows:
            raise ValueError("no text given: give at least one")
        for at, ids in enumerate(rows):
            self._require_text(f"text {at}", ids)
        request = EmbeddingRequest(rows, listener)
        self._add_request(self.embedding_worker, request)
        return request

    def recover(self, ids: Sequence[int], listener: Listener, *, max_tokens: int = 64) -> GenerationRequest:
        """Generate a text from its special tokens' KV alone, greedily (GEM, Appendix B). Raises like `generate`.

        Args:
            ids: the text's token ids.
            listener: called with each event, in the engine's thread.
            max_tokens: most tokens that are generated.

        Returns:
            The request, which can be cancelled.
        """
        if not self.gem.config.embeds_from_cache:
            raise ValueError(
                "this model has no special tokens in a text's cache: nothing remembers a text, take a gated GEM such as"
                " starter-gated"
            )
        self._require_text("the text", ids)
        if self.max_model_len is not None and len(ids) + self.gem.config.k + max_tokens > self.max_model_len:
            raise ValueError(
                f"the text has {len(ids)} tokens and what is remembered may have {max_tokens}, this model takes"
                f" {self.max_model_len} in all: shorten the text or lower max_tokens"
            )
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = GenerationRequest(ids, sampling, listener, n=1, is_recovery=True)
        self._add_request(self.generation_worker, request)
        return request

    def grammar_compiler(self) -> GrammarCompiler:
        """Return a compiler of grammars for this model's tokens, with a copy of its tokenizer."""
        eos_ids = find_eos_ids(self.gem.lm, self.gem.tokenizer)
        vocab_size = self.gem.lm.get_output_embeddings().weight.shape[0]
        return GrammarCompiler(copy.deepcopy(self.gem.tokenizer), vocab_size=vocab_size, eos_ids=eos_ids)

    def stats(self) -> EngineStats:
        """Counters as of the last steps; the queue's size includes requests accepted since."""
        generation, generation_seconds = self.generation_worker.counts()
        embedding, embedding_seconds = self.embedding_worker.counts()
        cancelled = generation.pop("cancelled") + embedding["cancelled"]
        failed = generation.pop("failed") + embedding["failed"]
        return EngineStats(
            alive=self.generation_worker.alive and self.embedding_worker.alive,
            num_waiting_seqs=self.generation_worker.num_waiting,
            num_waiting_texts=self.embedding_worker.num_waiting,
            embedded_texts=embedding["texts"],
            embedded_tokens=embedding["tokens"],
            cancelled_requests=cancelled,
            failed_requests=failed,
            generation_seconds=generation_seconds,
            embedding_seconds=embedding_seconds,
            **generation,
        )

    def _require_prompt(self, ids: Sequence[int], max_tokens: int, *, embedded: bool) -> None:
        if embedded:
            self.gem.require_embeddable_prefill()
            extra = len(self.gem.text_tokenizer.suffix_ids) + self.gem.config.k
            if self.max_model_len is not None and len(ids) + extra > self.max_model_len:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens and its embedding takes {extra} more, this model takes"
                    f" {self.max_model_len} in all: shorten the prompt"
                )
        self._require_ids("the prompt", ids)
        if not ids:
            raise ValueError("the prompt has no tokens: say something")
        if self.max_model_len is not None and len(ids) + max_tokens > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the answer may have {max_tokens}, this model takes"
                f" {self.max_model_len} in all: shorten the prompt or lower max_tokens"
            )

    def _require_ids(self, what: str, ids: Sequence[int]) -> None:
        if any(not 0 <= i < self._vocabulary for i in ids):
            odd = next(i for i in ids if not 0 <= i < self._vocabulary)
            raise ValueError(f"{what} has the token id {odd}: this model's are 0..{self._vocabulary - 1}")

    def _require_text(self, what: str, ids: Sequence[int]) -> None:
        self._require_ids(what, ids)
        if len(ids) > self.gem.config.max_text_tokens:
            raise ValueError(
                f"{what} has {len(ids)} tokens, this model embeds up to {self.gem.config.max_text_tokens}: cut it up"
            )

    def _add_request(self, worker: Worker[RequestT], request: RequestT) -> None:
        with self._accepting:
            waiting = self.generation_worker.num_waiting + self.embedding_worker.num_waiting
            if waiting and waiting + request.num_items > self._max_queue_size:
                raise QueueFullError(waiting, retry_after=self._estimate_seconds(waiting))
            worker.add_request(request)

    def _estimate_seconds(self, num_items: int) -> float:
        """Estimate the time for so many texts and sequences from those that are done: 1 to 60 seconds."""
        stats = self.stats()
        done = stats.finished_seqs + stats.embedded_texts
        spent_s = stats.generation_seconds + stats.embedding_seconds
        return min(60.0, max(1.0, round(num_items * spent_s / done))) if done else 1.0
