"""One answer being written: its tokens chosen, turned into text, and told to whoever asked."""

from __future__ import annotations

from torch import Tensor

from gemify.engine.requests import Closed, Finished, Piece, WritingJob
from gemify.engine.sampling import Sampler, TokenBytes, TokenLogprob, likeliest
from gemify.model.gem import GemModel
from gemify.model.streaming import IncrementalDetokenizer


class Answer:
    """Answer ``index`` of a job."""

    def __init__(self, gem: GemModel, job: WritingJob, index: int, spelled: TokenBytes) -> None:
        self.job, self.index = job, index
        self.complete = False
        self._sampler = Sampler(job.sampling, answer=index)
        self._spelled = spelled
        self._new: list[str] = []
        self._pieces = IncrementalDetokenizer(
            gem, sink=self._new.append, stop=job.sampling.stop, max_new_tokens=job.sampling.max_tokens
        )

    @property
    def ids(self) -> list[int]:
        """Tokens written so far."""
        return self._pieces.ids

    def take(self, logits_V: Tensor, likeliest_id: int) -> bool:
        """Choose the next token; whether it was the last."""
        wish = self.job.sampling
        token = likeliest_id if wish.plain else self._sampler.draw(logits_V)
        stopped = self._pieces.add([token])
        ended = stopped or token in self._pieces.eos_ids or len(self.ids) >= wish.max_tokens
        if ended:
            self._pieces.finish()
        text, self._new[:] = "".join(self._new), []
        tokens = () if wish.top_logprobs is None else (self._logprob(logits_V, token, wish.top_logprobs),)
        if text or tokens:
            self.job.tell(Piece(self.index, text, tokens))
        if ended:
            self.job.tell(Finished(self.index, self._pieces.finish_reason, len(self.ids)))
            self.job.unfinished -= 1
            if not self.job.unfinished:
                self.job.tell(Closed())
            self.complete = True
        return ended

    def _logprob(self, logits_V: Tensor, token: int, top: int) -> TokenLogprob:
        (chosen, *rest) = (
            TokenLogprob(i, *self._spelled(i), logprob) for i, logprob in likeliest(logits_V, token, top)
        )
        return TokenLogprob(chosen.id, chosen.text, chosen.data, chosen.logprob, tuple(rest))
