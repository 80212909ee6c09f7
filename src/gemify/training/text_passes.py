"""Text passes under a frozen base: no gradient runs there, so only the texts' KV is kept, for the special tokens.

Texts run in groups of like length, with little padding. The KV of many groups is joined by left padding into one batch,
so that the special tokens' layers, forward and backward, run once for all of them.

The KV of a text never changes. `TextCache` keeps it, so that later epochs run the special tokens alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemify.model.early_exit import early_exit
from gemify.model.forward import left_pad, length_groups, text_pass
from gemify.model.kv_cache import CachedText, join_rows, key_values, new_full_cache

_KV_PER_TOKEN = 64.0
"""Positions of cached text that cost a special pass as much as one token of a pass: an estimate."""

Ids = tuple[int, ...]
Part = tuple[list[int], list[tuple[Tensor, Tensor]]]
"""Numbers of texts, and the `key_values` of their batch."""


@dataclass
class TokenCounts:
    """How many tokens ran through the model, padding included, and how many of them were padding."""

    tokens: int = 0
    padding: int = 0
    cached: int = 0
    """Tokens of texts whose KV was kept: they did not run."""

    def add(self, mask_BT: Tensor) -> None:
        """Count a batch; the mask is False at padding."""
        self.tokens += mask_BT.numel()
        self.padding += mask_BT.numel() - int(mask_BT.sum())


class TextCache:
    """The KV of texts that have run, in main memory.

    Nothing is evicted. Epochs come round in one order, so that the least recently used text is the one needed next.

    Args:
        max_bytes: Most memory of the KV. Texts that come when it is full are not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._kept: dict[tuple[int | None, Ids], list[tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, text: Ids, layer: int | None) -> list[tuple[Tensor, Tensor]] | None:
        """Return keys and values, [1, heads, T, head_dim] each, of the first layers. None: they are not kept."""
        found = self._kept.get((layer, text))
        return None if found is None else list(found)

    def add(self, text: Ids, layer: int | None, row: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Keep a copy of a text's KV if there is room.

        Args:
            text: Token ids.
            layer: How many layers ran. None: all.
            row: The text's row in a batch that is padded on the left.
            pairs: The batch's `key_values`.
        """
        T = len(text)
        shapes = [(t.shape[1], T, t.shape[-1]) for pair in pairs for t in pair]
        nbytes = sum(H * T * D for H, _, D in shapes) * pairs[0][0].element_size()
        if (layer, text) in self._kept or self.nbytes + nbytes > self.max_bytes:
            return
        flat = torch.cat([t[row, :, t.shape[2] - T :].flatten() for pair in pairs for t in pair]).cpu()
        parts = flat.split_with_sizes([H * T * D for H, _, D in shapes])
        tensors = [part.view(1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        self._kept[layer, text] = list(zip(tensors[::2], tensors[1::2], strict=True))
        self.nbytes += nbytes


class TextPasses:
    """Runs texts without gradients.

    Args:
        lm: The language model, whose weights are frozen.
        group_tokens: Most tokens of one forward pass, and most cached positions of one special pass, padding included.
        pass_overhead_tokens: What a pass costs beside its tokens, in tokens (`length_groups`).
        cache: Where KV is kept. None: texts run each time.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        group_tokens: int,
        pass_overhead_tokens: float,
        cache: TextCache | None = None,
    ) -> None:
        self.lm, self.group_tokens, self.pass_overhead_tokens = lm, group_tokens, pass_overhead_tokens
        self.cache = cache

    def batches(self, lengths: Sequence[int], *, rows: int | None = None) -> list[list[int]]:
        """Partition texts into as few batches as fit; each is one special pass.

        Args:
            lengths: Tokens of each text.
            rows: Most texts of a batch. None: no limit.
        """
        overhead = self.pass_overhead_tokens * _KV_PER_TOKEN
        batches = length_groups(lengths, max_tokens=self.group_tokens, pass_overhead_tokens=overhead)
        if rows is None:
            return batches
        return [batch[at : at + rows] for batch in batches for at in range(0, len(batch), rows)]

    @torch.no_grad()
    def run(
        self, texts: Sequence[Ids], counts: TokenCounts, *, layer: int | None = None, keep: Collection[Ids] = ()
    ) -> CachedText:
        """Run texts and return their KV as one batch, in order, padded on the left.

        Args:
            texts: Token ids of each text.
            counts: Where to count the tokens that run.
            layer: Run the first layers only. None: all.
            keep: The texts that other epochs have too; the cache keeps their KV.
        """
        device = self.lm.device
        parts = self._cached(texts, counts, layer)
        kept = {number for numbers, _ in parts for number in numbers}
        missing = [number for number in range(len(texts)) if number not in kept]
        lengths = [len(texts[number]) for number in missing]
        groups = length_groups(lengths, max_tokens=self.group_tokens, pass_overhead_tokens=self.pass_overhead_tokens)
        for group in ([missing[at] for at in places] for places in groups):
            ids_BT, mask_BT = left_pad([texts[i] for i in group])
            counts.add(mask_BT)
            with early_exit(self.lm, layer):
                text = text_pass(self.lm, ids_BT.to(device), mask_BT.to(device), cache=new_full_cache(self.lm))
            self._keep(texts, group, text, layer, keep)
            if len(groups) == 1 and group == list(range(len(texts))):
                return text
            parts.append((group, key_values(text.cache)))
            del text  # its KV is held by its part alone
        _, mask_BT = left_pad(texts)
        return CachedText(join_rows(self.lm, parts, len(texts), mask_BT.shape[1]), mask_BT.to(device))

    def _cached(self, texts: Sequence[Ids], counts: TokenCounts, layer: int | None) -> list[Part]:
        """The texts whose KV is kept, each a part of the whole."""
        parts: list[Part] = []
        for number, text in enumerate(texts if self.cache is not None else ()):
            assert self.cache is not None
            pairs = self.cache.get(text, layer)
            if pairs is not None:
                counts.cached += len(text)
                parts.append(([number], [(k.to(self.lm.device), v.to(self.lm.device)) for k, v in pairs]))
        return parts

    def _keep(
        self, texts: Sequence[Ids], group: list[int], ran: CachedText, layer: int | None, keep: Collection[Ids]
    ) -> None:
        if self.cache is None:
            return
        pairs = key_values(ran.cache)
        for row, number in enumerate(group):
            if texts[number] in keep:
                self.cache.add(texts[number], layer, row, pairs)
