"""The paper's tables as plain data: which models each is made of, and the two scales. Nothing is run here.

    table1   main results: each base mean-pooled, and its GEM, by task type and MMLU
    table2   the share p of raw rows, next-token prediction only
    table3   what each objective adds
    table4   1, 2, 5 and 10 special tokens
    table5   size of the base
    table6   recovery by length (Appendix B: the paper prints examples, and no figures)

Rows that are ours and not the paper's have no ``paper`` label.

A scale says which base models, how many steps and which tasks. ``paper`` is the paper's size and needs a GPU and the
hub. ``starter`` is the smallest at which every table can be run on two CPU cores: it shows that the commands work and
which way a setting pulls, not the paper's scores.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from gemify.evaluation.report.published import TABLES
from gemify.evaluation.task_suites import GEM16
from gemify.training.recipe import PRESETS

TABLE_NAMES = ("table1", "table2", "table3", "table4", "table5", "table6")


@dataclass(frozen=True)
class Base:
    """A base model, and the rows of the paper it is compared with."""

    name: str
    """For `gemify.model.base.load_base`: ``starter``, a directory or a repo id."""
    short: str
    """Name in labels and directories."""
    vanilla: str = "Llama-3.2-1B, mean-pooled"
    gem: str = "GEM Llama-3.2-1B"
    """Rows of table 1."""
    size: str = "1B"
    """Row of table 5."""
    tables: tuple[str, ...] = TABLE_NAMES
    """The tables that show it."""


@dataclass(frozen=True)
class Scale:
    """One size for all tables. ``steps`` and ``ntp_steps`` are optimizer steps; ``limit`` cuts each language task."""

    name: str
    bases: tuple[Base, ...]
    steps: int
    ntp_steps: int
    vectors: tuple[str, ...]
    """Embedding tasks, mteb's names."""
    language: tuple[str, ...]
    recovery: int
    """Texts to decode back (table 6)."""
    limit: int | None
    instructions: bool
    """Whether embedding tasks come with instructions, as in the paper (those of LLM2Vec)."""
    gated: bool
    """Whether gated rows, which the paper has not, are shown too."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the paper's recipe (Section 4.2), apart from the steps."""
    precision: str = "bf16"
    """Of training: full fine-tuning keeps float32 weights and computes under autocast."""
    dtype: str = "bfloat16"
    """Of evaluation."""

    def bases_of(self, table: str) -> tuple[Base, ...]:
        """The base models that take part in a table."""
        return tuple(base for base in self.bases if table in base.tables)

    def values(self, base: Base, *, ntp_only: bool = False, gated: bool = False, **changes: Any) -> dict[str, Any]:
        """The entries of a training recipe, without its data: the paper's preset at this scale, with ``changes``."""
        return {
            **PRESETS["paper"],
            **self.recipe,
            **(GATED if gated else {}),
            "base": base.name,
            "max_steps": self.steps,
            "ntp_steps": self.steps if ntp_only else self.ntp_steps,
            "precision": self.precision,
            **changes,
        }


GATED: dict[str, Any] = {
    "tune": "gated",
    "mix": None,
    "append_end": True,
    "lr": 1e-3,
    "contrastive_lr": 2e-3,
    "warmup_steps": 5,
}
"""What the gated rows change: no raw rows, and learning rates for a rank-16 adapter (recipes/starter-gated.yaml)."""

_LLAMA_1B = Base("meta-llama/Llama-3.2-1B", "Llama-3.2-1B", tables=("table1", "table2", "table3", "table4", "table5"))
PAPER_BASES = (
    _LLAMA_1B,
    Base(
        "meta-llama/Llama-3.2-3B",
        "Llama-3.2-3B",
        "Llama-3.2-3B",
        "GEM Llama-3.2-3B",
        "3B",
        tables=("table1", "table5"),
    ),
    Base(
        "meta-llama/Meta-Llama-3-8B",
        "Llama-3-8B",
        "Llama-3-8B",
        "GEM Llama-3-8B",
        "8B",
        tables=("table1", "table5", "table6"),
    ),
    Base("mistralai/Mistral-7B-v0.1", "Mistral-7B", "Mistral-7B", "GEM Mistral-7B", "7B", tables=("table1",)),
)

SCALES: dict[str, Scale] = {
    "starter": Scale(
        "starter",
        bases=(Base("starter", "starter"),),
        steps=20,
        ntp_steps=10,
        vectors=("STSBenchmark", "Banking77Classification"),
        language=("held_out", "mmlu"),
        recovery=100,
        limit=10,
        instructions=False,
        gated=True,
        # Ten steps at the paper's 1e-5 would move nothing; six special rows in 32 leave next to no negatives.
        recipe={"max_length": 64, "contrastive_batch_size": 32, "contrastive_lr": 1e-4},
    ),
    "paper": Scale(
        "paper",
        bases=PAPER_BASES,
        steps=1000,
        ntp_steps=100,
        vectors=GEM16,
        language=("mmlu",),
        recovery=500,
        limit=None,
        instructions=True,
        gated=False,
    ),
}


def scale_of(name: str, *, base: str | None = None, steps: int | None = None, limit: int | None = None) -> Scale:
    """Get a named scale, with another base for all tables, other steps or another limit.

    The share of next-token steps stays.

    A base that the paper does not have is compared with its smallest, Llama-3.2-1B.
    """
    if name not in SCALES:
        raise ValueError(f"unknown scale {name!r}: choose one of {', '.join(SCALES)}")
    scale = SCALES[name]
    if base is not None:
        short = re.sub(r"[^\w.\-]", "_", PurePath(base).name)
        known = {b.name: b for b in PAPER_BASES}.get(base, Base(base, short))
        scale = dataclasses.replace(scale, bases=(dataclasses.replace(known, tables=TABLE_NAMES),))
    if steps is not None:
        if steps < 2:
            raise ValueError(f"steps must be at least 2 (next-token, then contrastive), got {steps}")
        ntp_steps = min(steps - 1, max(1, round(steps * scale.ntp_steps / scale.steps)))
        scale = dataclasses.replace(scale, steps=steps, ntp_steps=ntp_steps)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        scale = dataclasses.replace(scale, limit=limit)
    return scale


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
