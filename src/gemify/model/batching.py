"""Length-sorted groups, so that little padding is ever computed."""

from __future__ import annotations

from collections.abc import Sequence


def length_groups(
    lengths: Sequence[int], *, max_tokens: int, max_padding: float = 0.05, min_tokens: int = 256
) -> list[list[int]]:
    """Partition row numbers into groups of like length, longest first.

    A group holds at most ``max_tokens`` columns (rows times longest row; a longer single row is a group of its own). It
    is closed early if one more row would make padding exceed ``max_padding`` of its columns, unless it is still smaller
    than ``min_tokens`` columns: tiny groups cost more in overhead than in padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = total = 0
    for i in order:
        n = lengths[i]
        if groups:
            rows = len(groups[-1]) + 1
            columns = rows * longest
            wasteful = columns - total - n > max_padding * columns and columns - longest >= min_tokens
            if columns <= max_tokens and not wasteful:
                groups[-1].append(i)
                total += n
                continue
        groups.append([i])
        longest, total = max(1, n), n
    return groups
