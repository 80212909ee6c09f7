"""Evaluated models, read from one or several result directories, and their figures compared; published figures.

Numbers only: `sections` writes them as tables, `plots` draws them. A figure that was not measured is None. A mean is
over all its tasks, or None. Figures that others published, the GEM paper's tables and peers' scores, are in
``published.yaml``.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gemify.evaluation.mteb_tasks import DEVELOPMENT_TASKS, TYPES, task_type
from gemify.evaluation.results import KINDS, Kind, ModelEntry, ResultStore

CellResult = Mapping[str, Any]
"""What the store holds of one model on one task."""
RAW_METRICS = frozenset({"loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"})
"""Metrics shown as they are; lower is better. All others are shares from 0 to 1, shown times 100."""
BUCKETS = ((1, 8), (9, 16), (17, 32), (33, 64), (65, None))
"""Text lengths in tokens that recovery is reported by, both ends included."""
SUBSET = "SUBSET RUN"
"""Marks every title and label with figures that were measured on some samples of each task only."""
_MAX_WORDS = 60  # of a recovered text; longer ones are cut


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and all that was measured of it."""

    entry: ModelEntry
    label: str
    """For people; unique in the report. Names the settings where models differ in nothing else."""
    scores: Mapping[str, float]
    """Score of each embedding task, 0 to 100."""
    cells: Mapping[Kind, Mapping[str, CellResult]]
    base: EvaluatedModel | None = None
    """The model that its language cells are compared with."""

    def fact(self, name: str) -> Any:
        """A fact of the model's entry, or None."""
        return self.entry.facts.get(name)

    def cell(self, kind: Kind, task: str) -> CellResult | None:
        """A finished cell, or None."""
        return self.cells[kind].get(task)

    @property
    def is_subset(self) -> bool:
        """Whether it was measured on some samples of each task only."""
        return self.fact("limit") is not None


@dataclass(frozen=True)
class LanguageRow:
    """A language metric of a model beside its base's, in the units it is shown in."""

    task: str
    metric: str
    n: int
    base: float | None
    value: float
    error: float | None = None
    """Standard error of the difference, paired over the samples."""
    identical: bool = False
    """Whether both models are equal in every sample."""
    comparable: bool = True
    """Whether both models were measured on equally many samples with the same numerics."""

    @property
    def raw(self) -> bool:
        """Whether the metric is one of `RAW_METRICS`."""
        return self.metric in RAW_METRICS

    @property
    def difference(self) -> float | None:
        """This model less its base; None where the two are not comparable."""
        return self.value - self.base if self.base is not None and self.comparable else None


@dataclass(frozen=True)
class Bucket:
    """Recovery of the texts of some lengths: shares from 0 to 1, None where not measured."""

    label: str
    n: int
    exact: float | None
    token_f1: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class DiffWord:
    """A word of a text that is compared with another one."""

    text: str
    differs: bool = False
    """Whether the other text lacks it at this place."""


# Reading


def load_models(directories: Sequence[Path]) -> list[EvaluatedModel]:
    """The models in result directories, in order of name.

    A model in several directories has the cells of all of them; of two equal cells the first directory's counts.

    Raises:
        ValueError: No directory is given, or one holds no models.
    """
    if not directories:
        raise ValueError("a report needs at least one directory of results, got none: name those an evaluation wrote")
    stores = [ResultStore(Path(directory)) for directory in directories]
    found: dict[tuple[str, str], ModelEntry] = {}
    for store in stores:
        entries = store.entries()
        if not entries:
            state = "holds no evaluated model" if store.directory.exists() else "does not exist"
            raise ValueError(
                f"{store.directory} {state}: a report needs directories that an evaluation wrote (with a folder"
                " `models` in them); evaluate a model into it first, or name another"
            )
        for entry in entries:
            found.setdefault(entry.key, entry)
    labels = _labels([found[key] for key in sorted(found)])
    return [_read_model(stores, found[key], found, labels) for key in sorted(found)]


def load_model(store: ResultStore, entry: ModelEntry) -> EvaluatedModel:
    """One model of a store.

    Raises:
        ValueError: The store has no such model.
    """
    models = {model.entry.key: model for model in load_models([store.directory])}
    if entry.key not in models:
        raise ValueError(
            f"{store.directory} has no results of {entry.name} {entry.revision}: evaluate it first, or give one of"
            f" {', '.join(f'{name} {revision}' for name, revision in models)}"
        )
    return models[entry.key]


def _read_model(
    stores: Sequence[ResultStore],
    entry: ModelEntry,
    known: Mapping[tuple[str, str], ModelEntry],
    labels: Mapping[tuple[str, str], str],
) -> EvaluatedModel:
    base = None
    if pair := entry.facts.get("base_subject"):
        key = (str(pair["name"]), str(pair["revision"]))
        other = known.get(key, ModelEntry(*key))
        base = EvaluatedModel(other, labels.get(key, other.name), {}, _read_cells(stores, other))
    scores: dict[str, float] = {}
    for store in stores:
        for task, result in store.scores(entry).items():
            scores.setdefault(task, float(result["score"]))
    return EvaluatedModel(entry, labels[entry.key], scores, _read_cells(stores, entry), base)


def _read_cells(stores: Sequence[ResultStore], entry: ModelEntry) -> dict[Kind, dict[str, CellResult]]:
    by_rank = list(reversed(stores))  # the first directory's cells replace the others'
    return {kind: {t: c for store in by_rank for t, c in store.cells(kind, entry).items()} for kind in KINDS}


def describe_settings(facts: Mapping[str, Any], names: Iterable[str] = ("dtype", "instructions", "limit")) -> list[str]:
    """The settings that a figure depends on, a few words each."""
    words = {
        "dtype": _precision(facts),
        "instructions": "with instructions" if facts.get("instructions") else "no instructions",
        "limit": "whole tasks" if facts.get("limit") is None else f"{SUBSET}, limit {facts['limit']}",
    }
    return [words[name] for name in names]


def _precision(facts: Mapping[str, Any]) -> str:
    return str(facts.get("quantize") or facts.get("dtype") or "dtype not known")


def _labels(entries: Sequence[ModelEntry]) -> dict[tuple[str, str], str]:
    """A label for each entry, no two alike; that of a subset run always says so."""
    plain = {e.key: str(e.facts.get("label") or e.name) for e in entries}
    labels = {}
    for entry in entries:
        alike = [e for e in entries if plain[e.key] == plain[entry.key]]
        differ = [n for n in ("dtype", "instructions") if len({describe_settings(e.facts, [n])[0] for e in alike}) > 1]
        if entry.facts.get("limit") is not None:
            differ.append("limit")
        words = describe_settings(entry.facts, differ)
        labels[entry.key] = f"{plain[entry.key]} ({', '.join(words)})" if words else plain[entry.key]
    counts = Counter(labels.values())
    return {k: f"{label} [{k[0]} {k[1]}]" if counts[label] > 1 else label for k, label in labels.items()}


# Embedding


def tasks_by_type(models: Sequence[EvaluatedModel]) -> dict[str, list[str]]:
    """The tasks that any of the models has a score of, by mteb's type."""
    by_type: dict[str, list[str]] = {}
    for task in sorted({task for model in models for task in model.scores}):
        by_type.setdefault(task_type(task), []).append(task)
    order = [*TYPES, *sorted(set(by_type) - set(TYPES))]
    return {name: by_type[name] for name in order if name in by_type}


def without_development(tasks: Iterable[str]) -> list[str]:
    """The tasks that belong in a mean: all but development splits."""
    return [task for task in tasks if task not in DEVELOPMENT_TASKS]


def mean_score(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """Mean over the tasks; None without tasks, or if one has no score."""
    if not tasks or not all(task in scores for task in tasks):
        return None
    return sum(scores[task] for task in tasks) / len(tasks)


# Language


def language_rows(model: EvaluatedModel) -> list[LanguageRow]:
    """The model's language metrics beside its base's; losses come last.

    A group of several tasks (the subjects of MMLU) gives two rows: ``macro``, the mean over the tasks, and ``micro``,
    weighted by their number of samples.
    """
    cells = model.cells["language"]
    base = model.base.cells["language"] if model.base else {}
    groups: dict[str, list[str]] = {}
    for task, cell in cells.items():
        groups.setdefault(str(cell.get("group") or task), []).append(task)
    rows = []
    for group, tasks in sorted(groups.items()):
        if len(tasks) == 1 and not group.startswith("mmlu"):
            row, _ = _group_rows(group, [(cells[tasks[0]], base.get(tasks[0]))])
            rows.append(replace(row, task="held-out loss" if group == "held_out" else group))
        else:
            both = [task for task in tasks if task in base]
            pairs = [(cells[task], base.get(task)) for task in both or tasks]
            rows.extend(_group_rows(group.replace("mmlu", "MMLU"), pairs))
    return sorted(rows, key=lambda row: row.raw)


def macro_mean(cells: Sequence[CellResult], metric: str) -> float:
    """Mean of a metric over tasks, each counted once, in shown units."""
    return sum(_value(cell, metric) for cell in cells) / len(cells)


def _micro_mean(cells: Sequence[CellResult], metric: str) -> float:
    return sum(_value(cell, metric) * cell["n"] for cell in cells) / sum(cell["n"] for cell in cells)


def _group_rows(group: str, pairs: Sequence[tuple[CellResult, CellResult | None]]) -> list[LanguageRow]:
    cells, bases = [cell for cell, _ in pairs], [base for _, base in pairs if base is not None]
    differences = [found for pair in pairs if (found := _paired_differences(*pair)) is not None]
    errors = [error for found in differences if (error := _standard_error(found)) is not None]
    macro_error = math.sqrt(sum(e * e for e in errors)) / len(pairs) if len(errors) == len(pairs) else None
    micro_error = _standard_error(np.concatenate(differences) if len(differences) == len(pairs) else None)

    metric = str(cells[0]["main"])

    def row(name: str, mean: Callable[[Sequence[CellResult], str], float], error: float | None) -> LanguageRow:
        return LanguageRow(
            f"{group} {name} ({len(pairs)} subjects)",
            metric,
            sum(int(cell["n"]) for cell in cells),
            mean(bases, metric) if bases else None,
            mean(cells, metric),
            error,
            all(_are_identical(*pair) for pair in pairs),
            all(_are_comparable(*pair) for pair in pairs),
        )

    return [row("macro", macro_mean, macro_error), row("micro", _micro_mean, micro_error)]


def _scale(metric: str) -> float:
    return 1.0 if metric in RAW_METRICS else 100.0


def _value(cell: CellResult, metric: str) -> float:
    return _scale(metric) * float(cell["metrics"][metric])


def _are_comparable(cell: CellResult, base: CellResult | None) -> bool:
    return base is not None and all(cell.get(key) == base.get(key) for key in ("n", "main", "arithmetic"))


def _are_identical(cell: CellResult, base: CellResult | None) -> bool:
    if base is None or not _are_comparable(cell, base) or not cell.get("per_sample"):
        return False
    return (
        bool(cell["per_sample"] == base.get("per_sample"))
        and cell["metrics"][cell["main"]] == base["metrics"][cell["main"]]
    )


def _paired_differences(cell: CellResult, base: CellResult | None) -> np.ndarray | None:
    """The difference of each sample, in shown units; None if the samples are not the same ones."""
    if base is None or not _are_comparable(cell, base):
        return None
    ours, theirs = cell.get("per_sample") or [], base.get("per_sample") or []
    if not ours or len(ours) != len(theirs):
        return None
    return _scale(str(cell["main"])) * (np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))


def _standard_error(differences: np.ndarray | None) -> float | None:
    if differences is None or len(differences) < 2:
        return None
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences)))


# Recovery


def recovery_buckets(rows: Sequence[CellResult]) -> list[Bucket]:
    """Recovery by the text's length in tokens: the lengths that occur, then ``all``."""
    found = []
    for low, high in BUCKETS:
        inside = [row for row in rows if row["tokens"] >= low and (high is None or row["tokens"] <= high)]
        if inside:
            found.append(_bucket(f"{low}+" if high is None else f"{low}-{high}", inside))
    return [*found, _bucket("all", rows)] if rows else []


def _bucket(label: str, rows: Sequence[CellResult]) -> Bucket:
    def mean(name: str) -> float | None:
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        return sum(values) / len(values) if len(values) == len(rows) else None

    return Bucket(label, len(rows), mean("exact"), mean("token_f1"), mean("rouge_l"))


def sample_by_length(rows: Sequence[CellResult], count: int = 12) -> list[CellResult]:
    """At most ``count`` rows, evenly over the lengths of their texts."""
    ordered = sorted(rows, key=lambda row: row["tokens"])
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def diff_words(text: str, other: str) -> tuple[list[DiffWord], list[DiffWord]]:
    """The words of two texts, marked where the other text lacks them. Long texts are cut."""
    ours, theirs = text.split(), other.split()
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    common = [(b.a + i, b.b + i) for b in matcher.get_matching_blocks() for i in range(b.size)]
    return _mark_words(ours, {a for a, _ in common}), _mark_words(theirs, {b for _, b in common})


def _mark_words(words: Sequence[str], common: set[int]) -> list[DiffWord]:
    marked = [DiffWord(word, at not in common) for at, word in enumerate(words[:_MAX_WORDS])]
    return [*marked, DiffWord("…")] if len(words) > _MAX_WORDS else marked


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


_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))

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
