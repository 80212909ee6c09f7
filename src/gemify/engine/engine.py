"""One model, both jobs at once: the thread that owns the computing, and shares it between writing and embedding.

    asked for     prompts --> `Writing`: read a part a step, then one token a step for every answer --> Piece, Finished
                  texts ----> `Embedding`: small batches, a text of each request in turn -------------> Vectors

Each step belongs to the kind of work that has had less time so far: long chats do not hold up embeddings, nor bulk
embeddings chats. A step is short, so what is asked for next never waits long, and a cancelled request is gone by the
next one. Every step is a `turn` of the model's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gemify.engine.embedding import Embedding
from gemify.engine.jobs import EmbeddingJob, Job, Listener, QueueFull, Stopping, WritingJob
from gemify.engine.sampling import Sampling
from gemify.engine.writing import Writing
from gemify.model.gem import GemModel
from gemify.model.turn import turn

logger = logging.getLogger(__name__)


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
        kv_bytes: memory for the KV of the answers being written; a prompt waits until there is room.
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
        self.limit: int | None = getattr(gem.lm.config.get_text_config(), "max_position_embeddings", None)
        """Most tokens of a prompt and its answer together."""
        self._vocabulary = gem.lm.get_input_embeddings().weight.shape[0]
        self._max_rows, self._max_waiting = max_rows, max_waiting
        step_tokens = step_tokens or (512 if gem.device.type == "cpu" else 8192)
        self._writing = Writing(
            gem, max_rows=max_rows, kv_bytes=kv_bytes, prefix_bytes=prefix_bytes, step_tokens=step_tokens
        )
        self._embedding = Embedding(gem, step_tokens=step_tokens)
        self._change = threading.Condition()
        self._new: list[Job] = []  # accepted, not yet seen by the thread
        self._stats = EngineStats()
        self._seconds = {"write": 0.0, "embed": 0.0}
        self._share = {"write": 0.0, "embed": 0.0}  # seconds, without those of times when the other had nothing to do
        self._stopping = self._dropping = False
        self._thread = threading.Thread(target=self._run, name="gemify-engine")

    # Asking

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, timeout: float | None = None) -> bool:
        """Take no more and finish what was accepted, for at most ``timeout`` seconds. Whether all was finished."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread.ident is None:  # never started
            return True
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        self._dropping = True
        self._thread.join()
        return finished

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
        if embed_prompt and not self.gem.config.k:
            raise ValueError("this model has no special tokens, so a prompt's cache has no embedding: embed the text")
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
        job = WritingJob(ids, sampling, listener, n=n, embed_prompt=embed_prompt, recovering=False, scope=scope)
        self._accept(job)
        return job

    def embed(self, rows: Sequence[Sequence[int]], listener: Listener) -> EmbeddingJob:
        """Embed texts: ids of each, the tokenizer's head included, the special tokens not. Raises like `generate`."""
        if not rows:
            raise ValueError("no text given: give at least one")
        for at, ids in enumerate(rows):
            self._require_text(f"text {at}", ids)
        job = EmbeddingJob(rows, listener)
        self._accept(job)
        return job

    def recover(self, ids: Sequence[int], listener: Listener, *, max_tokens: int = 64) -> WritingJob:
        """Write a text from its special tokens' KV alone, greedily (GEM, Appendix B). Raises like `generate`."""
        if not self.gem.config.k:
            raise ValueError("this model has no special tokens: nothing remembers a text")
        self._require_text("the text", ids)
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        job = WritingJob(ids, sampling, listener, n=1, embed_prompt=False, recovering=True, scope="")
        self._accept(job)
        return job

    def stats(self) -> EngineStats:
        """As of the last step, and what was accepted since."""
        with self._change:
            answers = sum(job.units for job in self._new if isinstance(job, WritingJob))
            texts = sum(job.units for job in self._new) - answers
            return replace(
                self._stats,
                alive=self._thread.is_alive(),
                waiting_answers=self._stats.waiting_answers + answers,
                waiting_texts=self._stats.waiting_texts + texts,
            )

    def _require_ids(self, what: str, ids: Sequence[int]) -> None:
        if any(not 0 <= i < self._vocabulary for i in ids):
            odd = next(i for i in ids if not 0 <= i < self._vocabulary)
            raise ValueError(f"{what} has the token id {odd}: this model's are 0..{self._vocabulary - 1}")

    def _require_text(self, what: str, ids: Sequence[int]) -> None:
        self._require_ids(what, ids)
        if len(ids) > self.gem.max_seq_length:
            raise ValueError(
                f"{what} has {len(ids)} tokens, this model embeds up to {self.gem.max_seq_length}: cut it up"
            )

    def _accept(self, job: Job) -> None:
        with self._change:
            if self._stopping or not self._thread.is_alive():
                raise Stopping
            waiting = self._stats.waiting_answers + self._stats.waiting_texts + sum(new.units for new in self._new)
            if waiting and waiting + job.units > self._max_waiting:
                raise QueueFull(waiting, retry_after=self._seconds_for(waiting))
            self._new.append(job)
            self._change.notify()

    def _seconds_for(self, units: int) -> float:
        """A guess from what is behind us, 1 to 60."""
        done = self._stats.finished_answers + self._stats.embedded_texts
        spent = self._stats.write_seconds + self._stats.embed_seconds
        return min(60.0, max(1.0, round(units * spent / done))) if done else 1.0

    # Working

    def _run(self) -> None:
        while self._wait():
            try:
                with turn(self.gem), torch.inference_mode():
                    self._step()
            except Exception:  # each half catches what its jobs raise: this is ours, and must not end the thread
                logger.exception("a step failed")
                self._writing.drop_all()
                self._embedding.drop_all()
            self._publish()

    def _wait(self) -> bool:
        """Take in what was asked for, waiting for it if there is nothing else to do. False: the end."""
        with self._change:
            while not (self._new or self._busy or self._stopping):
                self._change.wait()
            new, self._new = self._new, []
            for job in new:
                if isinstance(job, WritingJob):
                    self._writing.waiting.append(job)
                elif isinstance(job, EmbeddingJob):
                    self._embedding.waiting.append(job)
        if self._dropping:
            self._writing.drop_all()
            self._embedding.drop_all()
        return self._busy or not self._stopping

    @property
    def _busy(self) -> bool:
        return self._writing.busy or self._embedding.busy

    def _step(self) -> None:
        if not (self._writing.busy and self._embedding.busy):  # no credit for times when there was nothing to do
            self._share = dict.fromkeys(self._share, 0.0)
        write = self._writing.busy and (not self._embedding.busy or self._share["write"] <= self._share["embed"])
        half: Writing | Embedding = self._writing if write else self._embedding
        start = time.perf_counter()
        half.step()
        took = time.perf_counter() - start
        self._share["write" if write else "embed"] += took
        self._seconds["write" if write else "embed"] += took

    def _publish(self) -> None:
        writing, embedding = self._writing, self._embedding
        stats = EngineStats(
            rows=len(writing.answers),
            waiting_answers=sum(job.units for job in writing.waiting),
            waiting_texts=sum(job.units for job in embedding.waiting),
            prompt_tokens=writing.prompt_tokens,
            reused_tokens=writing.reused_tokens,
            generated_tokens=writing.generated_tokens,
            finished_answers=writing.finished,
            embedded_texts=embedding.texts,
            embedded_tokens=embedding.tokens,
            cancelled=writing.cancelled + embedding.cancelled,
            failed=writing.failed + embedding.failed,
            prefix_bytes=writing.prefixes.nbytes,
            write_seconds=self._seconds["write"],
            embed_seconds=self._seconds["embed"],
        )
        with self._change:
            self._stats = stats
