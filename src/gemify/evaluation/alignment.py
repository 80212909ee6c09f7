"""How well a GEM's questions find what another embedding model indexed, and what they lose against its own.

A GEM trained with ``projection: keep`` lives in its teacher's space, so that an index which the teacher wrote stays as
it is. Three searches of the same questions over the same passages tell what that is worth:

    questions by   passages by
    teacher        teacher        what the index gives today
    GEM            teacher        the index stays, the model that answers asks
    GEM            GEM            the index is written again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemify.io.vectors import normalize

_CUT = 10
"""Results that count (nDCG@10)."""
_BLOCK = 1024
"""Questions whose scores are held at a time."""


def measure_alignment(
    gem: tuple[np.ndarray, np.ndarray], teacher: tuple[np.ndarray, np.ndarray], passage_of: Sequence[int]
) -> dict[str, Any]:
    """Compare searches by a GEM's vectors and by the teacher's.

    Args:
        gem: Its vectors of the N questions [N, P] and of the M passages [M, P].
        teacher: The teacher's, of the same texts.
        passage_of: The index of each question's passage.

    Returns:
        ``question_cosine`` and ``passage_cosine``: the mean cosine of the GEM's vectors to the teacher's. ``searches``:
        the three of the table above, each with ``ndcg_at_10`` and ``recall_at_1`` in percent and ``kept``, the share
        of the teacher's nDCG in percent.

    Raises:
        ValueError: The vectors have another width than the teacher's, or no question is given.
    """
    widths = gem[0].shape[1], teacher[0].shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the model's vectors have {widths[0]} numbers, the teacher's {widths[1]}: "
            "train it into the teacher's space first (gemify align --data ... --output ...)"
        )
    if not len(passage_of):
        raise ValueError("no pairs to measure with: give rows with anchor and positive")
    ours, theirs = tuple(map(normalize, gem)), tuple(map(normalize, teacher))
    by = {"teacher": theirs, "GEM": ours}
    searches: list[dict[str, Any]] = [
        {"questions": questions, "passages": passages, **_search(by[questions][0], by[passages][1], passage_of)}
        for questions, passages in (("teacher", "teacher"), ("GEM", "teacher"), ("GEM", "GEM"))
    ]
    own = searches[0]["ndcg_at_10"]
    for search in searches:
        search["kept"] = 100.0 * search["ndcg_at_10"] / own if own else 0.0
    return {
        "question_cosine": float((ours[0] * theirs[0]).sum(1).mean()),
        "passage_cosine": float((ours[1] * theirs[1]).sum(1).mean()),
        "searches": searches,
    }


def _search(questions_ND: np.ndarray, passages_MD: np.ndarray, passage_of: Sequence[int]) -> dict[str, float]:
    """Rank each question's passage by cosine; an equal score of another passage ranks before it."""
    ranks = []
    for at in range(0, len(questions_ND), _BLOCK):
        scores_BM = questions_ND[at : at + _BLOCK] @ passages_MD.T
        own_B1 = np.take_along_axis(scores_BM, np.asarray(passage_of[at : at + _BLOCK])[:, None], axis=1)
        ranks.append((scores_BM >= own_B1).sum(1))  # from 1 on
    ranks_N = np.concatenate(ranks)
    gains_N = np.where(ranks_N <= _CUT, 1.0 / np.log2(ranks_N + 1.0), 0.0)
    return {"ndcg_at_10": 100.0 * float(gains_N.mean()), "recall_at_1": 100.0 * float((ranks_N == 1).mean())}
