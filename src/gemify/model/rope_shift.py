"""Caches of texts that ran apart, put one behind the other: the only file that knows rotary positions.

    ran apart      0 1 2 3      0 1 2         positions that their keys were rotated to
    joined         0 1 2 3      4 5 6         `shift_positions` turns the second one's keys by 4 more

Rotary keys depend on a position by one rotation, so that moving a cache is exact. Joining is not: a text that ran
apart has not seen the texts before it, and each has an attention sink of its own (its first token). What that costs is
measured by ``gemify bench rag``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gemify.io.errors import first_line
from gemify.model.kv_cache import from_key_values, keeps_all_positions, key_values, new_cache


def shift_positions(lm: PreTrainedModel, cache: DynamicCache, by: int) -> DynamicCache:
    """A cache as if its text had stood ``by`` positions later (or earlier), if the model's positions are rotary."""
    if by == 0:
        return cache
    frequencies = _frequencies(lm)
    return from_key_values(lm, [(_turn(keys, frequencies, by), values) for keys, values in key_values(cache)])


def concatenate(lm: PreTrainedModel, caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the columns of several, in order. Positions are left as they are: `shift_positions` them before."""
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
    """Try it: a token run at two places must have keys that differ by `shift_positions` alone. ValueError if not.

    One token, because it attends to itself wherever it stands: what else differs is then the positions' doing, and in
    low precision no rounding grows from layer to layer.
    """
    if not keeps_all_positions(new_cache(lm)):
        raise ValueError("this model's caches cannot be joined: its sliding windows drop old columns")
    tokens = torch.full((1, 1), lm.get_input_embeddings().weight.shape[0] // 2, device=lm.device)
    try:
        here, there = (_run(lm, tokens, first) for first in (0, 9))
        moved = key_values(shift_positions(lm, here, 9))
        worst = max(
            float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))
            for (a, _), (b, _) in zip(moved, key_values(there), strict=True)
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"this model's caches cannot be joined: {first_line(error)}") from error
    if worst > (1e-3 if lm.dtype == torch.float32 else 3e-2):  # keys turned wrongly are off by about their own length
        raise ValueError("this model's caches cannot be joined: its positions are not plain rotary ones")


def has_dynamic_rope(lm: PreTrainedModel) -> bool:
    """Whether a pass changes the model's own frequencies by the length of its text: then one pass at a time."""
    kinds = [getattr(m, "rope_type", None) for m in lm.modules()]
    named = [name for kind in kinds if kind for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(name == "longrope" or "dynamic" in name for name in named)


def _run(lm: PreTrainedModel, ids_BT: Tensor, first: int) -> DynamicCache:
    cache = new_cache(lm)
    positions = first + torch.arange(ids_BT.shape[1], device=ids_BT.device)
    lm.get_decoder()(input_ids=ids_BT, position_ids=positions[None], past_key_values=cache, use_cache=True)
    return cache


def _frequencies(lm: PreTrainedModel) -> Tensor:
    """Radians a position, [head_dim / 2 or less], of the one rotary embedding there is."""
    found = [m.inv_freq for m in lm.get_decoder().modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise ValueError(f"one rotary embedding is wanted, it has {len(found)}")
    return found[0]


def _turn(keys: Tensor, frequencies: Tensor, by: int) -> Tensor:
    angle = (by * frequencies.double()).to(keys.device)
    cos, sin = angle.cos().float(), angle.sin().float()
    half = frequencies.shape[0]
    first, second, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
    return torch.cat([turned, rest], dim=-1)
