"""The paper's tables: which models each is made of, and the two scales (``tables.yaml``). Nothing is run here.

A scale says which base models, how many steps and which tasks. ``paper`` is the paper's size and needs a GPU and the
hub. ``starter`` is the smallest at which every table can be run on two CPU cores: it shows that the commands work and
which way a setting pulls, not the paper's scores. Rows that are ours and not the paper's have no ``paper`` label.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml

from gemify.evaluation.mteb_tasks import GEM16
from gemify.evaluation.report.comparison import TABLES
from gemify.training.recipe import PRESETS

_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TABLE_NAMES: tuple[str, ...] = tuple(_DATA["tables"])
GATED: dict[str, Any] = _DATA["gated"]
"""What the gated rows change: no raw rows, and learning rates for a rank-16 adapter (recipes/gated.yaml)."""


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


def _base(values: Mapping[str, Any]) -> Base:
    return Base(**{**values, "tables": tuple(values.get("tables", TABLE_NAMES))})


PAPER_BASES: tuple[Base, ...] = tuple(map(_base, _DATA["bases"]))
SCALES: dict[str, Scale] = {
    name: Scale(
        **{
            "name": name,
            **values,
            "bases": tuple(map(_base, values["bases"])) if "bases" in values else PAPER_BASES,
            "vectors": tuple(values.get("vectors", GEM16)),
            "language": tuple(values["language"]),
        }
    )
    for name, values in _DATA["scales"].items()
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
    if table not in TABLE_NAMES:
        raise ValueError(f"unknown table {table!r}: choose one of {', '.join(TABLE_NAMES)}")
    rows = [row for row in _DATA["tables"][table] if scale.gated or not row["kind"].startswith("gated")]
    return tuple(_cell(scale, base, **row) for base in scale.bases_of(table) for row in rows)


def title_of(table: str) -> str:
    """What a table shows."""
    return TABLES[table].title if table in TABLES else "Recovery of a text from its special token, by length"


def _cell(
    scale: Scale,
    base: Base,
    *,
    kind: str,
    label: str,
    paper: str | None = None,
    p: float = 0.8,
    k: int = 1,
    **more: Any,
) -> TableCell:
    number = {"ntp": f"-p{p}", "gem": f"-k{k}", "gated": f"-k{k}"}.get(kind, "")
    changes = {"mix": p} if kind == "ntp" else {"special_tokens": k}
    ntp_only, gated = kind.endswith("ntp"), kind.startswith("gated")
    recipe = None if kind == "vanilla" else scale.values(base, ntp_only=ntp_only, gated=gated, **changes)
    label, paper = label.format(**vars(base)), paper and paper.format(**vars(base))
    return TableCell(f"{base.short}-{kind}{number}", label, base.name, recipe, paper, **more)
