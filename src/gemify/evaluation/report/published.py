"""Figures others published (``published.yaml``): the GEM paper's tables and peers' scores. Nothing measured here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class PaperRow:
    """A row as printed. None: the paper gives no figure (or says "none" or "n/a")."""

    label: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PaperTable:
    """A table of arXiv 2506.04344v1, in percent."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    def value(self, label: str, column: str) -> float | None:
        """The figure in a row and a column; ValueError for names the table does not have."""
        labels = tuple(row.label for row in self.rows)
        if label not in labels or column not in self.columns:
            raise ValueError(
                f"table {self.number} has no {label!r}, {column!r}: its rows are {', '.join(labels)},"
                f" its columns {', '.join(self.columns)}"
            )
        return self.rows[labels.index(label)].values[self.columns.index(column)]


_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

TABLES: dict[str, PaperTable] = {
    name: PaperTable(
        int(name.removeprefix("table")),
        table["title"],
        tuple(table["columns"]),
        tuple(PaperRow(label, tuple(values)) for label, values in table["rows"].items()),
    )
    for name, table in _DATA["tables"].items()
}
"""Tables 1 to 5 of arXiv 2506.04344v1, "table1" to "table5"."""
PAPER_ROWS: tuple[str, ...] = tuple(_DATA["paper_rows"])
"""The rows of table 1 nearest in size to what is measured here."""
PEERS: dict[str, dict[str, float]] = _DATA["peers"]
"""Peers' published MTEB scores, by task."""
NINE_MEANS: dict[str, float] = _DATA["nine_means"]
"""Means over `NINE` of peers' published MTEB scores."""
