"""One sequence that is being generated: chooses its tokens, turns them into text, emits them to its request."""

from __future__ import annotations

from torch import Tensor

from gemify.engine.requests import Completion, Done, GenerationRequest, TokenDelta
from gemify.engine.sampling import Sampler, TokenBytes, TokenLogprob, top_logprobs
from gemify.model.gem import GemModel
from gemify.model.streaming import IncrementalDetokenizer


class GeneratedSequence:
    """Sequence number ``index`` of a request."""

    def __init__(self, gem: GemModel, request: GenerationRequest, index: int, token_bytes: TokenBytes) -> None:
        self.request, self.index = request, index
        self.finished = False
        self._sampler = Sampler(request.sampling, index=index)
        self._token_bytes = token_bytes
        self._new_text: list[str] = []
        self._pieces = IncrementalDetokenizer(
            gem, sink=self._new_text.append, stop=request.sampling.stop, max_new_tokens=request.sampling.max_tokens
        )

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
        stopped = self._pieces.append([token])
        finished = stopped or token in self._pieces.eos_ids or len(self.ids) >= params.max_tokens
        if finished:
            self._pieces.finish()
        text, self._new_text[:] = "".join(self._new_text), []
        tokens = () if params.top_logprobs is None else (self._logprob(logits_V, token, params.top_logprobs),)
        if text or tokens:
            self.request.emit(TokenDelta(self.index, text, tokens))
        if finished:
            self.request.emit(Completion(self.index, self._pieces.finish_reason, len(self.ids)))
            self.request.num_unfinished -= 1
            if not self.request.num_unfinished:
                self.request.emit(Done())
            self.finished = True
        return finished

    def _logprob(self, logits_V: Tensor, token: int, count: int) -> TokenLogprob:
        (chosen, *top) = (
            TokenLogprob(i, *self._token_bytes(i), logprob) for i, logprob in top_logprobs(logits_V, token, count)
        )
        return TokenLogprob(chosen.id, chosen.text, chosen.data, chosen.logprob, tuple(top))
