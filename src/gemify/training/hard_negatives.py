"""Hard negatives: of each pair's question, the passages of others that a model puts near it.

Which candidates count is decided by sentence-transformers' ``mine_hard_negatives``. A model's vectors come from a
`Teacher`, whose cache keeps them: a stopped run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gemify.io.atomic import atomic_file
from gemify.training.examples import Source
from gemify.training.teacher import Teacher

_BLOCK = 1024
"""Texts between two steps of the progress bar."""


@dataclass(frozen=True)
class MiningConfig:
    """Which candidates become negatives, with the names of sentence-transformers' ``mine_hard_negatives``."""

    num_negatives: int = 4
    """Negatives of each pair; a pair that has fewer is left out."""
    range_min: int = 0
    """Nearest candidates to leave out: they may be right answers."""
    range_max: int | None = None
    """Nearest candidates to look at. None: as many as are needed."""
    max_score: float | None = None
    """Highest cosine of a negative."""
    absolute_margin: float | None = None
    """Least difference between the positive's cosine and a negative's."""
    relative_margin: float | None = None
    """The same as a share of the positive's cosine: 0.05 asks for at most 95 % of it."""


class _Encoder:
    """A teacher as ``mine_hard_negatives`` calls a model."""

    def __init__(self, teacher: Teacher, *, show_progress_bar: bool) -> None:
        self.teacher, self.show, self.device = teacher, show_progress_bar, torch.device("cpu")

    def encode_query(self, texts: Sequence[str], **_: Any) -> Tensor:
        return self._encode("query", texts)

    def encode_document(self, texts: Sequence[str], **_: Any) -> Tensor:
        return self._encode("document", texts)

    def _encode(self, name: str, texts: Sequence[str]) -> Tensor:
        prompt, blocks = self.teacher.prompts.get(name, ""), range(0, len(texts), _BLOCK)
        bar = tqdm(blocks, desc=name, disable=None if self.show else True)
        return torch.cat([torch.from_numpy(self.teacher.vectors(texts[at : at + _BLOCK], prompt=prompt)) for at in bar])

    @staticmethod
    def similarity(one_ND: Tensor, other_MD: Tensor) -> Tensor:
        return one_ND @ other_MD.T

    @staticmethod
    def similarity_pairwise(one_ND: Tensor, other_ND: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(one_ND, other_ND, dim=-1)


def mine(
    data: str,
    output: Path,
    model: str,
    config: MiningConfig,
    *,
    corpus: str | None = None,
    device: str | None = None,
    show_progress_bar: bool = True,
) -> dict[str, int]:
    """Write pairs with their hard negatives: ``anchor``, ``positive``, ``negative_1``, ...

    Args:
        data: Pairs, in any shape that `gemify.training.examples` reads.
        output: JSON lines to write.
        model: Whose vectors say what is near: ``st:NAME``, or a GEM.
        config: Which candidates count.
        corpus: Texts that are candidates beside the positives.
        device: Where the model runs. None: the accelerator if there is one.
        show_progress_bar: Show progress on stderr.

    Returns:
        Counts: ``pairs`` read, ``candidates``, ``written``.

    Raises:
        ValueError: No pairs, an unknown model, or numbers that leave no candidate.
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    if output.suffix != ".jsonl":
        raise ValueError(f"{output} must end in .jsonl")
    pairs = [(e.text, e.second) for e in Source(data) if e.kind == "positive" and e.second is not None]
    if not pairs:
        raise ValueError(f"{data} holds no pairs: give rows with anchor and positive")
    texts = [e.text for e in Source(corpus)] if corpus is not None else []
    encoder = _Encoder(Teacher(model, device=device), show_progress_bar=show_progress_bar)
    anchors, positives = zip(*pairs, strict=True)
    with contextlib.nullcontext() if show_progress_bar else contextlib.redirect_stderr(io.StringIO()):
        found = mine_hard_negatives(
            Dataset.from_dict({"anchor": anchors, "positive": positives}),
            encoder,
            corpus=texts,
            output_format="n-tuple",
            verbose=False,
            **asdict(config),
        )
    with atomic_file(output) as stage, stage.open("w", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"pairs": len(pairs), "candidates": len({*texts, *positives}), "written": len(found)}
