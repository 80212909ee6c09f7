"""Several processes, one run: what each takes of a batch, and what they tell each other.

The recipe's batches are the run's, whatever the number of processes: process r of w takes rows r, r + w, ... of every
batch (they are of like length, so the shares are of like work) and all shares have the same number of rows: where they do
not come out even, one row is taken twice and counts once. So a run in eight processes has the losses of the run in one,
and either goes on from the other's checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class RankShard(Generic[Item]):
    """What one process takes of a batch: its own items, then at most one that only fills up."""

    items: list[Item]
    own: int
    total: int
    """Items of the whole batch."""

    @staticmethod
    def of(items: Sequence[Item], rank: int, world: int) -> RankShard[Item]:
        mine = list(items[rank::world])
        fill = list(items[:1]) if len(mine) * world < len(items) else []
        return RankShard(mine + fill, len(mine), len(items))


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(share_ND: Tensor, total: int) -> Tensor:
    """The rows of all processes' shares in the order of the batch, [total, D]; gradients flow back to every process."""
    if world_size() == 1:
        return share_ND
    all_WND: Tensor = _Gather.apply(share_ND)  # type: ignore[no-untyped-call]
    return all_WND.transpose(0, 1).flatten(0, 1)[:total]


class _Gather(torch.autograd.Function):
    """[N, D] of each process -> [W, N, D]. Each process's loss is a part of the whole one: backward adds them up."""

    @staticmethod
    def forward(ctx: Any, share_ND: Tensor) -> Tensor:
        parts = [torch.empty_like(share_ND, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, share_ND.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient_WND = gradients[0].contiguous()
        dist.all_reduce(gradient_WND)  # not every backend can reduce and scatter at once
        return gradient_WND[rank()]


def all_reduce_sum(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Each number's sum over all processes."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(x) for x in sums]


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def barrier() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()
