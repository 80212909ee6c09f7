"""`gemify bench train`: seconds of an optimizer step of each kind, against a plain causal-LM step on the same rows.

    plain        transformers' model with labels, every weight trained, one batch padded to its longest row: what a
                 `Trainer` step does
    full         next-token step, every weight trained, under the GEM mask
    gated        next-token step, special tokens and their LoRA trained: no gradient flows through the text
    contrastive  gated contrastive step over pairs of views

Batches are those of training. The plain model gets what ours gets, as plain rows: the texts whole, or both views of
each pair. A ratio is therefore one of seconds on the same tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemify.bench.timing import (
    Report,
    Runs,
    make_report,
    median_ratio,
    peak_memory_mb,
    plot_rows,
    rows_table,
    run_in_turn,
)
from gemify.model.base import load_base
from gemify.model.forward import right_pad
from gemify.paper.tokens import IGNORED
from gemify.training.batches import Batches
from gemify.training.examples import open_sources
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from gemify.training.trainer import build_objective, uses_bf16

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("full", "gated", "contrastive")
GOALS = {"full": 1.1, "gated": 0.7, "contrastive": 0.45}
"""Seconds of our step over those of the plain one that we promise to stay under."""


Tokens = tuple[int, int]
"""Tokens that a step computed, and how many of them were padding."""
Step = Callable[[int], Tokens]
"""Takes the step of a batch's number."""


def bench_train(
    data: str,
    *,
    base: str = "starter",
    kinds: Sequence[str] = KINDS,
    steps: int = 5,
    rows: int = 32,
    pairs: int = 32,
    max_length: int = 128,
    precision: str = "auto",
    group_tokens: int = 8192,
    device: str | None = None,
    show_progress_bar: bool = True,
) -> Report:
    """Time ``steps`` steps of each kind of `KINDS`, after a warm-up step, against the plain one."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind of step {unknown[0]!r}: choose from {', '.join(KINDS)}")
    shape = {"max_length": max_length, "precision": precision, "group_tokens": group_tokens}
    result = []
    for kind in kinds:
        recipe = Recipe.from_dict(
            {
                "base": base,
                "data": data,
                "tune": "full" if kind == "full" else "gated",
                "batch_size": rows,
                "contrastive_batch_size": pairs,
                "max_steps": steps + 1,
                "ntp_steps": 0 if kind == "contrastive" else steps + 1,
                **shape,
            }
        )
        plain, ours = _pair(recipe, device)
        runs = run_in_turn(
            {"plain": plain, "ours": ours},
            rounds=steps,
            warmup=1,
            device=torch.device("cuda") if torch.cuda.is_available() else None,
            description=kind,
            show_progress_bar=show_progress_bar,
        )
        result.append(_row(kind, runs["plain"], runs["ours"]))
    settings = {"base": base, "data": Path(data).name, "steps": steps, "rows": rows, "pairs": pairs, **shape}
    return make_report(settings | {"device": str(device or "default")}, result, peak_memory_mb=peak_memory_mb())


def _row(kind: str, plain: Runs[Tokens], ours: Runs[Tokens]) -> dict[str, Any]:
    (tokens, padding), (plain_tokens, plain_padding) = (map(sum, zip(*r.results, strict=True)) for r in (ours, plain))
    return {
        "name": kind,
        "seconds": statistics.median(ours.seconds),
        "plain_seconds": statistics.median(plain.seconds),
        "ratio": median_ratio(ours.seconds, plain.seconds),
        "ratios": [a / b for a, b in zip(ours.seconds, plain.seconds, strict=True)],
        "cpu_ratio": median_ratio(ours.cpu_seconds, plain.cpu_seconds),
        "cpu_ratios": [a / b for a, b in zip(ours.cpu_seconds, plain.cpu_seconds, strict=True)],
        "goal": GOALS[kind],
        "tokens": tokens - padding,
        "plain_tokens": plain_tokens - plain_padding,
        "tokens_per_second": (tokens - padding) / sum(ours.seconds),
        "padding": padding / max(1, tokens),
        "plain_padding": plain_padding / max(1, plain_tokens),
    }


def _pair(recipe: Recipe, device: str | None) -> tuple[Step, Step]:
    """The plain step and ours. Where both train every weight they share the weights and the optimizer's state."""
    gem, objective = build_objective(recipe, device)
    sources = open_sources(recipe)
    batches = Batches(recipe, sources, gem.text_tokenizer, end_id=gem.tokenizer.eos_token_id)
    micro_batches = [b["batch"] for b in islice(iter(batches), recipe.max_steps)]
    bf16 = uses_bf16(recipe, device)
    take_ours = take_plain = _stepper(objective.train(), bf16=bf16 and not recipe.frozen_base)
    lm = gem.lm
    if recipe.frozen_base:
        lm, _ = load_base(recipe.base, device=device, dtype=torch.float32)
        take_plain = _stepper(lm.train(), bf16=bf16)

    def ours(number: int) -> Tokens:
        batch: MicroBatch = micro_batches[number]
        counts = take_ours(lambda: objective(batch)).counts
        return counts.tokens, counts.padding

    def plain(number: int) -> Tokens:
        batch: MicroBatch = micro_batches[number]
        texts = [v.ids for pair in batch.views for v in pair] or [(*r.prefix, *r.suffix) for r in batch.rows]
        ids_BT, mask_BT = (t.to(lm.device) for t in right_pad(texts))
        labels_BT = ids_BT.masked_fill(~mask_BT, IGNORED)
        take_plain(lambda: lm(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels_BT, use_cache=False))
        return mask_BT.numel(), int((~mask_BT).sum())

    return plain, ours


def _stepper(model: nn.Module, *, bf16: bool) -> Callable[[Callable[[], Any]], Any]:
    """Forward, backward, clipping and AdamW, as `Trainer` takes a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    device = trained[0].device.type

    def take(forward: Callable[[], Any]) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            out = forward()
        (out.total if hasattr(out, "total") else out.loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return out

    return take


COLUMNS = {
    "name": ("step", ""),
    "seconds": ("seconds", ".2f"),
    "plain_seconds": ("plain step, same tokens", ".2f"),
    "ratio": ("ratio", ".2f"),
    "goal": ("goal", ""),
    "cpu_ratio": ("ratio of CPU seconds", ".2f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "padding": ("padding", ".1%"),
    "plain_padding": ("plain step's", ".1%"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    return rows_table(report["rows"], COLUMNS)


def plot(report: Report) -> Figure:
    """Our step's seconds divided by the plain one's, for each kind, with its goal."""
    label = "seconds of a step / seconds of a plain causal-LM step on the same tokens (mark: goal)"
    return plot_rows(report, "ratio", label, points=lambda row: [row["goal"]], marker="|")
