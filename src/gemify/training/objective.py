"""The loss of one micro-batch: which passes it takes for each tuning scope.

Frozen base (``gated``, ``tokens``): cache surgery. The text runs without gradients, the special tokens on its KV with
gradients, the suffix on the special tokens' KV; nothing goes backward through the text, and only the suffix is a
target (the text's own loss is a constant). Trained base (``lora``, ``full``): one masked pass, every token a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemify.model.batching import length_groups
from gemify.model.gate import Adapter
from gemify.model.passes import (
    MaskedBatch,
    Specials,
    join_specials,
    left_pad,
    masked_pass,
    right_pad,
    select_specials,
    special_pass,
    suffix_pass,
    text_pass,
)
from gemify.model.pooling import Pooling, pool, pool_columns
from gemify.paper.objectives import Temperature, info_nce, next_token_loss, total_loss
from gemify.paper.tokens import IGNORED, Columns, Row, Segment, columns
from gemify.paper.views import View
from gemify.training.processes import gather, rank, world_size


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on: rows for next-token prediction, pairs of views for contrast."""

    alpha: float
    rows: list[Row] = field(default_factory=list)
    views: list[tuple[View, View]] = field(default_factory=list)
    step_targets: int = 1
    """Next-token targets of the whole optimizer step, over all micro-batches and processes."""
    micro_batches: int = 1
    """Micro-batches the step is made of, over all processes (the trainer averages over them)."""
    own_rows: int | None = None
    """Rows that count, from the first on; one more only fills up the share of a process. None: all."""
    own_pairs: int | None = None
    pairs: int | None = None
    """Pairs of views of all processes together, dealt out as `processes.Share` does. None: those here."""


@dataclass
class Computed:
    """Columns that ran through the model, and how many of them were padding."""

    tokens: int = 0
    padding: int = 0

    def add(self, mask_BT: Tensor) -> None:
        self.tokens += mask_BT.numel()
        self.padding += mask_BT.numel() - int(mask_BT.sum())


@dataclass(frozen=True)
class Losses:
    """The weighted sum to descend, its unweighted parts (None: not computed), and the columns it took."""

    total: Tensor
    ntp: Tensor | None
    contrastive: Tensor | None
    scale: float
    computed: Computed


def target_count(row: Row, *, frozen_base: bool) -> int:
    """Next-token targets of a row: the suffix only if the base is frozen, else every token but the first."""
    if frozen_base:
        return len(row.suffix)
    return max(0, len(row.prefix) - 1) + len(row.suffix)


class Objective(nn.Module):
    """Language model, adapter and temperature as one module, whose forward is the loss of a micro-batch."""

    def __init__(
        self,
        lm: PreTrainedModel,
        adapter: Adapter | None,
        *,
        special_ids: Sequence[int],
        frozen_base: bool,
        shared_position: bool,
        pooling: Pooling,
        group_tokens: int = 8192,
        max_padding: float = 0.05,
    ) -> None:
        super().__init__()
        self.lm, self.adapter, self.temperature = lm, adapter, Temperature()
        self.special_ids = list(special_ids)
        self.frozen_base, self.shared_position, self.pooling = frozen_base, shared_position, pooling
        self.group_tokens, self.max_padding = group_tokens, max_padding

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def train(self, mode: bool = True) -> Objective:
        """A frozen base computes the same in training as in use: only the adapter's own dropout is switched."""
        super().train(mode)
        if self.frozen_base:
            self.lm.eval()
            assert self.adapter is not None
            self.adapter.set_training(mode)
        return self

    def forward(self, batch: MicroBatch) -> Losses:
        computed = Computed()
        ntp = contrastive = None
        if batch.alpha < 1.0:
            loss = self._ntp_frozen if self.frozen_base else self._ntp_masked
            own = len(batch.rows) if batch.own_rows is None else batch.own_rows
            ntp = loss(batch.rows, own, computed) * (batch.micro_batches / max(1, batch.step_targets))
        if batch.alpha > 0.0:
            contrastive = self._contrastive(batch, computed)
        return Losses(
            total_loss(ntp, contrastive, batch.alpha),
            ntp,
            contrastive,
            float(self.temperature.t.detach().exp()),
            computed,
        )

    def _contrastive(self, batch: MicroBatch, computed: Computed) -> Tensor:
        """This process's rows against the positives of all processes' rows; the mean over processes is the loss."""
        embed = self._embed_frozen if self.frozen_base else self._embed_masked
        both_BD = embed([v for pair in batch.views for v in pair], computed)
        query_BD, positive_BD = both_BD[0::2], both_BD[1::2]
        own = len(batch.views) if batch.own_pairs is None else batch.own_pairs
        pairs = len(batch.views) if batch.pairs is None else batch.pairs
        place_B = torch.arange(own, device=query_BD.device) * world_size() + rank()
        loss = info_nce(query_BD[:own], gather(positive_BD, pairs), self.temperature(), place_B=place_B)
        return loss * (own * world_size() / pairs)

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        return length_groups(lengths, max_tokens=self.group_tokens, max_padding=self.max_padding)

    # Frozen base: cache surgery

    def _ntp_frozen(self, rows: list[Row], own: int, computed: Computed) -> Tensor:
        parts: list[Specials] = []
        order: list[int] = []
        for group in self._groups([len(r.prefix) for r in rows]):
            ids_BT, mask_BT = left_pad([rows[i].prefix for i in group])
            computed.add(mask_BT)
            with torch.no_grad():
                text = text_pass(self.lm, ids_BT.to(self.device), mask_BT.to(self.device))
            parts.append(
                special_pass(self.lm, text, self.special_ids, shared_position=self.shared_position, with_logits=True)
            )
            order += group
        specials = join_specials(self.lm, parts)
        place = {row: at for at, row in enumerate(order)}
        first_N = torch.tensor([rows[i].suffix[0] if i < own else IGNORED for i in order], device=self.device)
        assert specials.logits_BV is not None
        loss = next_token_loss(specials.logits_BV, first_N)
        for group in self._groups([len(r.suffix) for r in rows]):
            ids_BT, mask_BT = right_pad([rows[i].suffix for i in group])
            computed.add(mask_BT)
            counts_BT = mask_BT & (torch.tensor(group) < own)[:, None]
            labels_BT = ids_BT.masked_fill(~counts_BT, IGNORED).to(self.device)
            mine = select_specials(specials, [place[i] for i in group])
            if ids_BT.shape[1] > 1:
                logits_BTV = suffix_pass(self.lm, mine, ids_BT[:, :-1].to(self.device), mask_BT[:, :-1].to(self.device))
                loss = loss + next_token_loss(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten())
        return loss

    def _embed_frozen(self, views: list[View], computed: Computed) -> Tensor:
        """Embeddings [N, D] of views. Views of the same ids (the "mask" way) share one pass of the text."""
        texts = list(dict.fromkeys(v.ids for v in views))
        users: dict[tuple[int, ...], list[int]] = {t: [] for t in texts}
        for number, view in enumerate(views):
            users[view.ids].append(number)
        out: list[Tensor] = []
        order: list[int] = []
        for group in self._groups([len(t) for t in texts]):
            ids_BT, mask_BT = left_pad([texts[i] for i in group])
            computed.add(mask_BT)
            with torch.no_grad():
                text = text_pass(self.lm, ids_BT.to(self.device), mask_BT.to(self.device))
            for turn in range(max(len(users[texts[i]]) for i in group)):  # first view of every text, second, ...
                present = [b for b, i in enumerate(group) if turn < len(users[texts[i]])]
                these = [users[texts[group[b]]][turn] for b in present]
                flags, _ = left_pad([views[v].seen for v in these])
                some = text.rows(present) if len(present) < len(group) else text
                seen_BT = torch.nn.functional.pad(flags.bool(), (some.mask_BT.shape[1] - flags.shape[1], 0))
                specials = special_pass(
                    self.lm,
                    some,
                    self.special_ids,
                    shared_position=self.shared_position,
                    seen_BT=seen_BT.to(self.device),
                )
                assert specials.hidden_BKD is not None
                out.append(pool(specials.hidden_BKD, self.pooling))
                order += these
        return torch.cat(out)[torch.tensor(order, device=self.device).argsort()]

    # Trained base: one masked pass

    def _ntp_masked(self, rows: list[Row], own: int, computed: Computed) -> Tensor:
        laid_out = [columns(r, self.special_ids, shared_position=self.shared_position) for r in rows]
        for at, row in enumerate(laid_out[own:], start=own):
            laid_out[at] = replace(row, labels=[IGNORED] * len(row.labels))
        losses = []
        for batch in self._masked_batches(laid_out, computed):
            logits_BTV = masked_pass(self.lm, batch[1])
            losses.append(next_token_loss(logits_BTV[:, :-1].flatten(0, 1), batch[1].labels_BT[:, 1:].flatten()))
        return torch.stack(losses).sum()

    def _embed_masked(self, views: list[View], computed: Computed) -> Tensor:
        laid_out = []
        for view in views:
            row = columns(Row("split", view.ids), self.special_ids, shared_position=self.shared_position)
            hide = [
                Segment.HIDDEN if at < len(view.seen) and not view.seen[at] else s for at, s in enumerate(row.segments)
            ]
            laid_out.append(Columns(row.ids, hide, row.positions, row.labels))
        out: list[Tensor] = []
        order: list[int] = []
        for group, batch in self._masked_batches(laid_out, computed):
            hidden_BTD = masked_pass(self.lm, batch, body_only=True)
            out.append(pool_columns(hidden_BTD, batch.segments_BT, self.pooling))
            order += group
        return torch.cat(out)[torch.tensor(order, device=self.device).argsort()]

    def _masked_batches(self, laid_out: list[Columns], computed: Computed) -> list[tuple[list[int], MaskedBatch]]:
        batches = []
        for group in self._groups([len(c.ids) for c in laid_out]):
            batch = MaskedBatch.of(
                [laid_out[i] for i in group], shared_position=self.shared_position, device=self.device
            )
            computed.add(batch.segments_BT != Segment.PAD)
            batches.append((group, batch))
        return batches
