"""Moving and concatenating KV caches along their positions: the only file that knows rotary position embeddings.

    ran apart       0 1 2 3      0 1 2         positions that the keys were rotated to
    concatenated    0 1 2 3      4 5 6         `shift_positions` rotates the second one's keys by 4 more

A rotary key depends on its position by one rotation, so moving a cache is exact. Concatenating is an approximation: a
text that ran apart has not seen the texts before it, and each has an attention sink of its own (its first token).
``gemify bench rag`` measures what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gemify.io.tables import first_line
from gemify.model.kv_cache import cache_argument, from_key_values, keeps_all_positions, key_values, new_cache


def shift_positions(lm: PreTrainedModel, cache: DynamicCache, by: int) -> DynamicCache:
    """Return the cache as if its text stood ``by`` positions later (negative: earlier)."""
    if by == 0:
        return cache
    frequencies = _frequencies(lm)
    return from_key_values(lm, [(_rotate(keys, frequencies, by), values) for keys, values in key_values(cache)])


def concatenate(lm: PreTrainedModel, caches: Sequence[DynamicCache]) -> DynamicCache:
    """Return one cache with the positions of several, one after the other. Shift them first: see `shift_positions`."""
    parts = [key_values(cache) for cache in caches]
    return from_key_values(
        lm,
        [
            (torch.cat([k for k, _ in layer], dim=-2), torch.cat([v for _, v in layer], dim=-2))
            for layer in zip(*parts, strict=True)
        ],
    )


@torch.no_grad()
def require_shiftable(lm: PreTrainedModel) -> None:
    """Try `shift_positions` on a model: keys of one token at two positions must differ by it alone.

    One token attends to itself wherever it stands, so that nothing but the position differs, and in low precision no
    rounding grows from layer to layer.

    Raises:
        ValueError: They differ otherwise, or the model's caches drop positions.
    """
    if not keeps_all_positions(new_cache(lm)):
        raise ValueError("this model's caches cannot be concatenated: its sliding windows drop old positions")
    tokens = torch.full((1, 1), lm.get_input_embeddings().weight.shape[0] // 2, device=lm.device)
    try:
        first, second = (_run(lm, tokens, position) for position in (0, 9))
        moved = key_values(shift_positions(lm, first, 9))
        worst = max(
            float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))
            for (a, _), (b, _) in zip(moved, key_values(second), strict=True)
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"this model's caches cannot be concatenated: {first_line(error)}") from error
    if worst > (1e-3 if lm.dtype == torch.float32 else 3e-2):  # wrongly rotated keys are off by about their own length
        raise ValueError("this model's caches cannot be concatenated: its positions are not plain rotary ones")


def has_dynamic_rope(lm: PreTrainedModel) -> bool:
    """Return whether a pass sets the model's rotary frequencies by its length. Such a model runs one pass at a time."""
    kinds = [getattr(m, "rope_type", None) for m in lm.modules()]
    named = [name for kind in kinds if kind for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(name == "longrope" or "dynamic" in name for name in named)


def _run(lm: PreTrainedModel, ids_BT: Tensor, first: int) -> DynamicCache:
    cache = new_cache(lm)
    positions = first + torch.arange(ids_BT.shape[1], device=ids_BT.device)
    lm.get_decoder()(input_ids=ids_BT, position_ids=positions[None], **cache_argument(cache), use_cache=True)
    return cache


def _frequencies(lm: PreTrainedModel) -> Tensor:
    """Frequencies of the model's one rotary embedding in radians per position, [head_dim / 2] or fewer."""
    found = [m.inv_freq for m in lm.get_decoder().modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise ValueError(f"it must have one rotary embedding, it has {len(found)}")
    return found[0]


def _rotate(keys: Tensor, frequencies: Tensor, by: int) -> Tensor:
    angle = (by * frequencies.double()).to(keys.device)
    cos, sin = angle.cos().float(), angle.sin().float()
    half = frequencies.shape[0]
    first, second, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
    return torch.cat([rotated, rest], dim=-1)
