"""Several processes, one run: each process's shard of a batch, and their collective operations.

The recipe's batches are the run's, whatever the number of processes. Process r of w takes rows r, r + w, ... of every
batch; rows have similar lengths, so the shards mean similar work. All shards have the same number of rows: where the
batch does not divide evenly, a process takes one row more, which counts nothing. So a run in eight processes has the
losses of a run in one, and either resumes from the other's checkpoint.
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
    """One process's shard of a batch."""

    items: list[Item]
    """Its own items, then at most one that only fills up."""
    own: int
    """How many items are its own."""
    total: int
    """Items of the whole batch."""

    @staticmethod
    def of(items: Sequence[Item], rank: int, world: int) -> RankShard[Item]:
        """Return the shard of process ``rank`` of ``world``."""
        mine = list(items[rank::world])
        fill = list(items[:1]) if len(mine) * world < len(items) else []
        return RankShard(mine + fill, len(mine), len(items))


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(shard_ND: Tensor, total: int) -> Tensor:
    """Gather the rows of all processes' shards, with gradients to every process.

    Args:
        shard_ND: This process's rows, as many as every other process has.
        total: Rows of the whole batch.

    Returns:
        [total, D] in the order of the batch.
    """
    if world_size() == 1:
        return shard_ND
    all_WND: Tensor = _Gather.apply(shard_ND)  # type: ignore[no-untyped-call]
    return all_WND.transpose(0, 1).flatten(0, 1)[:total]


class _Gather(torch.autograd.Function):
    """[N, D] of each process -> [W, N, D].

    Each process's loss is a part of the whole loss: backward sums the gradients.
    """

    @staticmethod
    def forward(ctx: Any, shard_ND: Tensor) -> Tensor:
        parts = [torch.empty_like(shard_ND, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, shard_ND.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient_WND = gradients[0].contiguous()
        dist.all_reduce(gradient_WND)  # gloo has no reduce-scatter
        return gradient_WND[rank()]


def all_reduce_sum(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over all processes."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(x) for x in sums]


def all_reduce_max(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def barrier() -> None:
    """Wait until every process has reached this call."""
    if world_size() > 1:
        dist.barrier()
