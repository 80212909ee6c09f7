"""The paper's tables as plain data: which models each is made of. Nothing is run here.

    table1   main results: each base mean-pooled, and its GEM, by task type and MMLU
    table2   the share p of raw rows, next-token prediction only
    table3   what each objective adds
    table4   1, 2, 5 and 10 special tokens
    table5   size of the base
    table6   recovery by length (Appendix B: the paper prints examples, and no figures)

Rows that are ours and not the paper's have no ``paper`` label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gemify.evaluation.report.published import TABLES
from gemify.reproduce.scales import TABLE_NAMES, Base, Scale

Measure = Literal["scores", "recovery"]


@dataclass(frozen=True)
class TableCell:
    """One model of a table: how it is trained, and what is measured. Equal names are equal models, in all tables."""

    name: str
    """Name of its run's directory."""
    label: str
    """Label of its row; cells of one label share a row."""
    base: str
    recipe: Mapping[str, Any] | None = field(default=None, hash=False)
    """Entries of a training recipe without its data; None: the base itself, mean-pooled."""
    paper: str | None = None
    """The row of the paper's table to compare with."""
    part: str = ""
    """Suffix of a column's name, where a row has several cells (table 5)."""
    measure: Measure = "scores"

    @property
    def steps(self) -> int:
        """Optimizer steps of training; 0 if nothing is trained."""
        return 0 if self.recipe is None else int(self.recipe["max_steps"])

    @property
    def untouched(self) -> bool:
        """Whether the language model is the base, so that the base's language scores are the cell's own."""
        return self.recipe is None or self.recipe["tune"] == "gated"


def cells_of(table: str, scale: Scale) -> tuple[TableCell, ...]:
    """The cells of a table at a scale; ValueError for a table the paper does not have."""
    if table not in _CELLS:
        raise ValueError(f"unknown table {table!r}: choose one of {', '.join(TABLE_NAMES)}")
    return tuple(cell for base in scale.bases_of(table) for cell in _CELLS[table](scale, base))


def title_of(table: str) -> str:
    """What a table shows."""
    return TABLES[table].title if table in TABLES else "Recovery of a text from its special token, by length"


def _table1(scale: Scale, base: Base) -> list[TableCell]:
    ours = [_gated(scale, base, f"gated {base.short}")] if scale.gated else []
    vanilla = _vanilla(base, f"{base.short}, mean-pooled", paper=base.vanilla)
    return [vanilla, _gem(scale, base, f"GEM {base.short}", paper=base.gem), *ours]


def _table2(scale: Scale, base: Base) -> list[TableCell]:
    rates = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
    ours = [_gated(scale, base, "gated, no raw rows", ntp_only=True)] if scale.gated else []
    return [*(_ntp(scale, base, str(p), paper=str(p), p=p) for p in rates), *ours]


def _table3(scale: Scale, base: Base) -> list[TableCell]:
    paper = [
        _vanilla(base, "vanilla", paper="vanilla"),
        _ntp(scale, base, "+ mixed NTP", paper="+ mixed NTP"),
        _gem(scale, base, "+ contrastive", paper="+ contrastive"),
    ]
    ours = [_gated(scale, base, "gated NTP", ntp_only=True), _gated(scale, base, "gated NTP + contrastive")]
    return paper + (ours if scale.gated else [])


def _table4(scale: Scale, base: Base) -> list[TableCell]:
    counts = (1, 2, 5, 10)
    paper = [_gem(scale, base, str(k), paper=str(k), k=k) for k in counts]
    return paper + ([_gated(scale, base, f"gated, {k}", k=k) for k in counts] if scale.gated else [])


def _table5(scale: Scale, base: Base) -> list[TableCell]:
    label = base.short
    return [
        _vanilla(base, label, paper=base.size, part=", vanilla"),
        _gem(scale, base, label, paper=base.size, part=", GEM"),
    ]


def _table6(scale: Scale, base: Base) -> list[TableCell]:
    """Recovery of texts of rising length from one special token's KV alone (Appendix B).

    The paper shows examples from an 8B model (verbatim up to about 30 tokens, then a paraphrase) and gives no figures,
    so these rows have none of the paper's below them. Rows with next-token steps only are there too, as the contrastive
    steps train no recovery.
    """
    full = [
        _ntp(scale, base, "mixed NTP", measure="recovery"),
        _gem(scale, base, "GEM", measure="recovery"),
    ]
    ours = [
        _gated(scale, base, "gated NTP", ntp_only=True, measure="recovery"),
        _gated(scale, base, "gated", measure="recovery"),
    ]
    return full + (ours if scale.gated else [])


_CELLS: dict[str, Callable[[Scale, Base], list[TableCell]]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
}


def _vanilla(base: Base, label: str, *, paper: str, part: str = "") -> TableCell:
    return TableCell(f"{base.short}-vanilla", label, base.name, paper=paper, part=part)


def _ntp(
    scale: Scale, base: Base, label: str, *, paper: str | None = None, p: float = 0.8, measure: Measure = "scores"
) -> TableCell:
    recipe = scale.values(base, ntp_only=True, mix=p)
    return TableCell(f"{base.short}-ntp-p{p}", label, base.name, recipe, paper, measure=measure)


def _gem(
    scale: Scale,
    base: Base,
    label: str,
    *,
    paper: str | None = None,
    k: int = 1,
    part: str = "",
    measure: Measure = "scores",
) -> TableCell:
    recipe = scale.values(base, special_tokens=k)
    return TableCell(f"{base.short}-gem-k{k}", label, base.name, recipe, paper, part, measure)


def _gated(
    scale: Scale, base: Base, label: str, *, k: int = 1, ntp_only: bool = False, measure: Measure = "scores"
) -> TableCell:
    recipe = scale.values(base, gated=True, ntp_only=ntp_only, special_tokens=k)
    name = f"{base.short}-gated-ntp" if ntp_only else f"{base.short}-gated-k{k}"
    return TableCell(name, label, base.name, recipe, measure=measure)
