"""Caches of passages, computed or kept, for the place in a prompt where they are wanted."""

from __future__ import annotations

import logging

import torch
from transformers import DynamicCache

from gemify.model.forward import CachedText, special_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import from_key_values, slice_key_values
from gemify.model.rope_shift import shift_positions
from gemify.rag.kv_store import KvStore
from gemify.rag.prompt_cache import PromptCache

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]


class PassageCache:
    """A passage's cache is computed as the first passage of a first turn: ``head``, ``label``, passage."""

    def __init__(self, gem: GemModel, kv: KvStore | None, head: Ids, *, label: Ids) -> None:
        self._gem, self._kv, self.head, self._label = gem, kv, head, label
        self.computed = 0
        """Tokens run so far, ``head`` apart."""
        self._start: DynamicCache | None = None

    def start(self) -> tuple[Ids, DynamicCache]:
        """Where every conversation begins: the cache of ``head``, run once."""
        if self._start is None:
            self._start = PromptCache(self._gem).extend_to(self.head).text.cache
        return self.head, self._start

    def exact(self, ids: Ids) -> tuple[Ids, DynamicCache]:
        """The cache of a prompt's beginning."""
        kept = self._kv.get(self._gem.lm, ids) if self._kv is not None else None
        if kept is None:
            kept = self._run(ids).cache
            self._put(ids, kept)
        return ids, kept

    def keep(self, kv: KvStore, passage: Ids) -> tuple[int, bool]:
        """Compute and keep a passage's cache, unless it is kept already. Gives the bytes it takes, and if it is new."""
        ids = self.head + self._label + passage
        if size := kv.touch(ids):
            return size, False
        size = kv.put(ids, self._run(ids).cache)
        return size, size > 0

    def moved(self, passage: Ids, *, to: int, special: bool) -> tuple[Ids, DynamicCache]:
        """A passage's columns, or its special tokens' alone, as if they stood at column ``to``."""
        lm = self._gem.lm
        if special:
            return tuple(self._gem.special_ids), shift_positions(lm, self._special(passage), to - len(passage))
        before = len(self.head) + len(self._label)
        _, cache = self.exact(self.head + self._label + passage)
        return passage, shift_positions(
            lm, from_key_values(lm, slice_key_values(cache, before, before + len(passage))), to - before
        )

    @torch.no_grad()
    def _special(self, passage: Ids) -> DynamicCache:
        gem, kv = self._gem, self._kv
        kept = kv.get(gem.lm, passage, kind="special") if kv is not None else None
        if kept is None:
            text = PromptCache(self._gem).extend_to(passage).text
            self.computed += len(passage)
            kept = special_pass(gem.lm, text, gem.special_ids, shared_position=gem.config.shared_position).cache
            self._put(passage, kept, kind="special")
        return kept

    def _put(self, ids: Ids, cache: DynamicCache, *, kind: str = "text") -> None:
        """Keep a cache for later questions; a full or read-only disk is no reason not to answer this one."""
        if self._kv is not None:
            try:
                self._kv.put(ids, cache, kind=kind)
            except OSError as error:
                logger.warning("a cache is not kept: %s", error)

    def _run(self, ids: Ids) -> CachedText:
        prompt = PromptCache(self._gem)
        prompt.load(*self.start())
        text = prompt.extend_to(ids).text
        self.computed += prompt.computed
        return text
