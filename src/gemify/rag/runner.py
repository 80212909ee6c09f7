"""Who runs a prompt's tokens: this thread with a `GemModel` (`ModelRunner`), or an engine (`gemify.serving.rag`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gemify.model.config import pool
from gemify.model.forward import special_pass, text_and_special_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import CachedText, PrefixCache, keeps_all_positions
from gemify.model.prefill import extend

Ids = tuple[int, ...]


@dataclass(frozen=True)
class PromptRun:
    """A prompt that has run."""

    text: CachedText
    """Its KV."""
    logits_BV: Tensor | None
    """Logits [1, V] of the next token. None: the LM head did not run."""
    embedding: Tensor | None
    """Vector [D] of the prompt, if one was asked for."""
    computed: int
    """Tokens that were run now; the others had run before."""


class PromptRunner(Protocol):
    """Runs prompts through one model."""

    @property
    def gem(self) -> GemModel:
        """The model."""

    def run(self, ids: Ids, start: CachedText, *, embed_from: int | None = None) -> PromptRun:
        """Run a prompt.

        Args:
            ids: the prompt, at least one token longer than ``start``.
            start: what of it has run. An empty text: the runner may know a prefix that has run.
            embed_from: also embed the prompt; its special tokens see the positions from this one on.
        """

    def run_special_tokens(self, text: CachedText) -> DynamicCache:
        """KV of the special tokens after a text that has run."""

    def encode_query(self, inputs: str) -> np.ndarray:
        """Vector [D] of a question alone."""

    def cache_prefix(self, ids: Ids) -> None:
        """Have the prefix of all conversations run once."""


class ModelRunner:
    """Runs prompts in the calling thread.

    Args:
        gem: the model.
    """

    def __init__(self, gem: GemModel) -> None:
        self.gem = gem
        self._prefixes = PrefixCache(gem.lm, min_tokens=1)

    @torch.no_grad()
    def run(self, ids: Ids, start: CachedText, *, embed_from: int | None = None) -> PromptRun:
        """Run a prompt after ``start``, or after a cached prefix; see `PromptRunner.run`."""
        gem = self.gem
        gem.lm.eval()
        if not start.mask_BT.shape[1]:
            start = self._prefixes.match(ids)
        done = start.mask_BT.shape[1]
        before_BT, new_BT = (
            torch.tensor(part, dtype=torch.long, device=gem.device)[None] for part in (ids[:done], ids[done:])
        )
        mask_BT = torch.ones_like(new_BT, dtype=torch.bool)
        config = gem.config
        if embed_from is not None and config.layer is None and keeps_all_positions(start.cache):
            gem.require_embeddable_prefill()
            text, hidden_BKD = text_and_special_pass(
                gem.lm,
                start,
                new_BT,
                mask_BT,
                gem.special_ids,
                start=embed_from,
                shared_position=config.shared_position,
                suffix_ids=gem.text_tokenizer.suffix_ids,
            )
            return PromptRun(text, None, pool(hidden_BKD, config.pooling)[0].float().cpu(), len(ids) - done)
        prefill = extend(gem.lm, start, before_BT, new_BT, mask_BT, single=True)
        embedding = None if embed_from is None else gem.embed(prefill, start=embed_from)
        return PromptRun(prefill.text, prefill.logits_BV, embedding, len(ids) - done)

    @torch.no_grad()
    def run_special_tokens(self, text: CachedText) -> DynamicCache:
        """KV of the special tokens after a text that has run."""
        config = self.gem.config
        return special_pass(self.gem.lm, text, config.special_ids, shared_position=config.shared_position).cache

    def encode_query(self, inputs: str) -> np.ndarray:
        """Vector [D] of a question alone."""
        return np.asarray(self.gem.encode_query(inputs))

    def cache_prefix(self, ids: Ids) -> None:
        """Run the prefix of all conversations, if it has not run yet, and keep its KV."""
        if ids and not len(self._prefixes):
            self._prefixes.insert(ids, self.run(ids, self._prefixes.match(ids)).text)
