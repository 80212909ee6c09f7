"""The loss of one micro-batch (GEM, Section 3.3): which passes it takes for each tuning scope.

Frozen base (``gated``, ``tokens``): cache surgery. The text runs without gradients, the special tokens run on its KV
cache with gradients, the suffix runs on theirs. Nothing goes backward through the text, and only the suffix is a target
(the text's own loss is a constant). Trained base (``lora``, ``full``): one masked pass, every token is a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gemify.model.adapter import Adapter
from gemify.model.config import GemConfig, pool, pool_hidden_states
from gemify.model.early_exit import early_exit
from gemify.model.forward import (
    PASS_OVERHEAD_TOKENS,
    MaskedBatch,
    Specials,
    concatenate_specials,
    embedding_pass,
    left_pad,
    length_groups,
    masked_pass,
    right_pad,
    select_specials,
    special_pass,
    suffix_pass,
)
from gemify.model.projection import Projection
from gemify.paper.objectives import (
    Temperature,
    cosent_loss,
    equal_texts,
    info_nce,
    matryoshka_loss,
    next_token_loss,
    total_loss,
)
from gemify.paper.tokens import IGNORED, Row, RowInputs, Segment, build_inputs
from gemify.paper.views import View
from gemify.training.distributed import all_reduce_max, gather, rank, world_size
from gemify.training.output_head import has_plain_head, target_loss
from gemify.training.teacher import Distillation
from gemify.training.text_passes import TextCache, TextPasses, TokenCounts


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass: rows for next-token prediction, pairs of views for contrast."""

    alpha: float
    """Weight of the contrastive loss, in [0, 1]."""
    rows: list[Row] = field(default_factory=list)
    views: list[tuple[View, ...]] = field(default_factory=list)
    """Two views of each text, or a pair and its negatives; with a teacher one view of a text. All of one width."""
    step_targets: int = 1
    """Next-token targets of the whole optimizer step, over all micro-batches and processes."""
    micro_batches: int = 1
    """Micro-batches of the step, over all processes (the trainer averages over them)."""
    own_rows: int | None = None
    """How many of the first rows count; one more may be there to fill up a process's shard. None: all."""
    own_pairs: int | None = None
    """How many of the first pairs count. None: all."""
    pairs: int | None = None
    """Pairs of views of all processes together, sharded as `RankShard` does. None: those here."""
    targets: list[np.ndarray] | None = None
    """The teacher's vectors [texts, P] of each entry of ``views``. None: there is no teacher."""
    keys: list[tuple[int, ...]] | None = None
    """Numbers of each entry's id, anchor, positive and negatives, of all processes' entries: equal for equal texts,
    ``FILLER`` for one that only fills up. None: all differ."""
    scores: list[float] | None = None
    """How alike the texts of each pair are, of all processes' pairs. None: pairs have no scores."""


@dataclass(frozen=True)
class Losses:
    """The weighted sum to minimise, its unweighted parts (None: not counts), and the tokens that ran for it."""

    total: Tensor
    ntp: Tensor | None
    contrastive: Tensor | None
    distillation: Tensor | None
    scale: float
    counts: TokenCounts


def target_count(row: Row, *, frozen_base: bool) -> int:
    """Count a row's next-token targets: in the suffix if the base is frozen, else in all but the first token."""
    labels = row.suffix_labels if frozen_base else row.prefix_labels[1:] + row.suffix_labels
    return len(labels) - labels.count(IGNORED)


class Objective(nn.Module):
    """Language model, adapter and temperature as one module, whose forward is the loss of a micro-batch.

    Args:
        lm: The language model.
        adapter: What is trained of it, if not all of it.
        config: The GEM's: special tokens, tuning scope, position, pooling, and the layer where contrastive passes stop.
        group_tokens: Most tokens of one forward pass, padding included.
        pass_overhead_tokens: What a pass costs beside its tokens, in tokens (`length_groups`).
        contrastive_chunk_size: Views whose activations are held at a time (GradCache). None: all.
        sharded: Every process holds a part of the weights.
        distillation: The linear map into a teacher's space, and the weights of the losses. None: there is no teacher.
        projection: The map that a GEM trained further has already. None: its vectors are the pooled states.
        matryoshka_dims: Dimensions to which vectors are cut in the contrastive loss, beside whole ones.
        text_cache_bytes: Memory for the KV of texts that later epochs have again (``gated``, ``tokens``). 0: none.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        adapter: Adapter | None,
        config: GemConfig,
        *,
        group_tokens: int = 8192,
        pass_overhead_tokens: float = PASS_OVERHEAD_TOKENS,
        contrastive_chunk_size: int | None = None,
        sharded: bool = False,
        distillation: Distillation | None = None,
        projection: Projection | None = None,
        matryoshka_dims: tuple[int, ...] = (),
        text_cache_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.distillation, self.projection = distillation, projection
        self.lm, self.adapter, self.temperature, self.gem_config = lm, adapter, Temperature(), config
        self.group_tokens, self.pass_overhead_tokens = group_tokens, pass_overhead_tokens
        self.contrastive_chunk_size, self.sharded = contrastive_chunk_size, sharded
        self.matryoshka_dims = matryoshka_dims
        self.plain_head = has_plain_head(lm)
        self.texts = TextPasses(
            lm,
            group_tokens=group_tokens,
            pass_overhead_tokens=pass_overhead_tokens,
            cache=TextCache(text_cache_bytes) if text_cache_bytes else None,
        )

    @property
    def device(self) -> torch.device:
        """Where the language model's weights are."""
        return self.lm.device

    def train(self, mode: bool = True) -> Objective:
        """Switch to training mode.

        A frozen base computes as in evaluation: only the adapter's own dropout is switched.
        """
        super().train(mode)
        if self.gem_config.frozen_base:
            self.lm.eval()
            assert self.adapter is not None
            self.adapter.set_training(mode)
        return self

    def forward(self, batch: MicroBatch) -> Losses:
        """Compute the losses whose weight is not 0."""
        counts = TokenCounts()
        temperature = self.temperature()
        ntp = contrastive = distillation = None
        if batch.alpha < 1.0:
            loss = self._ntp_frozen if self.gem_config.frozen_base else self._ntp_masked
            own = len(batch.rows) if batch.own_rows is None else batch.own_rows
            ntp = loss(batch.rows, own, counts) * (batch.micro_batches / max(1, batch.step_targets))
        if batch.alpha > 0.0:
            views_ND = self.embed([v for views in batch.views for v in views], counts)
            if self.projection is not None:
                views_ND = self.projection(views_ND)
            if self.distillation is None:
                contrastive = self._contrastive(batch, views_ND, temperature)
                embedding = contrastive
            else:
                embedding, contrastive, distillation = self._distill(self.distillation, batch, views_ND, temperature)
        else:
            embedding = None
        return Losses(
            total_loss(ntp, embedding, batch.alpha),
            ntp,
            contrastive,
            distillation,
            float(temperature.detach()),
            replace(counts),  # GradCache counts again on the way back
        )

    def _distill(
        self, distillation: Distillation, batch: MicroBatch, states_ND: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The sum of the teacher's losses and the contrastive one, and both apart."""
        assert batch.targets is not None
        own = len(batch.views) if batch.own_pairs is None else batch.own_pairs
        keys_BK = None if batch.keys is None else torch.tensor(batch.keys, device=states_ND.device)
        vectors_ND, loss = distillation(states_ND, batch.targets, own=own, total=batch.pairs, keys_BK=keys_BK)
        if len(batch.views[0]) == 1 or not distillation.contrastive_weight:
            return loss, None, loss
        contrastive = self._contrastive(batch, vectors_ND, temperature)
        return loss + distillation.contrastive_weight * contrastive, contrastive, loss

    def _contrastive(self, batch: MicroBatch, views_ND: Tensor, temperature: Tensor) -> Tensor:
        """This process's rows against all processes' positives and negatives; the mean over processes is the loss."""
        views_BWD = views_ND.view(len(batch.views), -1, views_ND.shape[-1])
        own = len(batch.views) if batch.own_pairs is None else batch.own_pairs
        pairs = len(batch.views) if batch.pairs is None else batch.pairs
        if batch.scores is not None:
            return self._scored(gather(views_BWD, pairs), batch.scores)
        own_index_B = torch.arange(own, device=views_ND.device) * world_size() + rank()
        candidates_NWD = gather(views_BWD[:, 1:], pairs)
        keys_BK = None if batch.keys is None else torch.tensor(batch.keys, device=views_ND.device)
        excluded_BN = None if keys_BK is None else equal_texts(keys_BK, own_index_B)

        def cut(dim: int) -> Tensor:
            return info_nce(
                views_BWD[:own, 0, :dim],
                candidates_NWD[:, 0, :dim],
                temperature,
                candidates_NWD[:, 1:, :dim].flatten(0, 1),
                own_index_B=own_index_B,
                excluded_BN=excluded_BN,
            )

        loss = matryoshka_loss(cut, self.matryoshka_dims, views_ND.shape[-1])
        return loss * (own * world_size() / pairs)

    def _scored(self, pairs_N2D: Tensor, scores: list[float]) -> Tensor:
        """The loss of pairs with scores, the same in every process."""
        scores_N = torch.tensor(scores, device=pairs_N2D.device)

        def cut(dim: int) -> Tensor:
            return cosent_loss(pairs_N2D[:, 0, :dim], pairs_N2D[:, 1, :dim], scores_N)

        return matryoshka_loss(cut, self.matryoshka_dims, pairs_N2D.shape[-1])

    def embed(self, views: list[View], counts: TokenCounts | None = None) -> Tensor:
        """Embed views as the contrastive loss does, up to the pooled states.

        Args:
            views: N views, template and BOS included.
            counts: Where to count the tokens that run.

        Returns:
            [N, D] in the order of the views, with gradients.
        """
        on_cache = self.gem_config.tune in ("gated", "tokens")
        embed = self._embed_frozen if on_cache else self._embed_masked
        return embed(views, TokenCounts() if counts is None else counts)

    def _groups(self, lengths: list[int], *, rows: int | None = None) -> list[list[int]]:
        """Row numbers in groups of at most ``rows``; each group is one pass."""
        groups = length_groups(lengths, max_tokens=self.group_tokens, pass_overhead_tokens=self.pass_overhead_tokens)
        if rows is not None:
            groups = [group[at : at + rows] for group in groups for at in range(0, len(group), rows)]
        if self.sharded:  # every process must run the layers equally often, as each holds a part of them
            wanted = all_reduce_max(len(groups), self.device)
            while len(groups) < wanted:
                largest = max(groups, key=len)
                groups.remove(largest)
                groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return groups

    def _chunk(self, groups: int, work: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Run one group.

        If chunks are wanted its activations are computed again on the way back, group by group: GradCache. The
        activations of a single group are needed at once, and are kept.
        """
        if self.contrastive_chunk_size is None or groups == 1:
            return work(*arguments)
        embedded: Tensor = checkpoint(work, *arguments, use_reentrant=False)
        return embedded

    # Frozen base: cache surgery

    def _ntp_frozen(self, rows: list[Row], own: int, counts: TokenCounts) -> Tensor:
        parts: list[Specials] = []
        order: list[int] = []
        for batch in self.texts.batches([len(r.prefix) for r in rows]):
            text = self.texts.run([rows[i].prefix for i in batch], counts)
            parts.append(
                special_pass(
                    self.lm,
                    text,
                    self.gem_config.special_ids,
                    shared_position=self.gem_config.shared_position,
                    with_logits=not self.plain_head,
                )
            )
            order += batch
        specials = concatenate_specials(self.lm, parts)
        index = {row: i for i, row in enumerate(order)}
        labels = [row.suffix_labels if i < own else [IGNORED] * len(row.suffix) for i, row in enumerate(rows)]
        first_N = torch.tensor([labels[i][0] for i in order])
        last_BN = specials.logits_BV if specials.hidden_BKD is None else specials.hidden_BKD[:, -1]
        assert last_BN is not None
        found = [self._at_targets(last_BN, first_N)]
        for group in self._groups([len(r.suffix) for r in rows]):
            ids_BT, mask_BT = right_pad([rows[i].suffix for i in group])
            counts.add(mask_BT)
            if ids_BT.shape[1] == 1:
                continue
            labels_BT = right_pad([labels[i] for i in group], fill=IGNORED)[0][:, 1:]
            mine = select_specials(specials, [index[i] for i in group])
            inputs = ids_BT[:, :-1].to(self.device), mask_BT[:, :-1].to(self.device)
            found.append(self._at_targets(suffix_pass(self.lm, mine, *inputs, body_only=self.plain_head), labels_BT))
        return self._loss(found)

    def _at_targets(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states or logits at the positions that have a target, and these targets."""
        found = (labels != IGNORED).nonzero(as_tuple=True)  # once, and labels are on the CPU where they can be
        return out[tuple(index_N.to(out.device) for index_N in found)], labels[found].to(out.device)

    def _loss(self, found: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Summed next-token loss."""
        if not self.plain_head:
            return torch.stack([next_token_loss(logits, targets) for logits, targets in found]).sum()
        hidden_ND, targets_N = (torch.cat(parts) for parts in zip(*found, strict=True))
        return target_loss(self.lm, hidden_ND, targets_N)

    def _embed_frozen(self, views: list[View], counts: TokenCounts) -> Tensor:
        """Embeddings [N, D] of views.

        Views of the same ids (the "mask" way, an anchor of several pairs) share one pass.
        """
        texts = list(dict.fromkeys(v.ids for v in views))
        users: dict[tuple[int, ...], list[int]] = {t: [] for t in texts}
        for number, view in enumerate(views):
            users[view.ids].append(number)
        out: list[Tensor] = []
        order: list[int] = []
        batches = self.texts.batches([len(t) for t in texts], rows=self.contrastive_chunk_size)
        keep = {view.ids for view in views if view.recurs}
        for batch in batches:
            uses = [(row, v) for row, i in enumerate(batch) for v in users[texts[i]]]
            rows, seen = [row for row, _ in uses], [views[v].seen for _, v in uses]
            out.append(
                self._chunk(len(batches), self._embed_texts, [texts[i] for i in batch], rows, seen, counts, keep)
            )
            order += [v for _, v in uses]
        return torch.cat(out)[torch.tensor(order, device=self.device).argsort()]

    def _embed_texts(
        self,
        texts: list[tuple[int, ...]],
        rows: list[int],
        seen: list[tuple[bool, ...]],
        counts: TokenCounts,
        keep: set[tuple[int, ...]],
    ) -> Tensor:
        """Embed views: row ``rows[n]`` of the texts, of which the special tokens see ``seen[n]``."""
        text = self.texts.run(texts, counts, layer=self.gem_config.layer, keep=keep)
        most = max(1, self.group_tokens // text.mask_BT.shape[1])
        out = []
        for at in range(0, len(rows), most):
            chosen = rows[at : at + most]
            some = text if chosen == list(range(len(texts))) else text.rows(chosen)
            flags_BT, _ = left_pad(seen[at : at + most])
            seen_BT = nn.functional.pad(flags_BT.bool(), (some.mask_BT.shape[1] - flags_BT.shape[1], 0))
            with early_exit(self.lm, self.gem_config.layer):
                specials = special_pass(
                    self.lm,
                    some,
                    self.gem_config.special_ids,
                    shared_position=self.gem_config.shared_position,
                    seen_BT=seen_BT.to(self.device),
                )
            assert specials.hidden_BKD is not None
            out.append(pool(specials.hidden_BKD, self.gem_config.pooling))
        return torch.cat(out)

    # Trained base: one masked pass

    def _ntp_masked(self, rows: list[Row], own: int, counts: TokenCounts) -> Tensor:
        laid_out = [
            build_inputs(r, self.gem_config.special_ids, shared_position=self.gem_config.shared_position) for r in rows
        ]
        for at, row in enumerate(laid_out[own:], start=own):
            laid_out[at] = replace(row, labels=[IGNORED] * len(row.labels))
        found = []
        for _, batch in self._masked_batches(laid_out, counts):
            out = masked_pass(self.lm, batch, body_only=self.plain_head)
            found.append(self._at_targets(out[:, :-1], batch.labels_BT[:, 1:]))
        return self._loss(found)

    def _embed_masked(self, views: list[View], counts: TokenCounts) -> Tensor:
        laid_out = []
        for view in views:
            row = build_inputs(
                Row("split", view.ids), self.gem_config.special_ids, shared_position=self.gem_config.shared_position
            )
            hide = [
                Segment.HIDDEN if at < len(view.seen) and not view.seen[at] else s for at, s in enumerate(row.segments)
            ]
            laid_out.append(RowInputs(row.ids, hide, row.positions, row.labels))
        out: list[Tensor] = []
        order: list[int] = []
        batches = self._masked_batches(laid_out, counts, rows=self.contrastive_chunk_size)
        for group, batch in batches:
            out.append(self._chunk(len(batches), self._embed_rows, batch))
            order += group
        return torch.cat(out)[torch.tensor(order, device=self.device).argsort()]

    def _embed_rows(self, batch: MaskedBatch) -> Tensor:
        with early_exit(self.lm, self.gem_config.layer):
            hidden_BTD = embedding_pass(self.lm, batch, self.gem_config)
        return pool_hidden_states(hidden_BTD, batch.segments_BT, self.gem_config.pooling)

    def _masked_batches(
        self, laid_out: list[RowInputs], counts: TokenCounts, *, rows: int | None = None
    ) -> list[tuple[list[int], MaskedBatch]]:
        batches = []
        for group in self._groups([len(c.ids) for c in laid_out], rows=rows):
            batch = MaskedBatch.of(
                [laid_out[i] for i in group], shared_position=self.gem_config.shared_position, device=self.device
            )
            counts.tokens += batch.ids_BT.numel()
            counts.padding += batch.ids_BT.numel() - sum(len(laid_out[i].ids) for i in group)
            batches.append((group, batch))
        return batches
