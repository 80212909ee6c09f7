"""One model, both jobs at once: two threads that pass through the same weights, each with its half of the cores.

    asked for     prompts --> `Writing`: read together, then one token a step for every answer -------> Piece, Finished
                  texts ----> `Embedding`: small batches, a text of each request in turn -------------> Vectors

Neither kind of work waits for the other: long chats do not hold up embeddings, nor bulk embeddings chats. Two passes on
half of the cores each also get more done than one after the other on all of them, as a single token for some rows leaves
little to divide. A kind that is alone has all cores. Steps are short, so a cancelled request is gone by the next one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemify.engine.embedding import Embedding
from gemify.engine.requests import EmbeddingJob, Listener, QueueFull, WritingJob
from gemify.engine.sampling import Sampling
from gemify.engine.scheduler import Writing
from gemify.engine.worker import J, Worker, release_threads
from gemify.model.base import max_positions
from gemify.model.gem import GemModel
from gemify.model.rope_shift import has_dynamic_rope


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what is going on."""

    alive: bool = False
    rows: int = 0
    """Answers being written."""
    waiting_answers: int = 0
    waiting_texts: int = 0
    prompt_tokens: int = 0
    """Run; ``reused_tokens`` were not, as they had run before."""
    reused_tokens: int = 0
    generated_tokens: int = 0
    finished_answers: int = 0
    embedded_texts: int = 0
    embedded_tokens: int = 0
    cancelled: int = 0
    failed: int = 0
    prefix_bytes: int = 0
    write_seconds: float = 0.0
    embed_seconds: float = 0.0


class Engine:
    """The model at work for many askers.

    Args:
        max_rows: most answers written at a time.
        max_waiting: most texts and answers that wait; beyond it `QueueFull`. A request on an empty queue may be larger.
        prefix_bytes: memory for the KV of what has run before (`Prefixes`).
        kv_bytes: memory for the KV of the answers being written; a prompt waits until there is room. One answer alone is
            written whatever it takes.
        step_tokens: most tokens of prompts read, or of texts embedded, in a step. None: 512, 8,192 on an accelerator.
    """

    def __init__(
        self,
        gem: GemModel,
        *,
        max_rows: int = 16,
        max_waiting: int = 2048,
        prefix_bytes: int = 512 << 20,
        kv_bytes: int = 4 << 30,
        step_tokens: int | None = None,
    ) -> None:
        if max_rows < 1 or max_waiting < 1:
            raise ValueError(f"max_rows and max_waiting must be at least 1, got {max_rows} and {max_waiting}")
        gem.lm.eval()
        self.gem = gem
        self.limit: int | None = max_positions(gem.lm)
        """Most tokens of a prompt and its answer together."""
        self._vocabulary = gem.lm.get_input_embeddings().weight.shape[0]
        self._max_rows, self._max_waiting = max_rows, max_waiting
        step_tokens = step_tokens or (512 if gem.device.type == "cpu" else 8192)
        lock: contextlib.AbstractContextManager[object] = threading.RLock()
        beside = lock if has_dynamic_rope(gem.lm) else threading.RLock()
        cores = torch.get_num_threads()
        self._kv_bytes = kv_bytes
        self._answers = Writing(
            gem, max_rows=max_rows, kv_bytes=kv_bytes, prefix_bytes=prefix_bytes, step_tokens=step_tokens
        )
        self._writing = Worker(
            self._answers,
            "writing",
            lock=lock,
            threads=lambda: max(1, cores // 2) if self._embedding.busy else cores,
        )
        self._embedding = Worker(
            Embedding(gem, step_tokens=step_tokens),
            "embedding",
            lock=beside,
            threads=lambda: max(1, cores - cores // 2) if self._writing.busy else cores,
        )
        self._accepting = threading.Lock()

    # Asking

    def start(self) -> None:
        release_threads()  # those that loading the model has left
        self._writing.start()
        self._embedding.start()

    def stop(self, *, timeout: float | None = None) -> bool:
        """Take no more and finish what was accepted, for at most ``timeout`` seconds. Whether all was finished."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for worker in (self._writing, self._embedding):
            worker.refuse()
        done = True
        for worker in (self._writing, self._embedding):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done = worker.join(left) and done
        return done

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No step runs while this is open: the model is the caller's."""
        with self._writing.lock, self._embedding.lock:
            yield

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        listener: Listener,
        *,
        n: int = 1,
        embed_prompt: bool = False,
        scope: str = "",
    ) -> WritingJob:
        """Continue a prompt ``n`` times; with ``embed_prompt`` its embedding comes first, from the same run.

        Only requests of one ``scope`` share what has run before.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than the model's positions.
            QueueFull, Stopping: not now.
        """
        if not 1 <= n <= self._max_rows:
            raise ValueError(f"n must lie in 1..{self._max_rows}, got {n}: ask again for more answers")
        if embed_prompt:
            self.gem.require_embeddable_prefill()
            behind = len(self.gem.text_tokenizer.suffix_ids) + self.gem.config.k
            if self.limit is not None and len(ids) + behind > self.limit:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens and its embedding takes {behind} more, this model takes"
                    f" {self.limit} in all: shorten the prompt"
                )
        self._require_ids("the prompt", ids)
        if not ids:
            raise ValueError("the prompt has no tokens: say something")
        if unknown := [i for i in sampling.logit_bias if not 0 <= i < self._vocabulary]:
            raise ValueError(f"logit_bias must name tokens 0..{self._vocabulary - 1}, got {unknown[0]}")
        if self.limit is not None and len(ids) + sampling.max_tokens > self.limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the answer may have {sampling.max_tokens}, this model takes"
                f" {self.limit} in all: shorten the prompt or lower max_tokens"
            )
        columns = len(ids) + sampling.max_tokens
        if n > 1 and (needed := self._answers.bytes_for(n, columns)) > self._kv_bytes:
            raise ValueError(
                f"{n} answers of {columns} tokens with their prompt may need {needed:,} bytes of memory, this server gives"
                f" {self._kv_bytes:,}: ask for fewer, or lower max_tokens"
            )
        job = WritingJob(ids, sampling, listener, n=n, embed_prompt=embed_prompt, recovering=False, scope=scope)
        self._accept(self._writing, job)
        return job

    def embed(self, rows: Sequence[Sequence[int]], listener: Listener) -> EmbeddingJob:
        """Embed texts: ids of each, as `GemModel.text_tokenizer` gives them (head and template). Raises like `generate`."""
        if not rows:
            raise ValueError("no text given: give at least one")
        for at, ids in enumerate(rows):
            self._require_text(f"text {at}", ids)
        job = EmbeddingJob(rows, listener)
        self._accept(self._embedding, job)
        return job

    def recover(self, ids: Sequence[int], listener: Listener, *, max_tokens: int = 64) -> WritingJob:
        """Write a text from its special tokens' KV alone, greedily (GEM, Appendix B). Raises like `generate`."""
        if not self.gem.config.k:
            raise ValueError("this model has no special tokens: nothing remembers a text")
        self._require_text("the text", ids)
        if self.limit is not None and len(ids) + self.gem.config.k + max_tokens > self.limit:
            raise ValueError(
                f"the text has {len(ids)} tokens and what is remembered may have {max_tokens}, this model takes"
                f" {self.limit} in all: shorten the text or lower max_tokens"
            )
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        job = WritingJob(ids, sampling, listener, n=1, embed_prompt=False, recovering=True, scope="")
        self._accept(self._writing, job)
        return job

    def stats(self) -> EngineStats:
        """As of the last steps, and what was accepted since."""
        (writing, write_seconds), (embedding, embed_seconds) = self._writing.counts(), self._embedding.counts()
        return EngineStats(
            alive=self._writing.alive and self._embedding.alive,
            rows=writing["rows"],
            waiting_answers=self._writing.waiting,
            waiting_texts=self._embedding.waiting,
            prompt_tokens=writing["prompt_tokens"],
            reused_tokens=writing["reused_tokens"],
            generated_tokens=writing["generated_tokens"],
            finished_answers=writing["finished"],
            embedded_texts=embedding["texts"],
            embedded_tokens=embedding["tokens"],
            cancelled=writing["cancelled"] + embedding["cancelled"],
            failed=writing["failed"] + embedding["failed"],
            prefix_bytes=writing["prefix_bytes"],
            write_seconds=write_seconds,
            embed_seconds=embed_seconds,
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

    def _accept(self, worker: Worker[J], job: J) -> None:
        with self._accepting:
            waiting = self._writing.waiting + self._embedding.waiting
            if waiting and waiting + job.units > self._max_waiting:
                raise QueueFull(waiting, retry_after=self._seconds_for(waiting))
            worker.accept(job)

    def _seconds_for(self, units: int) -> float:
        """A guess from what is behind us, 1 to 60."""
        stats = self.stats()
        done, spent = stats.finished_answers + stats.embedded_texts, stats.write_seconds + stats.embed_seconds
        return min(60.0, max(1.0, round(units * spent / done))) if done else 1.0
