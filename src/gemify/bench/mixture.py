"""Synthetic vectors whose neighbours mean something: groups of groups of groups of vectors, the same for a seed.

A vector is the sum of a random direction for its group, a smaller one for its subgroup, one for its family and one of
its own, scaled to length 1: the nearest are of its family, then of its subgroup, then of its group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gemify.io.vectors import normalize

_GROUPS, _SUBGROUPS, _FAMILIES = 64, 32, 12
_RADII = (1.0, 0.8, 0.6, 0.5)


@dataclass(frozen=True)
class Mixture:
    """A source of vectors in ``dim`` dimensions: the vectors of a part depend on the seed and its number alone."""

    dim: int
    seed: int = 0
    _centres: tuple[np.ndarray, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        made = np.random.default_rng(self.seed)
        counts = (_GROUPS, _GROUPS * _SUBGROUPS, _GROUPS * _SUBGROUPS * _FAMILIES)
        object.__setattr__(self, "_centres", tuple(self._directions(made, count) for count in counts))

    def part(self, number: int, count: int) -> np.ndarray:
        """Vectors [count, dim], float32, of length 1."""
        made = np.random.default_rng([self.seed, number])
        family = made.integers(len(self._centres[2]), size=count)
        groups = (family // (_SUBGROUPS * _FAMILIES), family // _FAMILIES, family)
        vectors_ND = _RADII[3] * self._directions(made, count)
        for radius, centres_ND, at in zip(_RADII, self._centres, groups, strict=False):
            vectors_ND += radius * centres_ND[at]
        return normalize(vectors_ND)

    def _directions(self, made: np.random.Generator, count: int) -> np.ndarray:
        return made.standard_normal((count, self.dim), dtype=np.float32) / np.float32(self.dim**0.5)
