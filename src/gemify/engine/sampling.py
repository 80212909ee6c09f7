"""How the next token is chosen: the sampling parameters of OpenAI's API, each sequence with its own."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    """How the tokens of an answer are chosen, in the words of OpenAI's API.

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

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, 1, math.inf)
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
        """Whether each token is the argmax of the model's own logits, without penalties and biases."""
        return self.temperature == 0 and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


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
    """

    def __init__(self, sampling: SamplingParams, *, index: int = 0) -> None:
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + index) % 2**63)

    def sample(self, logits_V: Tensor) -> int:
        """Return the next token, given the model's own logits."""
        params = self.sampling
        logits_V = logits_V.float().cpu().clone()
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
        logits_V[self._bias_ids] += self._biases
        token = int(logits_V.argmax()) if params.temperature == 0 else self._draw(logits_V)
        self._counts[token] += 1
        return token

    def _draw(self, logits_V: Tensor) -> int:
        # Subtract the largest logit first: it stays 0 when divided by a tiny temperature; any other number overflows.
        p_V = F.softmax((logits_V - logits_V.max()) / max(self.sampling.temperature, _MIN_TEMPERATURE), dim=-1)
        if self.sampling.top_p >= 1.0:
            return int(torch.multinomial(p_V, 1, generator=self._random))
        p_V, ids_V = p_V.sort(descending=True)
        before_V = p_V.cumsum(-1) - p_V
        kept = max(1, int((before_V < self.sampling.top_p).sum()))
        return int(ids_V[torch.multinomial(p_V[:kept], 1, generator=self._random)])


def top_logprobs(logits_V: Tensor, chosen: int, count: int) -> list[tuple[int, float]]:
    """Return ids and log probabilities: the chosen token's, then those of the ``count`` most likely tokens."""
    logprobs_V = F.log_softmax(logits_V.float(), dim=-1)
    ids: Sequence[int] = logprobs_V.topk(count).indices.tolist() if count else []
    return [(i, float(logprobs_V[i])) for i in [chosen, *ids]]
