"""The writing half of the engine: prompts are read, their answers join the rows, every row gets a token a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from gemify.engine.batched_prefill import can_read_together, read
from gemify.engine.prefix_cache import Prefixes
from gemify.engine.requests import Closed, Vectors, WritingJob
from gemify.engine.running_batch import Decoding
from gemify.engine.sampling import TokenBytes
from gemify.engine.sequence import Answer
from gemify.model.forward import CachedText, special_pass, text_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import size_in_bytes
from gemify.model.prefill import Prefill


class Writing:
    """Prompts that wait, and answers being written."""

    def __init__(self, gem: GemModel, *, max_rows: int, kv_bytes: int, prefix_bytes: int, step_tokens: int) -> None:
        self._gem, self._max_rows, self._kv_bytes, self._step_tokens = gem, max_rows, kv_bytes, step_tokens
        self.waiting: deque[WritingJob] = deque()
        self.answers: list[Answer] = []
        """Of the rows of `_decoding`, in order."""
        self._decoding = Decoding(gem.lm)
        self.prefixes = Prefixes(gem.lm, prefix_bytes)
        self._spelled = TokenBytes(gem.tokenizer)
        self._together = can_read_together(gem.lm)
        self._bytes_per_column = 0
        table = gem.lm.get_output_embeddings().weight.shape[0]
        self._never = [i for i in gem.config.special_ids if i < table]
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = self.finished = self.failed = (
            self.cancelled
        ) = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.answers)

    def jobs(self) -> list[WritingJob]:
        return [*self.waiting, *dict.fromkeys(answer.job for answer in self.answers)]

    def counts(self) -> dict[str, int]:
        return {
            "rows": len(self.answers),
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "generated_tokens": self.generated_tokens,
            "finished": self.finished,
            "cancelled": self.cancelled,
            "failed": self.failed,
            "prefix_bytes": self.prefixes.nbytes,
        }

    def bytes_for(self, rows: int, columns: int) -> int:
        """Memory of rows' KV, as far as it is known: the first prompt tells."""
        return rows * columns * self._bytes_per_column

    def step(self) -> None:
        """Read up to ``step_tokens`` of what waits, then one token for each answer."""
        self._drop_cancelled()
        budget = self._step_tokens
        while budget > 0 and self.waiting and self._has_room([self.waiting[0]]):
            some = self._next(budget)
            try:
                budget -= self._recover(some[0]) if some[0].recovering else self._read(some, budget)
            except Exception as error:
                for job in some:
                    self._fail(job, error)
        if self.answers:
            try:
                self._write()
            except Exception as error:
                for job in dict.fromkeys(answer.job for answer in self.answers):
                    self._fail(job, error)
                self.answers, self._decoding = [], Decoding(self._gem.lm)

    def drop_all(self, error: Exception) -> None:
        """Forget everything; whoever asked is told why."""
        for job in self.jobs():
            self._fail(job, error)
        self.answers, self._decoding = [], Decoding(self._gem.lm)

    # Reading prompts

    def _has_room(self, some: Sequence[WritingJob]) -> bool:
        if not self.answers and len(some) == 1:
            return True
        rows = len(self.answers) + sum(job.n for job in some)
        columns = max(
            *(len(job.ids) + job.sampling.max_tokens for job in some),
            *(self._decoding.columns + a.job.sampling.max_tokens - len(a.ids) for a in self.answers),
            0,
        )
        return rows <= self._max_rows and self.bytes_for(rows, columns) <= self._kv_bytes

    def _next(self, budget: int) -> list[WritingJob]:
        """The prompts to read in one pass: the first that waits, and those after it that end within the budget too.

        Not one that could reuse what another of them is about to run: that one is read when the other has been.
        """
        some: list[WritingJob] = []
        longest = 0
        for job in self.waiting:
            left = len(job.ids) - (0 if job.read is None else job.read.mask_BT.shape[1])
            longest = max(longest, left)
            alone = job.recovering or not self._together or longest * (len(some) + 1) > budget
            if some and (alone or not self._has_room([*some, job]) or self._would_wait(job, some)):
                break
            some.append(job)
            if alone:
                break
        return some

    def _would_wait(self, job: WritingJob, some: Sequence[WritingJob]) -> bool:
        shared = [other.ids for other in some if other.scope == job.scope]
        return self.prefixes.better_after(job.ids, shared, job.scope)

    def _read(self, some: Sequence[WritingJob], budget: int) -> int:
        """Run prompts that wait; of a single one as much as the budget allows. How many columns it was."""
        parts: list[tuple[int, ...]] = []
        texts: list[CachedText] = []
        for job in some:
            if job.read is None:
                job.read = self.prefixes.longest(job.ids, job.scope)
                job.reused_tokens = job.read.mask_BT.shape[1]
                self.reused_tokens += job.reused_tokens
            done = job.read.mask_BT.shape[1]
            texts.append(job.read)
            parts.append(job.ids[done : done + budget])
        for job, (text, logits_BV) in zip(some, read(self._gem.lm, texts, parts), strict=True):
            job.read = text
            if text.mask_BT.shape[1] == len(job.ids):
                self._has_read(job, text, logits_BV)
        self.prompt_tokens += sum(map(len, parts))
        return len(parts) * max(map(len, parts))

    def _has_read(self, job: WritingJob, text: CachedText, logits_BV: torch.Tensor) -> None:
        self.waiting.remove(job)
        self.prefixes.keep(job.ids, text, job.scope)
        self._bytes_per_column = size_in_bytes(text.cache) // len(job.ids)
        if job.embed_prompt:
            ids_BT = torch.tensor([job.ids], device=self._gem.device)
            job.tell(Vectors(self._embedded(Prefill(text, ids_BT, logits_BV, single=True))))
        self._start(job, text, logits_BV)
        job.read = None

    def _recover(self, job: WritingJob) -> int:
        lm, config, device = self._gem.lm, self._gem.config, self._gem.device
        ids_BT = torch.tensor([job.ids], dtype=torch.long, device=device).view(1, -1)
        text = text_pass(lm, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
        specials = special_pass(lm, text, config.special_ids, shared_position=config.shared_position, with_logits=True)
        self.waiting.popleft()
        self.prompt_tokens += len(job.ids)
        assert specials.logits_BV is not None
        seen_BK = torch.ones(1, config.k, dtype=torch.bool, device=device)
        self._start(
            job, CachedText(specials.cache, seen_BK), specials.logits_BV, position=int(specials.next_position_B[0])
        )
        return len(job.ids)

    def _start(
        self, job: WritingJob, text: CachedText, logits_BV: torch.Tensor, *, position: int | None = None
    ) -> None:
        for index in range(job.n):
            answer = Answer(self._gem, job, index, self._spelled)
            self._decoding.join(text, logits_BV, position=position)
            self.answers.append(answer)

    def _embedded(self, handle: Prefill) -> np.ndarray:
        vectors_1D: np.ndarray = self._gem.embed(handle).numpy()[None]  # of one string: [D]
        return vectors_1D

    # Writing answers

    def _write(self) -> None:
        logits_BV = self._decoding.logits_BV
        logits_BV[:, self._never] = -torch.inf
        likeliest = logits_BV.argmax(-1).tolist()
        ended = [self._take(answer, logits_BV[row], likeliest[row]) for row, answer in enumerate(self.answers)]
        self.generated_tokens += len(ended)
        for row in reversed(range(len(ended))):
            if ended[row]:
                complete = self.answers[row].complete
                self.finished += complete
                self._leave(row, keep=complete)
        if self.answers:
            self._decoding.step([answer.ids[-1] for answer in self.answers])

    def _take(self, answer: Answer, logits_V: torch.Tensor, likeliest_id: int) -> bool:
        """Give an answer its next token; whether it is over. What goes wrong is this answer's alone."""
        try:
            return answer.take(logits_V, likeliest_id)
        except Exception as error:
            self._fail(answer.job, error)
            return True

    def _leave(self, row: int, *, keep: bool = False) -> None:
        answer = self.answers[row]
        if keep and not answer.job.recovering:
            written = answer.job.ids + tuple(answer.ids[:-1])
            self.prefixes.keep(written, self._decoding.text(row), answer.job.scope)
        self._decoding.leave(row)
        self.answers[row] = self.answers[-1]
        self.answers.pop()

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.jobs() if job.cancelled]:
            self.cancelled += not job.closed
            job.tell(Closed())
        for row in reversed(range(len(self.answers))):
            if self.answers[row].job.cancelled:
                self._leave(row)
        for job in [job for job in self.waiting if job.cancelled]:
            self.waiting.remove(job)

    def _fail(self, job: WritingJob, error: Exception) -> None:
        self.failed += not job.closed
        if job in self.waiting:
            self.waiting.remove(job)
        job.fail(error)
