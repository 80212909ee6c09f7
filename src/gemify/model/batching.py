"""Batches of texts of similar length, so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PASS_OVERHEAD_TOKENS = 12.0
"""What a forward pass costs beside its tokens, in tokens. Measured on two CPU cores: see "Groups that cost least" in
docs/log/training-speed.md."""


def length_groups(
    lengths: Sequence[int], *, max_tokens: int, pass_overhead_tokens: float = PASS_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Partition rows into groups of similar length that together cost least.

    A group costs its tokens (rows times longest row) plus ``pass_overhead_tokens``. In order of length the best groups
    are neighbours, so the least cost of the first n rows follows from that of fewer rows.

    Args:
        lengths: Length of each row, in tokens.
        max_tokens: Most tokens of a group, padding included. A longer single row is a group of its own.
        pass_overhead_tokens: 0 never pads; as many as ``max_tokens`` gives the fewest groups.

    Returns:
        Row numbers of each group, the longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    lengths_N = np.array([max(1, lengths[i]) for i in order])
    cost_N, start_N = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    first = 0  # the first row of the longest group that ends here
    for end in range(1, len(order) + 1):
        while first < end - 1 and lengths_N[first] * (end - first) > max_tokens:
            first += 1
        cost = cost_N[first:end] + lengths_N[first:end] * np.arange(end - first, 0, -1)
        best = int(cost.argmin())
        cost_N[end], start_N[end] = cost[best] + pass_overhead_tokens, first + best
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[start_N[end] : end])
        end = int(start_N[end])
    return groups[::-1]
