"""What a report says: evaluated models from one or several result directories, their figures compared, as tables.

Plain data only, no layout: `page` turns it into Markdown and HTML, `plots` draws it. A figure that was not measured is
None here and a dash in a table; a mean is of all its tasks or is not given.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemify.evaluation.results import KINDS, Kind, ModelEntry, ResultStore
from gemify.evaluation.task_suites import DEVELOPMENT_TASKS, TYPES, task_type

Cell = Mapping[str, Any]
RAW_METRICS = frozenset({"loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"})
"""Metrics shown as they are, where lower is better; all others are shares, shown times 100."""
BUCKETS = ((1, 8), (9, 16), (17, 32), (33, 64), (65, None))
"""Lengths of texts in tokens that recovery is reported by, both ends included."""
_WORDS_SHOWN = 60  # of a recovered text; longer ones are cut


@dataclass(frozen=True)
class Model:
    """A model entry with all that was measured of it."""

    entry: ModelEntry
    label: str
    """For people, and for this model alone in the report: names the settings where they are what differs."""
    scores: Mapping[str, float]
    """Embedding tasks, 0 to 100."""
    cells: Mapping[Kind, Mapping[str, Cell]]
    base: Model | None = None
    """The model that its language cells are compared with."""

    def fact(self, name: str) -> Any:
        return self.entry.facts.get(name)

    def cell(self, kind: Kind, task: str) -> Cell | None:
        return self.cells[kind].get(task)

    @property
    def is_subset(self) -> bool:
        """Whether it was measured on some samples of each task only."""
        return self.fact("limit") is not None


@dataclass(frozen=True)
class LanguageRow:
    """A language measure of a model beside its base's, in the units it is shown in."""

    task: str
    metric: str
    n: int
    base: float | None
    value: float
    error: float | None = None
    """Standard error of the difference, paired over the samples."""
    identical: bool = False
    """Whether both sides are equal in every single sample."""
    comparable: bool = True
    """Whether both sides were measured on the same samples, as far as their number tells, in the same arithmetic."""

    @property
    def raw(self) -> bool:
        return self.metric in RAW_METRICS

    @property
    def difference(self) -> float | None:
        return self.value - self.base if self.base is not None and self.comparable else None


@dataclass(frozen=True)
class Bucket:
    """Recovery of the texts of some lengths; shares from 0 to 1, None where not measured."""

    label: str
    n: int
    exact: float | None
    token_f1: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class DiffWord:
    """A word of a text that is compared with another; ``differs``: the other lacks it there."""

    text: str
    differs: bool = False


# Reading


def load(directories: Sequence[Path]) -> list[Model]:
    """The models in the directories, in order of name. The same entry in several of them is one model with the cells
    of all; where both have a cell the first directory's counts. ValueError for a directory without models."""
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
            found.setdefault((entry.name, entry.revision), entry)
    labels = _labels([found[key] for key in sorted(found)])
    return [_model(stores, found[key], found, labels) for key in sorted(found)]


def one_model(store: ResultStore, entry: ModelEntry) -> Model:
    """A single model of a store."""
    found = {(s.name, s.revision): s for s in store.entries()}
    key = (entry.name, entry.revision)
    if key not in found and not entry.facts:
        raise ValueError(
            f"{store.directory} has no results of {entry.name} {entry.revision}: evaluate it first, or give one of"
            f" {', '.join(f'{n} {r}' for n, r in sorted(found)) or 'the models in another directory'}"
        )
    found.setdefault(key, entry)
    return _model([store], found[key], found, _labels(list(found.values())))


def _model(
    stores: Sequence[ResultStore],
    entry: ModelEntry,
    known: Mapping[tuple[str, str], ModelEntry],
    labels: Mapping[tuple[str, str], str],
) -> Model:
    base = None
    if pair := entry.facts.get("base_subject"):
        key = (str(pair["name"]), str(pair["revision"]))
        other = known.get(key, ModelEntry(*key))
        base = Model(other, labels.get(key, other.name), {}, _cells(stores, other))
    scores: dict[str, float] = {}
    for store in stores:
        for task, result in store.scores(entry).items():
            scores.setdefault(task, float(result["score"]))
    return Model(entry, labels[entry.name, entry.revision], scores, _cells(stores, entry), base)


def _cells(stores: Sequence[ResultStore], entry: ModelEntry) -> dict[Kind, dict[str, Cell]]:
    merged: dict[Kind, dict[str, Cell]] = {}
    for kind in KINDS:
        merged[kind] = {}
        for store in stores:
            for task, cell in store.cells(kind, entry).items():
                merged[kind].setdefault(task, cell)
    return merged


def describe_settings(facts: Mapping[str, Any], among: Iterable[str] = ("dtype", "instructions", "limit")) -> list[str]:
    """The settings a figure depends on, a few words each."""
    words = {
        "dtype": str(facts.get("dtype") or "dtype not known"),
        "instructions": "with instructions" if facts.get("instructions") else "no instructions",
        "limit": "whole tasks" if facts.get("limit") is None else f"SUBSET RUN, limit {facts['limit']}",
    }
    return [words[name] for name in among]


def _labels(entries: Sequence[ModelEntry]) -> dict[tuple[str, str], str]:
    """A label for each entry, no two alike; a subset run always says so."""
    plain = {(s.name, s.revision): str(s.facts.get("label") or s.name) for s in entries}
    labels = {}
    for entry in entries:
        key = (entry.name, entry.revision)
        alike = [s for s in entries if plain[s.name, s.revision] == plain[key]]
        differ = [n for n in ("dtype", "instructions") if len({s.facts.get(n) for s in alike}) > 1]
        if entry.facts.get("limit") is not None:
            differ.append("limit")
        words = describe_settings(entry.facts, differ)
        labels[key] = f"{plain[key]} ({', '.join(words)})" if words else plain[key]
    counts = Counter(labels.values())
    return {k: f"{label} [{k[0]} {k[1]}]" if counts[label] > 1 else label for k, label in labels.items()}


# Embedding


def tasks_by_type(models: Sequence[Model]) -> dict[str, list[str]]:
    """The tasks that any of the models has a score of, by mteb's type."""
    by_type: dict[str, list[str]] = {}
    for task in sorted({task for model in models for task in model.scores}):
        by_type.setdefault(task_type(task), []).append(task)
    order = [*TYPES, *sorted(set(by_type) - set(TYPES))]
    return {name: by_type[name] for name in order if name in by_type}


def counted(tasks: Iterable[str]) -> list[str]:
    """The tasks that belong in a mean: all but development splits."""
    return [task for task in tasks if task not in DEVELOPMENT_TASKS]


def mean_score(model: Model, tasks: Sequence[str]) -> float | None:
    """Mean score over the tasks; None if there are none, or if the model lacks one."""
    if not tasks or not all(task in model.scores for task in tasks):
        return None
    return sum(model.scores[task] for task in tasks) / len(tasks)


# Language


def language_rows(model: Model) -> list[LanguageRow]:
    """The model's language measures beside its base's. Tasks of a group of several (MMLU's subjects) give two rows:
    ``macro``, the mean over the tasks, and ``micro``, weighted by their number of samples."""
    mine = model.cells["language"]
    base = model.base.cells["language"] if model.base else {}
    rows, groups = [], dict[str, list[str]]()
    for task, cell in mine.items():
        groups.setdefault(str(cell.get("group") or task), []).append(task)
    for group, tasks in sorted(groups.items()):
        if len(tasks) == 1 and not group.startswith("mmlu"):
            rows.append(_single(group, mine[tasks[0]], base.get(tasks[0])))
            continue
        both = [task for task in tasks if task in base]
        pairs = [(mine[task], base.get(task)) for task in both or tasks]
        rows.extend(_grouped(group.replace("mmlu", "MMLU"), pairs))
    return sorted(rows, key=lambda row: row.raw)


def _single(task: str, mine: Cell, base: Cell | None) -> LanguageRow:
    value = _value(mine)
    gaps = _gaps(mine, base)
    return LanguageRow(
        "held-out loss" if task == "held_out" else task,
        str(mine["main"]),
        int(mine["n"]),
        None if base is None else _value(base, str(mine["main"])),
        value,
        _standard_error(gaps),
        _identical(mine, base),
        _comparable(mine, base),
    )


def _grouped(group: str, pairs: Sequence[tuple[Cell, Cell | None]]) -> list[LanguageRow]:
    n = sum(int(mine["n"]) for mine, _ in pairs)
    metric = str(pairs[0][0]["main"])
    against = [base for _, base in pairs if base is not None]
    gaps = [_gaps(mine, base) for mine, base in pairs]
    whole = [g for g in gaps if g is not None]
    pooled = np.concatenate(whole) if len(whole) == len(pairs) else None
    errors = [_standard_error(g) for g in gaps]
    known = [e for e in errors if e is not None]
    macro_error = math.sqrt(sum(e * e for e in known)) / len(pairs) if len(known) == len(pairs) else None

    def row(name: str, mean: Callable[[Sequence[Cell]], float], error: float | None) -> LanguageRow:
        return LanguageRow(
            f"{group} {name} ({len(pairs)} subjects)",
            metric,
            n,
            mean(against) if against else None,
            mean([mine for mine, _ in pairs]),
            error,
            all(_identical(*pair) for pair in pairs),
            all(_comparable(*pair) for pair in pairs),
        )

    def macro(cells: Sequence[Cell]) -> float:
        return sum(_value(cell, metric) for cell in cells) / len(cells)

    def micro(cells: Sequence[Cell]) -> float:
        return sum(_value(cell, metric) * cell["n"] for cell in cells) / sum(cell["n"] for cell in cells)

    return [row("macro", macro, macro_error), row("micro", micro, _standard_error(pooled))]


def _scale(metric: str) -> float:
    return 1.0 if metric in RAW_METRICS else 100.0


def _value(cell: Cell, metric: str | None = None) -> float:
    metric = metric or str(cell["main"])
    return _scale(metric) * float(cell["metrics"][metric])


def _comparable(mine: Cell, base: Cell | None) -> bool:
    return base is not None and all(mine.get(key) == base.get(key) for key in ("n", "main", "arithmetic"))


def _identical(mine: Cell, base: Cell | None) -> bool:
    if base is None or not _comparable(mine, base) or not mine.get("per_sample"):
        return False
    return bool(mine["per_sample"] == base.get("per_sample")) and _value(mine) == _value(base)


def _gaps(mine: Cell, base: Cell | None) -> np.ndarray | None:
    """The differences sample by sample, in shown units; None if the samples are not the same ones."""
    if base is None or not _comparable(mine, base):
        return None
    ours, theirs = mine.get("per_sample") or [], base.get("per_sample") or []
    if not ours or len(ours) != len(theirs):
        return None
    return _scale(str(mine["main"])) * (np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))


def _standard_error(gaps: np.ndarray | None) -> float | None:
    if gaps is None or len(gaps) < 2:
        return None
    return float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))


# Recovery


def buckets(rows: Sequence[Cell]) -> list[Bucket]:
    """Recovery by length of the text, only the lengths there are, then over all texts."""
    found = []
    for low, high in BUCKETS:
        inside = [row for row in rows if row["tokens"] >= low and (high is None or row["tokens"] <= high)]
        if inside:
            found.append(_bucket(f"{low}+" if high is None else f"{low}-{high}", inside))
    return [*found, _bucket("all", rows)] if rows else []


def _bucket(label: str, rows: Sequence[Cell]) -> Bucket:
    def mean(name: str) -> float | None:
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        return sum(values) / len(values) if len(values) == len(rows) else None

    return Bucket(label, len(rows), mean("exact"), mean("token_f1"), mean("rouge_l"))


def spread(rows: Sequence[Cell], count: int = 12) -> list[Cell]:
    """At most ``count`` rows, evenly spread over the lengths of their texts."""
    ordered = sorted(rows, key=lambda row: row["tokens"])
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def compared(text: str, other: str) -> tuple[tuple[DiffWord, ...], tuple[DiffWord, ...]]:
    """The words of two texts, those without a partner in the other marked; long texts are cut."""
    ours, theirs = text.split(), other.split()
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    kept = [(b.a + i, b.b + i) for b in matcher.get_matching_blocks() for i in range(b.size)]
    return _words(ours, {a for a, _ in kept}), _words(theirs, {b for _, b in kept})


def _words(words: Sequence[str], kept: set[int]) -> tuple[DiffWord, ...]:
    marked = tuple(DiffWord(word, at not in kept) for at, word in enumerate(words[:_WORDS_SHOWN]))
    return (*marked, DiffWord("…")) if len(words) > _WORDS_SHOWN else marked


# For a model's index


def eval_results(store: ResultStore, entry: ModelEntry) -> list[dict[str, Any]]:
    """Arguments of huggingface_hub's ``EvalResult``, one for each embedding task and language measure, as percentages
    (loss: nats a token). None of a subset run: a model index cannot mark it."""
    model = one_model(store, entry)
    if model.is_subset:
        return []
    found = [(task_type(task), task, "main_score", score) for task, score in model.scores.items()]
    found += [("Language", row.task, row.metric, row.value) for row in language_rows(model)]
    return [
        {
            "task_name": task,
            "task_type": kind,
            "dataset_name": task,
            "dataset_type": task,
            "metric_type": metric,
            "metric_value": round(value, 4),
        }
        for kind, task, metric, value in found
    ]
