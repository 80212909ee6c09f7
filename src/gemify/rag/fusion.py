"""Several rankings -> one, by reciprocal rank: needs no scores that can be compared."""

from __future__ import annotations

from collections.abc import Sequence

_SMOOTHING = 60  # Cormack, Clarke and Büttcher (2009)


def fuse(rankings: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Names by the sum over rankings of 1 / (60 + rank), best first; ties keep the order of first mention."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, start=1):
            scores[name] = scores.get(name, 0.0) + 1 / (_SMOOTHING + rank)
    return sorted(scores.items(), key=lambda item: -item[1])
