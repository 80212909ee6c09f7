"""One prompt that grows: what of it has run is not run again.

A conversation's next prompt begins with the last one, a question's prompt with the question, a document's with the
document. `extend_to` runs only what is new; where a prompt parts from what has run, the cache is cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from gemify.model.forward import CachedText, text_and_special_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import from_key_values, keeps_all_positions, new_cache, slice_key_values
from gemify.model.pooling import pool
from gemify.model.prefill import Prefill, extend, generate_ids
from gemify.model.recovery import find_eos_ids
from gemify.model.rope_shift import concatenate
from gemify.model.streaming import IncrementalDetokenizer


@dataclass(frozen=True)
class Written:
    """An answer: its text, its ids without the end token, and how many tokens were made."""

    text: str
    ids: tuple[int, ...]
    tokens: int


class PromptCache:
    """A prompt of one row and its KV cache."""

    def __init__(self, gem: GemModel) -> None:
        self._gem = gem
        self.computed = 0
        """Tokens run so far."""
        self.clear()

    def clear(self) -> None:
        """Forget what has run."""
        self.ids: tuple[int, ...] = ()
        self._cache = new_cache(self._gem.lm)
        self._handle: Prefill | None = None

    def load(self, ids: Sequence[int], cache: DynamicCache) -> None:
        """Take a cache that was computed elsewhere: ``ids`` have run."""
        self.ids, self._cache, self._handle = tuple(ids), cache, None

    @property
    def text(self) -> CachedText:
        return CachedText(self._cache, torch.ones(1, len(self.ids), dtype=torch.bool, device=self._gem.device))

    def extend_to(self, ids: Sequence[int]) -> Prefill:
        """Run what is new of ``ids`` after what has run already."""
        target = tuple(ids)
        if self._handle is not None and self.ids == target:
            return self._handle
        return self._run(self._rest(target))

    @torch.no_grad()
    def extend_and_embed(self, ids: Sequence[int], *, since: int) -> Tensor:
        """Run what is new of ``ids``, and with it the special tokens; their vector [D] or [K * D].

        They see the prompt from column ``since`` on, and leave no trace in it, nor do the template's words before them.
        """
        gem, target = self._gem, tuple(ids)
        config = gem.config
        if not config.k or not keeps_all_positions(self._cache) or config.layer is not None:
            return gem.embed(self.extend_to(target), start=since)
        gem.require_embeddable_prefill()
        gem.lm.eval()
        ids_BT = torch.tensor(self._rest(target), device=gem.device)[None]
        text, hidden_BKD = text_and_special_pass(
            gem.lm,
            self.text,
            ids_BT,
            torch.ones_like(ids_BT).bool(),
            gem.special_ids,
            start=since,
            shared_position=config.shared_position,
            suffix_ids=gem.text_tokenizer.suffix_ids,
        )
        self.load(target, text.cache)
        self.computed += ids_BT.shape[1]
        return pool(hidden_BKD, config.pooling)[0].float().cpu()

    def _rest(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """What of a prompt is still to run (one token at least), after what differs of what has run is cut off."""
        if not target:
            raise ValueError("no token given: a prompt must not be empty")
        common = next(
            (i for i, (a, b) in enumerate(zip(self.ids, target, strict=False)) if a != b),
            min(len(self.ids), len(target)),
        )
        self._cut(min(common, len(target) - 1))
        return target[len(self.ids) :]

    def append(self, ids: Sequence[int]) -> Prefill:
        """Run ``ids`` after all that has run, also where that is a joined cache."""
        return self._run(tuple(ids))

    def join(self, ids: Sequence[int], cache: DynamicCache) -> None:
        """Put a cache that was computed elsewhere, and moved to this place, behind what has run."""
        self.load((*self.ids, *ids), concatenate(self._gem.lm, [self._cache, cache]) if self.ids else cache)

    def write(
        self,
        handle: Prefill,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] | None = None,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[], None] | None = None,
        **options: Any,
    ) -> Written:
        """Answer the prompt, and keep the answer's cache too.

        ``on_text`` gets the pieces of text as they are made, ``on_token`` is called for each token. ``stop`` ends the
        text before the first of these strings; ``options`` are those of transformers' `generate`.
        """
        gem, before = self._gem, handle.ids_BT.shape[1]
        pieces = IncrementalDetokenizer(
            gem, sink=on_text or _drop, stop=stop, max_new_tokens=max_new_tokens, prompt_tokens=before
        )
        criteria = [pieces] if on_token is None else [_Watched(on_token), pieces]
        with torch.no_grad():
            out = generate_ids(
                gem.lm,
                gem.tokenizer,
                handle,
                handle.ids_BT,
                handle.text.mask_BT,
                suppressed_ids=gem.special_ids,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList(criteria),
                return_dict_in_generate=True,
                **options,
            )
        sequence = out.sequences[0].tolist()
        new = sequence[before:]
        pieces.finish(str(gem.tokenizer.decode(new, skip_special_tokens=True)))
        self.load(sequence[:-1], out.past_key_values)  # the last token was made, not run
        kept = new[:-1] if new and new[-1] in find_eos_ids(gem.lm, gem.tokenizer) else new
        return Written(pieces.text, tuple(kept), len(new))

    def _cut(self, columns: int) -> None:
        if columns == len(self.ids):
            return
        try:
            pairs = slice_key_values(self._cache, 0, columns) if columns else None
        except ValueError:  # sliding windows: start over
            pairs = None
        lm = self._gem.lm
        self._cache = from_key_values(lm, pairs) if pairs else new_cache(lm)
        self.ids, self._handle = self.ids[: columns if pairs else 0], None

    def _run(self, new: tuple[int, ...]) -> Prefill:
        gem = self._gem
        gem.lm.eval()
        before_BT, ids_BT = (torch.tensor(part, dtype=torch.long, device=gem.device)[None] for part in (self.ids, new))
        handle = extend(gem.lm, self.text, before_BT, ids_BT, torch.ones_like(ids_BT).bool(), single=True)
        self.ids, self._cache, self._handle = self.ids + new, handle.text.cache, handle
        self.computed += len(new)
        return handle


class _Watched(StoppingCriteria):
    """Asked after every token; never stops."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _drop(text: str) -> None:
    pass
