"""Grammars that an answer follows, by llguidance: compiled once for all requests, matched token by token for each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gemify.io.tables import first_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_KEPT = 64  # compiled grammars
_MAX_CHARACTERS = 1 << 17  # of a grammar; compiling takes some 2 s at most
_MAX_LEXER_STATES = 50_000  # of 1 to 2 kB each


class Grammar:
    """A compiled grammar. `GrammarCompiler` makes it; any number of answers may follow it."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarMatcher:
        """Return a matcher at the beginning of an answer."""
        return GrammarMatcher(self._matcher.deep_copy())


class GrammarMatcher:
    """Where in its grammar one answer is."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Whether no token can follow."""
        return self._matcher.is_stopped()

    def mask(self, logits_V: Tensor) -> Tensor:
        """Return the logits of the tokens that may follow; those of all others are -inf.

        Raises:
            ValueError: the grammar has become too complex, or other restrictions forbid all that it allows.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {first_line(self._matcher.get_error())}")
        allowed_V = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits_V)].astype(bool))
        masked_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        if masked_V.max() == -torch.inf:
            raise ValueError("min_tokens or logit_bias forbids every token that the grammar allows: leave it out")
        return masked_V

    def accept(self, token: int) -> None:
        """Go on by one token, which the mask allowed."""
        self._matcher.consume_token(token)


class GrammarCompiler:
    """Compiles grammars for a tokenizer and keeps those used last. Any thread may use it.

    Args:
        tokenizer: the model's.
        vocab_size: how many logits the model gives.
        eos_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._arguments: dict[str, Any] = {"n_vocab": vocab_size, "eos_token": sorted(eos_ids) or None}
        self._hf_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="gemify-grammar")

    def submit(self, grammar: str) -> Future[Grammar]:
        """Compile a grammar in a thread of its own, one after the other; a kept one is there at once.

        Args:
            grammar: as llguidance's `grammar_from` writes it.

        Returns:
            What `compile` returns, or raises.
        """
        if (kept := self._find(grammar)) is not None:
            found: Future[Grammar] = Future()
            found.set_result(kept)
            return found
        return self._threads.submit(self.compile, grammar)

    def close(self) -> None:
        """Compile nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def compile(self, grammar: str) -> Grammar:
        """Compile a grammar, or find it among those kept. Up to some seconds for the largest.

        Args:
            grammar: as llguidance's `grammar_from` writes it.

        Raises:
            ValueError: no grammar, one that cannot be followed, or one too large.
        """
        if len(grammar) > _MAX_CHARACTERS:
            raise ValueError(f"the grammar has {len(grammar):,} characters, at most {_MAX_CHARACTERS:,} are compiled")
        if (kept := self._find(grammar)) is not None:
            return kept
        compiled = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = compiled
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _find(self, grammar: str) -> Grammar | None:
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _compile(self, grammar: str) -> Grammar:
        try:
            import llguidance
            import llguidance.hf
        except ModuleNotFoundError as error:
            raise ValueError("grammars need llguidance: pip install 'gemify[serve]'") from error
        if self._tokenizer is None:
            try:
                self._tokenizer = llguidance.hf.from_tokenizer(self._hf_tokenizer, **self._arguments)
            except Exception as error:
                reason = first_line(error)
                raise ValueError(f"this model's tokenizer cannot follow a grammar or a schema: {reason}") from error
        limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"the grammar cannot be compiled: {first_line(matcher.get_error())}")
        return Grammar(matcher)
