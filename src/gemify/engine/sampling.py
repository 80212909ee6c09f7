"""How the next token is chosen: the sampling parameters of OpenAI's API and vLLM's, each sequence with its own."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gemify.engine.grammar import Grammar

# The bytes of a single token, which need not be whole characters.

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Text and bytes of single tokens, for both ways in which tokenizers spell bytes (byte-level, ``<0x0A>``)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()} if byte_level else {}

    def __call__(self, token: int) -> tuple[str, bytes]:
        """Return a token's text and its bytes, both empty for an id without a token."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the table that the tokenizer has no token for
            return "", b""
        if token in self._added:
            return piece, piece.encode()
        if self._bytes and all(char in self._bytes for char in piece):
            data = bytes(self._bytes[char] for char in piece)
            return data.decode(errors="replace"), data
        if match := _BYTE.fullmatch(piece):
            data = bytes([int(match[1], 16)])
            return data.decode(errors="replace"), data
        text = piece.replace("\u2581", " ")
        return text, text.encode()


_NONE: Mapping[int, float] = MappingProxyType({})
_MIN_TEMPERATURE = (
    1e-6  # the lowest temperature that is divided by: below it only the token with the largest logit is left
)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen, in the words of OpenAI's API and, for what it does not have, vLLM's.

    Raises:
        ValueError: a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    """0: the token with the largest logit each time."""
    top_p: float = 1.0
    seed: int | None = None
    """The same request with the same seed gives the same answer."""
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer already has."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the answer has the token."""
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NONE)
    top_logprobs: int | None = None
    """How many of the most likely tokens are reported beside the chosen one. None: no log probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for the prompt's own tokens."""
    top_k: int = 0
    """Only so many of the most likely tokens are drawn from. 0 or -1: all."""
    min_p: float = 0.0
    """Only tokens are drawn that have at least this part of the largest probability."""
    typical_p: float = 1.0
    """Locally typical sampling."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that the prompt or the answer has; above 1 they become less likely."""
    min_tokens: int = 0
    """Before so many tokens nothing ends the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer; not part of its text."""
    ignore_eos: bool = False
    """The model's end tokens do not end the answer."""
    skip_special_tokens: bool = True
    """The text is without control tokens."""
    grammar: Grammar | None = None
    """What the answer follows; it ends where nothing can follow."""

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, 1, math.inf)
        _require("min_tokens", self.min_tokens, 0, self.max_tokens)
        _require("top_k", self.top_k, -1, math.inf)
        _require("min_p", self.min_p, 0.0, 1.0)
        _require("typical_p", self.typical_p, 1e-6, 1.0)
        _require("repetition_penalty", self.repetition_penalty, 1e-2, 1e2)
        _require("prompt_logprobs", self.prompt_logprobs or 0, 0, 20)
        _require("temperature", self.temperature, 0.0, 2.0)
        _require("top_p", self.top_p, 0.0, 1.0)
        _require("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require("top_logprobs", self.top_logprobs or 0, 0, 20)
        for token, bias in self.logit_bias.items():
            _require(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if any(not s for s in self.stop):
            raise ValueError("a stop string must have at least one character, got '': leave it out")

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the argmax of the model's own logits, without penalties, biases and masks."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias or self.min_tokens or self.grammar
        return self.temperature == 0 and self.repetition_penalty == 1 and not changed


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # refuses NaN too
        raise ValueError(f"{name} must lie in {low:g}..{high:g}, got {value}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability (natural logarithm)."""

    id: int
    text: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Samples the tokens of one sequence, with its own random numbers.

    Args:
        sampling: the request's parameters.
        index: number of the sequence in its request, added to the seed.
        prompt_ids: tokens that count as repeated, beside the answer's own.
        end_ids: tokens that end the answer.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        index: int = 0,
        prompt_ids: Sequence[int] = (),
        end_ids: Collection[int] = (),
    ) -> None:
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._ids = [*prompt_ids]
        self._processors, self._warpers = _logits_processors(sampling, len(prompt_ids), end_ids)
        self._matcher = sampling.grammar.start() if sampling.grammar is not None else None
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + index) % 2**63)

    @property
    def done(self) -> bool:
        """Whether the grammar has come to its end."""
        return self._matcher is not None and self._matcher.done

    def sample(self, logits_V: Tensor) -> int:
        """Return the next token, given the model's own logits."""
        params = self.sampling
        logits_V = logits_V.float().cpu().clone()
        if self._processors:
            logits_V = self._processors(torch.tensor([self._ids]), logits_V[None])[0]
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
        logits_V[self._bias_ids] += self._biases
        if self._matcher is not None:
            logits_V = self._matcher.mask(logits_V)
        token = int(logits_V.argmax()) if params.temperature == 0 else self._draw(logits_V)
        if self._matcher is not None:
            self._matcher.accept(token)
        self._counts[token] += 1
        self._ids.append(token)
        return token

    def _draw(self, logits_V: Tensor) -> int:
        # Subtract the largest logit first: it stays 0 when divided by a tiny temperature; any other number overflows.
        scores_V = (logits_V - logits_V.max()) / max(self.sampling.temperature, _MIN_TEMPERATURE)
        if self._warpers:
            scores_V = self._warpers(torch.tensor([self._ids]), scores_V[None])[0]
        p_V = F.softmax(scores_V, dim=-1)
        if self.sampling.top_p >= 1.0 or self._warpers:
            return int(torch.multinomial(p_V, 1, generator=self._random))
        p_V, ids_V = p_V.sort(descending=True)
        before_V = p_V.cumsum(-1) - p_V
        kept = max(1, int((before_V < self.sampling.top_p).sum()))
        return int(ids_V[torch.multinomial(p_V[:kept], 1, generator=self._random)])


def _logits_processors(
    params: SamplingParams, prompt_tokens: int, end_ids: Collection[int]
) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """Return transformers' processors of the logits, and of the scores after the temperature, in its order."""
    processors, warpers = LogitsProcessorList(), LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens and end_ids:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_tokens, params.min_tokens, sorted(end_ids)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    if warpers and params.top_p < 1:
        warpers.insert(int(params.top_k > 0), TopPLogitsWarper(params.top_p))
    return processors, warpers


def token_logprob(token_bytes: TokenBytes, logits_V: Tensor, chosen: int, count: int) -> TokenLogprob:
    """Return a token's log probability under the model's own logits, with those of the ``count`` most likely tokens."""
    logprobs_V = F.log_softmax(logits_V.float(), dim=-1)
    ids: Sequence[int] = logprobs_V.topk(count).indices.tolist() if count else []
    values: list[float] = logprobs_V[[chosen, *ids]].tolist()
    first, *top = (TokenLogprob(i, *token_bytes(i), p) for i, p in zip([chosen, *ids], values, strict=True))
    return TokenLogprob(first.id, first.text, first.data, first.logprob, tuple(top))
