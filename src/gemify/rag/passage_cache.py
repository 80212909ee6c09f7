"""KV of passages, computed or kept on disk, for the position in a prompt where they are wanted."""

from __future__ import annotations

import logging

from transformers import DynamicCache

from gemify.model.kv_cache import CachedText, empty_text, from_key_values, slice_key_values
from gemify.model.rope_shift import shift_positions
from gemify.rag.kv_store import KvStore
from gemify.rag.runner import Ids, PromptRunner

logger = logging.getLogger(__name__)


class PassageCache:
    """KV of passages. A passage runs as the first one of a conversation: ``prefix_ids``, ``label_ids``, passage.

    Args:
        runner: runs what is not kept.
        store: where KV is kept. None: it is computed each time.
        prefix_ids: what every conversation begins with.
        label_ids: what stands before the first passage.
    """

    def __init__(self, runner: PromptRunner, store: KvStore | None, prefix_ids: Ids, *, label_ids: Ids) -> None:
        self._runner, self._store = runner, store
        self.prefix_ids, self._label_ids = prefix_ids, label_ids
        self.computed = 0
        """Tokens run so far."""

    def get(self, ids: Ids) -> CachedText:
        """KV of the first tokens of a prompt, kept or computed; computed ones are kept."""
        kept = self._store.get(self._runner.gem.lm, ids) if self._store is not None else None
        if kept is None:
            kept = self._run(ids)
            self._put(ids, kept.cache)
        return kept

    def put(self, store: KvStore, passage: Ids) -> tuple[int, bool]:
        """Compute and keep a passage's KV, unless it is kept already. Return its bytes, and whether it is new."""
        ids = self.prefix_ids + self._label_ids + passage
        if size := store.touch(ids):
            return size, False
        size = store.put(ids, self._run(ids).cache)
        return size, size > 0

    def moved(self, passage: Ids, *, to: int, special: bool) -> tuple[Ids, DynamicCache]:
        """KV of a passage, or of its special tokens alone, as if it stood at position ``to``; with its ids."""
        gem = self._runner.gem
        if special:
            return tuple(gem.special_ids), shift_positions(gem.lm, self._special_tokens(passage), to - len(passage))
        before = len(self.prefix_ids) + len(self._label_ids)
        text = self.get(self.prefix_ids + self._label_ids + passage)
        own = from_key_values(gem.lm, slice_key_values(text.cache, before, before + len(passage)))
        return passage, shift_positions(gem.lm, own, to - before)

    def _special_tokens(self, passage: Ids) -> DynamicCache:
        lm, store = self._runner.gem.lm, self._store
        kept = store.get(lm, passage, kind="special") if store is not None else None
        if kept is not None:
            return kept.cache
        cache = self._runner.run_special_tokens(self._run(passage))
        self._put(passage, cache, kind="special")
        return cache

    def _put(self, ids: Ids, cache: DynamicCache, *, kind: str = "text") -> None:
        """Keep KV for later questions; a full or read-only disk is no reason not to answer this one."""
        if self._store is not None:
            try:
                self._store.put(ids, cache, kind=kind)
            except OSError as error:
                logger.warning("a cache is not kept: %s", error)

    def _run(self, ids: Ids) -> CachedText:
        run = self._runner.run(ids, empty_text(self._runner.gem.lm))
        self.computed += run.computed
        return run.text
