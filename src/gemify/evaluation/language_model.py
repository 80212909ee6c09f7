"""Is the language model still the one it was? Logits compared bit for bit, and held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gemify.model.base import default_device
from gemify.model.forward import length_groups, positions_of, right_pad

PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: What do plants need to grow?\nA: Water, light and",
    "Once upon a time, in a village at the edge of a great forest, there lived an old clockmaker who",
    "1, 2, 4, 8, 16,",
)
"""A few prompts of different kinds, to compare language models on."""


def numerics_signature(device: torch.device | str | None) -> str:
    """What the rounding of sums depends on, apart from the weights: torch version, device, threads.

    Language scores are comparable to the last answer only where it is equal.
    On a CPU another number of threads adds in another order: in bfloat16 one answer in thirty of MMLU changes.
    """
    kind = default_device() if device is None else torch.device(device)
    threads = f", {torch.get_num_threads()} threads" if kind.type == "cpu" else ""
    name = f" {torch.cuda.get_device_name(kind)}" if kind.type == "cuda" else ""
    return f"torch {torch.__version__}, {kind.type}{name}{threads}"


@torch.inference_mode()
def logits_of(lm: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """Logits [T, V] of one text."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(lm.device)
    logits: torch.Tensor = lm(input_ids=ids, use_cache=False).logits[0]
    return logits


def same_logits(one: Any, other: Any, tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether two language models give the same logits on every text, to the last bit."""
    return all(torch.equal(logits_of(one, tokenizer, t), logits_of(other, tokenizer, t)) for t in texts)


def language_loss(lm: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 256) -> float:
    """Mean next-token loss in nats over the texts' tokens (each text on its own, cut to ``max_length``)."""
    losses = compute_text_losses(lm, tokenizer, texts, max_length=max_length)
    return sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))


@torch.inference_mode()
def compute_text_losses(
    lm: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 256
) -> list[tuple[float, int]]:
    """Summed next-token loss in nats of each text, and the number of tokens predicted."""
    rows = [r[:max_length] for r in tokenizer(list(texts), verbose=False)["input_ids"]]
    device = lm.device
    losses = [(0.0, 0)] * len(rows)
    for group in length_groups([len(r) for r in rows], max_tokens=4096):
        ids_BT, mask_BT = (t.to(device) for t in right_pad([rows[i] for i in group]))
        if ids_BT.shape[1] < 2:  # nothing to predict
            continue
        logits_BTV = lm(
            input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=positions_of(mask_BT), use_cache=False
        ).logits
        labels_BT = ids_BT.masked_fill(~mask_BT, -100)[:, 1:]
        loss_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2).float(), labels_BT, reduction="none")
        for i, loss, count in zip(
            group, loss_BT.double().sum(1).tolist(), (labels_BT >= 0).sum(1).tolist(), strict=True
        ):
            losses[i] = (loss, count)
    return losses


@torch.inference_mode()
def compare_logits(one: Any, other: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """How many prompts give two language models the same logits to the last bit, and the largest difference."""
    identical, largest = 0, 0.0
    for prompt in prompts:
        first, second = (logits_of(lm, tokenizer, prompt) for lm in (one, other))
        width = min(first.shape[-1], second.shape[-1])  # a trained table may have grown by the special tokens' rows
        first, second = first[:, :width], second[:, :width].to(first.device)
        if torch.equal(first, second):
            identical += 1
        else:
            largest = max(largest, float((first.float() - second.float()).abs().max()))
    return {"prompts": len(prompts), "identical": identical, "max_difference": largest}
