"""Length-sorted groups, so that little padding is ever computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PASS_OVERHEAD_TOKENS = 12.0
"""What a forward pass costs beside its columns, in columns: measured on two CPU cores (docs/log/training-speed.md, "Groups that cost least")."""


def length_groups(
    lengths: Sequence[int], *, max_tokens: int, pass_overhead_tokens: float = PASS_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Partition row numbers into groups of like length, longest first, that together cost least.

    A group costs its columns (rows times longest row) and ``pass_overhead_tokens`` more: with 0 nothing is ever padded, with as
    many as ``max_tokens`` there are as few groups as can be. A group holds at most ``max_tokens`` columns; a longer
    single row is a group of its own. In order of length the best groups are neighbours, so that the least cost of the
    first n rows follows from that of fewer.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest_N = np.array([max(1, lengths[i]) for i in order])
    least_N, begin_N = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    first = 0  # where a group that ends here may begin
    for end in range(1, len(order) + 1):
        while first < end - 1 and longest_N[first] * (end - first) > max_tokens:
            first += 1
        cost = least_N[first:end] + longest_N[first:end] * np.arange(end - first, 0, -1)
        best = int(cost.argmin())
        least_N[end], begin_N[end] = cost[best] + pass_overhead_tokens, first + best
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begin_N[end] : end])
        end = int(begin_N[end])
    return groups[::-1]
