"""A table as Markdown: our figures, the paper's beneath, the scale stated, and what is not finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gemify.evaluation.report.published import TABLES
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.evaluation.task_suites import task_type
from gemify.reproduce.scales import GATED, Scale
from gemify.reproduce.tables import Cell, title_of
from gemify.training.recipe import PRESETS

MMLU_SUBJECTS = 57
LENGTHS = ((1, 10), (11, 20), (21, 30), (31, 60), (61, None))
"""Lengths, in tokens of the text, that recovery is shown by; the paper speaks of about 30 (Appendix B)."""

_NONE = "–"


@dataclass(frozen=True)
class Finished:
    """A finished cell: under which names it was measured, and the seconds it took."""

    entries: Sequence[ModelEntry]
    training: float
    evaluation: float

    def of_kind(self, *kinds: str) -> list[ModelEntry]:
        """The entries of these kinds, in the kinds' order."""
        return [s for kind in kinds for s in self.entries if s.facts["kind"] == kind]


def markdown(
    table: str,
    scale: Scale,
    cells: Sequence[Cell],
    finished: Mapping[Cell, Finished],
    store: ResultStore,
    training_data: str,
) -> str:
    """The whole page."""
    number = table.removeprefix("table")
    head = f"# Table {number}: {title_of(table)}" if table in TABLES else f"# Appendix B: {title_of(table)}"
    lines = [head, "", *_stated(table, scale, cells, training_data), ""]
    if table in TABLES:
        scores = {c: figures(c, f, scale, store) for c, f in finished.items()}
        lines += [*_beside(table, cells, scores), "", *_by_task(scores, scale)]
    else:
        lines += _recovery(cells, finished, store)
    if missing := [c.name for c in cells if c not in finished]:
        lines += ["", f"**Not finished: {len(missing)} of {len(cells)} cells** ({', '.join(missing)})."]
        lines += ["The same command goes on with them."]
    seconds = sum(f.training + f.evaluation for f in finished.values())
    lines += ["", f"{len(finished)} of {len(cells)} cells finished, {seconds:,.0f} s of training and evaluation."]
    return "\n".join(lines) + "\n"


def figures(cell: Cell, finished: Finished, scale: Scale, store: ResultStore) -> dict[str, float]:
    """A cell's scores in percent by the paper's column names, by task, and the held-out loss in its own unit.

    A mean is there only if all that it is a mean of is there: "MTEB subset" is over the scale's tasks, a type's mean
    over those of the type, MMLU the mean over its 57 subjects.
    """
    found: dict[str, float] = {}
    for entry in finished.of_kind("gem", "baseline"):
        found |= {task: result["score"] for task, result in store.scores(entry).items() if task in scale.vectors}
    groups = {"MTEB subset": list(scale.vectors)}
    for task in scale.vectors:
        groups.setdefault(task_type(task), []).append(task)
    means = {name: fmean(found[t] for t in some) for name, some in groups.items() if some and set(some) <= set(found)}
    language: dict[str, dict[str, Any]] = {}
    for entry in finished.of_kind("base", "baseline", "gem") if cell.untouched else finished.of_kind("gem"):
        language |= store.cells("language", entry)
    benchmark = "mmlu" if scale.limit is None else f"mmlu, first {scale.limit}"
    accuracies = [c["metrics"]["acc"] for c in language.values() if c["group"] == benchmark]
    if len(accuracies) == MMLU_SUBJECTS:
        means["MMLU"] = 100.0 * fmean(accuracies)
    if "held_out" in language:
        means["held-out loss"] = language["held_out"]["metrics"][language["held_out"]["main"]]
    return {**found, **means}


def _stated(table: str, scale: Scale, cells: Sequence[Cell], training_data: str) -> list[str]:
    """The scale, in words: what our figures are figures of."""
    recipe = next(c.recipe for c in cells if c.recipe is not None)
    rows = scale.steps * recipe["batch_size"]
    limit = "uncut" if scale.limit is None else f"cut to {scale.limit} rows a task"
    changed = {k: v for k, v in scale.recipe.items() if PRESETS["paper"].get(k) != v}
    lines = [
        "Source of the rows marked *paper*: Zhang et al., arXiv 2506.04344v1. Rows marked *ours* are measured here:",
        "",
        f"- scale: {scale.name}; base: {', '.join(b.name for b in scale.bases_of(table))}",
        f"- training: {scale.steps} steps, {scale.ntp_steps} of them next-token prediction (all, where only that is"
        f" trained); {recipe['batch_size']} rows a step, {rows:,} rows; precision {scale.precision};"
        f" texts: {training_data or 'not given'}",
        f"- recipe: the paper's (Section 4.2){', but for ' + _settings(changed) if changed else ''}",
    ]
    if any(c.recipe is not None and c.recipe["tune"] == "gated" for c in cells):
        lines.append(f"- gated rows are not the paper's: {_settings(GATED)}")
    if table in TABLES:
        lines += [
            f"- embedding tasks: {', '.join(scale.vectors)}; instructions: {'yes' if scale.instructions else 'no'}",
            f"- language tasks: {', '.join(scale.language)}, {limit}",
        ]
    else:
        lines.append(f"- recovery: {scale.recovery} texts; the paper prints examples, and no figures")
    lines.append(f"- evaluated in {scale.dtype}")
    if table == "table1":
        lines.append("- the paper's means by type are over MTEB's 56 English tasks, ours over the tasks above")
    elif table in TABLES:
        lines.append("- the paper's MTEB subset is GEM16 (its Appendix A), ours the tasks above")
    return lines


def _beside(table: str, cells: Sequence[Cell], scores: Mapping[Cell, Mapping[str, float]]) -> list[str]:
    """Rows of ours, each with the paper's beneath; then those of the paper that nothing of ours stands beside."""
    paper = TABLES[table]
    printed = {row.label: row.values for row in paper.rows}
    lines = _head(["row", "whose", *paper.columns])
    shown = set()
    for label in dict.fromkeys(c.label for c in cells):
        mine = [c for c in cells if c.label == label]
        found = {name + c.part: value for c in mine for name, value in scores.get(c, {}).items()}
        whose = "ours" if any(c in scores for c in mine) else "ours, not finished"
        lines.append(_row([label, whose, *(_number(found.get(column)) for column in paper.columns)]))
        if (twin := mine[0].paper) is not None and twin in printed:
            lines.append(_row([twin, "paper", *map(_number, printed[twin])]))
            shown.add(twin)
    lines += [_row([label, "paper", *map(_number, v)]) for label, v in printed.items() if label not in shown]
    return lines


def _by_task(scores: Mapping[Cell, Mapping[str, float]], scale: Scale) -> list[str]:
    columns = [*scale.vectors, *(["held-out loss"] if "held_out" in scale.language else [])]
    lines = ["Ours, task by task:", "", *_head(["row", *columns])]
    for cell, found in scores.items():
        numbers = [_number(found.get(column), 4 if column == "held-out loss" else 2) for column in columns]
        lines.append(_row([cell.label + cell.part, *numbers]))
    return lines


def _recovery(cells: Sequence[Cell], finished: Mapping[Cell, Finished], store: ResultStore) -> list[str]:
    """Recovered texts by length: the share that came back exactly, token F1 and ROUGE-L, in percent."""
    lines = _head(["row", "tokens", "texts", "exact", "token F1", "ROUGE-L"])
    for cell in [c for c in cells if c in finished]:
        rows: list[dict[str, Any]] = []
        for entry in finished[cell].of_kind("gem"):
            rows += store.cells("recovery", entry).get("special_tokens", {}).get("rows", [])
        for low, high in LENGTHS:
            some = [r for r in rows if low <= r["tokens"] <= (high or r["tokens"])]
            means = (
                [_number(100.0 * fmean(r[m] for r in some)) for m in ("exact", "token_f1", "rouge_l")] if some else []
            )
            length = f"{low} to {high}" if high else f"{low} and more"
            lines.append(_row([cell.label, length, str(len(some)), *(means or [_NONE] * 3)]))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(fields: Sequence[str]) -> str:
    return "| " + " | ".join(field.replace("|", "\\|") for field in fields) + " |"


def _number(value: float | None, digits: int = 2) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {'none' if v is None else v}" for k, v in values.items())
