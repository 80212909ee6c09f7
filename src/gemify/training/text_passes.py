"""Text passes under a frozen base: no gradient runs there, so only the texts' KV is kept, for the special tokens.

Texts run in groups of like length, with little padding. The KV of many groups is joined by left padding into one batch,
so that the special tokens' layers, forward and backward, run once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass
class TokenCounts:
    """How many tokens ran through the model, padding included, and how many of them were padding."""

    tokens: int = 0
    padding: int = 0

    def add(self, mask_BT: Tensor) -> None:
        """Count a batch; the mask is False at padding."""
        self.tokens += mask_BT.numel()
        self.padding += mask_BT.numel() - int(mask_BT.sum())


class TextPasses:
    """Runs texts without gradients.

    Args:
        lm: The language model, whose weights are frozen.
        group_tokens: Most tokens of one forward pass, and most cached positions of one special pass, padding included.
        pass_overhead_tokens: What a pass costs beside its tokens, in tokens (`length_groups`).
    """

    def __init__(self, lm: PreTrainedModel, *, group_tokens: int, pass_overhead_tokens: float) -> None:
        self.lm, self.group_tokens, self.pass_overhead_tokens = lm, group_tokens, pass_overhead_tokens

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
    def run(self, texts: Sequence[Ids], counts: TokenCounts, *, layer: int | None = None) -> CachedText:
        """Run texts and return their KV as one batch, in order, padded on the left.

        Args:
            texts: Token ids of each text.
            counts: Where to count the tokens that run.
            layer: Run the first layers only. None: all.
        """
        device = self.lm.device
        parts = []
        lengths = [len(t) for t in texts]
        groups = length_groups(lengths, max_tokens=self.group_tokens, pass_overhead_tokens=self.pass_overhead_tokens)
        for group in groups:
            ids_BT, mask_BT = left_pad([texts[i] for i in group])
            counts.add(mask_BT)
            with early_exit(self.lm, layer):
                text = text_pass(self.lm, ids_BT.to(device), mask_BT.to(device), cache=new_full_cache(self.lm))
            if len(groups) == 1 and group == list(range(len(texts))):
                return text
            parts.append((group, key_values(text.cache)))
            del text  # its KV is held by its part alone
        _, mask_BT = left_pad(texts)
        return CachedText(join_rows(self.lm, parts, len(texts), mask_BT.shape[1]), mask_BT.to(device))
