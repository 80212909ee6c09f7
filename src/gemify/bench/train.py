"""``gemify bench train``: seconds of an optimizer step of each kind, against a plain causal-LM step on the same rows.

    plain        transformers' model with labels, every weight trained, one batch padded to its longest row: what a
                 `Trainer` step does
    full         next-token step, every weight trained, under the GEM mask
    gated        next-token step, special tokens and their LoRA trained: nothing goes back through the text
    contrastive  gated contrastive step over pairs of views

A batch is drawn as in training. The plain model gets what ours gets, as plain rows: the texts whole, or both views of each pair; so all of a pair
of timings work on the same tokens, and their ratio is that of the seconds. All kinds run in turn (A B A B) on every batch; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from gemify.model.base import load_base
from gemify.model.forward import right_pad
from gemify.model.throughput import peak_memory_bytes
from gemify.paper.tokens import IGNORED
from gemify.training.batches import Batches
from gemify.training.data import Source
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from gemify.training.trainer import build_objective, uses_bf16

KINDS = ("full", "gated", "contrastive")
GOALS = {"full": 1.1, "gated": 0.7, "contrastive": 0.45}
"""Seconds of our step over those of the plain one that we promise to stay under."""


@dataclass
class Timed:
    """One kind of step: how to take it, and what it took."""

    step: Callable[[MicroBatch], tuple[int, int]]
    """Takes a step and gives the columns it computed, and how many were padding."""
    batches: list[MicroBatch]
    seconds: list[float]
    cpu_seconds: list[float]
    """Of all threads together: what a busy machine does not lengthen."""
    tokens: int = 0
    padding: int = 0

    def run(self, number: int, *, count: bool) -> None:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        tokens, padding = self.step(self.batches[number])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if count:
            self.seconds.append(time.perf_counter() - begin)
            self.cpu_seconds.append(time.process_time() - begin_cpu)
            self.tokens, self.padding = self.tokens + tokens, self.padding + padding


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
) -> dict[str, Any]:
    """The record: for each kind its own seconds, the plain step's on the same tokens, and the ratio."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind of step {unknown[0]!r}: choose from {', '.join(KINDS)}")
    result: dict[str, Any] = {}
    bar = tqdm(total=len(kinds) * (steps + 1) * 2, desc="train", unit="step", disable=not show_progress_bar)
    shape = {"max_length": max_length, "precision": precision, "group_tokens": group_tokens}
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
        for number in range(steps + 1):  # the first is a warm-up
            for timed in (plain, ours):
                timed.run(number, count=number > 0)
                bar.update()
        result[kind] = _row(kind, plain, ours)
    bar.close()
    settings = {"base": base, "data": Path(data).name, "steps": steps, "rows": rows, "pairs": pairs, **shape}
    where = {"threads": torch.get_num_threads(), "device": str(device or "default")}
    return {"settings": settings | where, "rows": result, "peak_memory_mb": round(peak_memory_bytes() / 2**20)}


def _row(kind: str, plain: Timed, ours: Timed) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours.seconds, plain.seconds, strict=True)]
    cpu_ratios = [a / b for a, b in zip(ours.cpu_seconds, plain.cpu_seconds, strict=True)]
    real = ours.tokens - ours.padding
    return {
        "seconds": statistics.median(ours.seconds),
        "plain_seconds": statistics.median(plain.seconds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratios": cpu_ratios,
        "goal": GOALS[kind],
        "tokens": real,
        "plain_tokens": plain.tokens - plain.padding,
        "tokens_per_second": real / sum(ours.seconds),
        "padding": ours.padding / max(1, ours.tokens),
        "plain_padding": plain.padding / max(1, plain.tokens),
    }


def _pair(recipe: Recipe, device: str | None) -> tuple[Timed, Timed]:
    """The plain step and ours. Where both train every weight they take turns on the same ones, and one optimizer's state."""
    gem, objective = build_objective(recipe, device)
    source = Source(recipe.data, recipe.text_column, recipe.split)
    batches = Batches(recipe, source, gem.text_tokenizer, end_id=gem.tokenizer.eos_token_id)
    drawn = [b["batch"] for b in islice(iter(batches), recipe.max_steps)]
    bf16 = uses_bf16(recipe, device)
    take_ours = take_plain = _stepper(objective.train(), bf16=bf16 and not recipe.frozen_base)
    lm = gem.lm
    if recipe.frozen_base:
        lm, _ = load_base(recipe.base, device=device, dtype=torch.float32)
        take_plain = _stepper(lm.train(), bf16=bf16)

    def ours(batch: MicroBatch) -> tuple[int, int]:
        computed = take_ours(lambda: objective(batch)).computed
        return computed.tokens, computed.padding

    def plain(batch: MicroBatch) -> tuple[int, int]:
        texts = [v.ids for pair in batch.views for v in pair] or [(*r.prefix, *r.suffix) for r in batch.rows]
        ids_BT, mask_BT = (t.to(lm.device) for t in right_pad(texts))
        labels_BT = ids_BT.masked_fill(~mask_BT, IGNORED)
        take_plain(lambda: lm(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels_BT, use_cache=False))
        return mask_BT.numel(), int((~mask_BT).sum())

    return Timed(plain, drawn, [], []), Timed(ours, drawn, [], [])


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


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "| step | seconds | plain step, same tokens | ratio (goal) | of CPU seconds | tokens/s | padding (plain's) |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in report["rows"].items():
        lines.append(
            f"| {kind} | {row['seconds']:.2f} | {row['plain_seconds']:.2f} | {row['ratio']:.2f} ({row['goal']})"
            f" | {row['cpu_ratio']:.2f} | {row['tokens_per_second']:,.0f} | {row['padding']:.1%} ({row['plain_padding']:.1%}) |"
        )
    return "\n".join(lines)


def plot(report: Mapping[str, Any]) -> Any:
    """Bars: our step's seconds over the plain one's, for each kind, with its goal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2 + 0.6 * len(report["rows"])), layout="constrained")
    axes = figure.subplots()
    rows = report["rows"]
    axes.barh(list(rows), [row["ratio"] for row in rows.values()], color="#0072b2", height=0.5)
    for at, row in enumerate(rows.values()):
        axes.plot([row["goal"]] * 2, [at - 0.35, at + 0.35], color="#d55e00", linewidth=2)
        axes.annotate(f"{row['ratio']:.2f}", (row["ratio"], at), (3, 0), textcoords="offset points", va="center")
    axes.axvline(1.0, color="#6e6e6e", linewidth=1)
    axes.set_xlabel("seconds of a step / seconds of a plain causal-LM step on the same tokens (line: goal)")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure
