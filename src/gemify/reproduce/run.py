"""Run a table: train each cell, evaluate it, write the table. What is finished is never run again.

Layout of the output, which all tables may share (a cell that is in two tables is run once)::

    DIR/<table>.md              the table, written anew after every cell
    DIR/runs/<cell>/            a training run (`gemify.training.trainer`), its checkpoints removed when it is complete
    DIR/evaluation/             what was measured (`gemify.evaluation.results.ResultStore`)
    DIR/cells/<cell>.<measure>.json   a finished cell: its settings, its entries in the store, seconds

A table shows our figures, the paper's below them, the scale, and what is not finished.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemify.evaluation import suite
from gemify.evaluation.mteb_tasks import task_type
from gemify.evaluation.report.comparison import TABLES, macro_mean, mean_score, recovery_buckets
from gemify.evaluation.results import ModelEntry, ResultStore, read_json
from gemify.io.atomic import atomic_file
from gemify.io.tables import format_number, markdown_table
from gemify.reproduce.tables import GATED, TABLE_NAMES, Scale, TableCell, cells_of, scale_of, title_of
from gemify.training.checkpoints import CHECKPOINTS
from gemify.training.recipe import PRESETS, Recipe
from gemify.training.trainer import train

MMLU_SUBJECTS = 57


@dataclass(frozen=True)
class Finished:
    """A finished cell: under which names it was measured, and the seconds it took."""

    entries: Sequence[ModelEntry]
    training: float
    evaluation: float

    def of_kind(self, *kinds: str) -> list[ModelEntry]:
        """The entries of these kinds, in the kinds' order."""
        return [s for kind in kinds for s in self.entries if s.facts["kind"] == kind]


def write_markdown(
    table: str,
    scale: Scale,
    cells: Sequence[TableCell],
    finished: Mapping[TableCell, Finished],
    store: ResultStore,
    training_data: str,
) -> str:
    """The whole page.

    Args:
        table: ``table1`` to ``table6``.
        scale: The size it is run at.
        cells: All cells of the table.
        finished: Those that are measured.
        store: Where their figures are.
        training_data: What they were trained on, for the page to say.
    """
    number = table.removeprefix("table")
    title = f"# Table {number}: {title_of(table)}" if table in TABLES else f"# Appendix B: {title_of(table)}"
    blocks = [title, *_stated(table, scale, cells, training_data)]
    if table in TABLES:
        scores = {c: cell_scores(c, f, scale, store) for c, f in finished.items()}
        blocks += [_beside_paper(table, cells, scores), "Ours, task by task:", _by_task(scores, scale)]
    else:
        blocks.append(_recovery(finished, store))
    if missing := [c.name for c in cells if c not in finished]:
        blocks.append(
            f"**Not finished: {len(missing)} of {len(cells)} cells** ({', '.join(missing)}).\n"
            "The same command goes on with them."
        )
    seconds = sum(f.training + f.evaluation for f in finished.values())
    blocks.append(f"{len(finished)} of {len(cells)} cells finished, {seconds:,.0f} s of training and evaluation.")
    return "\n\n".join(blocks) + "\n"


def cell_scores(cell: TableCell, finished: Finished, scale: Scale, store: ResultStore) -> dict[str, float]:
    """A cell's scores in percent, by the paper's column names and by task, and the held-out loss in nats a token.

    A mean is given only if every score it covers is there: "MTEB subset" covers the scale's tasks, a type's mean
    those of the type, MMLU its 57 subjects.
    """
    found: dict[str, float] = {}
    for entry in finished.of_kind("gem", "baseline"):
        found |= {task: result["score"] for task, result in store.scores(entry).items() if task in scale.vectors}
    groups = {"MTEB subset": list(scale.vectors)}
    for task in scale.vectors:
        groups.setdefault(task_type(task), []).append(task)
    means = {name: mean for name, tasks in groups.items() if (mean := mean_score(found, tasks)) is not None}
    language: dict[str, dict[str, Any]] = {}
    for entry in finished.of_kind("base", "baseline", "gem") if cell.untouched else finished.of_kind("gem"):
        language |= store.cells("language", entry)
    benchmark = "mmlu" if scale.limit is None else f"mmlu, first {scale.limit}"
    subjects = [c for c in language.values() if c["group"] == benchmark]
    if len(subjects) == MMLU_SUBJECTS:
        means["MMLU"] = macro_mean(subjects, "acc")
    if "held_out" in language:
        means["held-out loss"] = language["held_out"]["metrics"][language["held_out"]["main"]]
    return {**found, **means}


def _stated(table: str, scale: Scale, cells: Sequence[TableCell], training_data: str) -> list[str]:
    """The scale and settings that our figures are of."""
    recipe = next(c.recipe for c in cells if c.recipe is not None)
    rows = scale.steps * recipe["batch_size"]
    limit = "uncut" if scale.limit is None else f"cut to {scale.limit} rows a task"
    changed = {k: v for k, v in scale.recipe.items() if PRESETS["paper"].get(k) != v}
    lines = [
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
    source = (
        "Source of the rows marked *paper*: Zhang et al., arXiv 2506.04344v1. Rows marked *ours* are measured here:"
    )
    return [source, "\n".join(lines)]


def _beside_paper(table: str, cells: Sequence[TableCell], scores: Mapping[TableCell, Mapping[str, float]]) -> str:
    """Our rows, each with the paper's row below it; then the paper's other rows."""
    paper = TABLES[table]
    printed = {row.label: (row.label, "paper", *map(format_number, row.values)) for row in paper.rows}
    rows = []
    for label in dict.fromkeys(c.label for c in cells):
        parts = [c for c in cells if c.label == label]
        found = {name + c.part: value for c in parts for name, value in scores.get(c, {}).items()}
        source = "ours" if any(c in scores for c in parts) else "ours, not finished"
        rows.append((label, source, *(format_number(found.get(column)) for column in paper.columns)))
        if parts[0].paper in printed:
            rows.append(printed.pop(parts[0].paper))
    return markdown_table(["row", "whose", *paper.columns], [*rows, *printed.values()])


def _by_task(scores: Mapping[TableCell, Mapping[str, float]], scale: Scale) -> str:
    columns = {
        **dict.fromkeys(scale.vectors, ".2f"),
        **({"held-out loss": ".4f"} if "held_out" in scale.language else {}),
    }
    rows = [
        (cell.label + cell.part, *(format_number(found.get(column), spec) for column, spec in columns.items()))
        for cell, found in scores.items()
    ]
    return markdown_table(["row", *columns], rows)


def _recovery(finished: Mapping[TableCell, Finished], store: ResultStore) -> str:
    """Recovered texts by length: the share that came back exactly, token F1 and ROUGE-L, in percent."""
    lines = []
    for cell, done in finished.items():
        rows: list[dict[str, Any]] = []
        for entry in done.of_kind("gem"):
            rows += store.cells("recovery", entry).get("special_tokens", {}).get("rows", [])
        for bucket in recovery_buckets(rows):
            shares = (bucket.exact, bucket.token_f1, bucket.rouge_l)
            percent = (format_number(None if share is None else 100.0 * share) for share in shares)
            lines.append((cell.label, bucket.label, str(bucket.n), *percent))
    return markdown_table(["row", "tokens", "texts", "exact", "token F1", "ROUGE-L"], lines)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {'none' if v is None else v}" for k, v in values.items())


logger = logging.getLogger(__name__)

__all__ = ["TABLE_NAMES", "estimate_seconds", "plan_cells", "reproduce"]


def reproduce(
    table: str,
    *,
    output: Path,
    data: Path | None,
    training_data: str,
    scale: str = "starter",
    base: str | None = None,
    steps: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    show_progress_bar: bool = True,
    on_cell: Callable[[TableCell], None] | None = None,
    evaluate: Callable[..., Sequence[ModelEntry]] = suite.evaluate,
) -> Path:
    """Run what is not finished of a table.

    An interruption (`gemify.io.signals.StopRequestedError`, KeyboardInterrupt) or an error keeps what is finished, and
    the table with it. The same call goes on from there.

    Args:
        table: ``table1`` to ``table6``.
        output: Directory of everything that is written.
        data: Local evaluation data; None: the hub.
        training_data: Text to train on, as in a training recipe.
        scale: ``starter`` or ``paper``.
        base: Another base model than the scale's.
        steps: Other training steps than the scale's.
        limit: Another limit of rows a language task than the scale's.
        device: Of training and evaluation; None: the best there is.
        show_progress_bar: Show bars on stderr.
        on_cell: Called with every cell that is about to run.
        evaluate: What measures a model: `gemify.evaluation.suite.evaluate`, or its like.

    Returns:
        Path of the table as Markdown.

    Raises:
        ValueError: The table or scale is unknown, or anything else is wrong that the user can correct.
    """
    chosen = scale_of(scale, base=base, steps=steps, limit=limit)
    cells = cells_of(table, chosen)
    for cell in cells:  # contradictions show before anything is trained
        _recipe(cell, training_data)
    path = output / f"{table}.md"

    def write() -> None:
        finished = {c: f for c in cells if (f := _read_finished(c, chosen, training_data, output)) is not None}
        with atomic_file(path) as stage:
            stage.write_text(
                write_markdown(table, chosen, cells, finished, ResultStore(output / "evaluation"), training_data),
                encoding="utf-8",
            )

    write()
    for cell in cells:
        if _read_finished(cell, chosen, training_data, output) is not None:
            continue
        if on_cell is not None:
            on_cell(cell)
        _run_cell(
            cell,
            chosen,
            training_data,
            output,
            data=data,
            device=device,
            show_progress_bar=show_progress_bar,
            evaluate=evaluate,
        )
        write()
    return path


def plan_cells(
    table: str,
    *,
    output: Path | None = None,
    training_data: str = "",
    scale: str = "starter",
    base: str | None = None,
    steps: int | None = None,
    limit: int | None = None,
) -> list[TableCell]:
    """List the cells that `reproduce` would run: all of the table, less those finished in ``output``."""
    chosen = scale_of(scale, base=base, steps=steps, limit=limit)
    cells = cells_of(table, chosen)
    return [c for c in cells if output is None or _read_finished(c, chosen, training_data, output) is None]


def estimate_seconds(cells: Sequence[TableCell], output: Path) -> float | None:
    """Estimate how long cells will take, from finished ones of the same measure; None while there are none."""
    total = 0.0
    for cell in cells:
        records = [read_json(p) for p in sorted((output / "cells").glob(f"*.{cell.measure}.json"))]
        trained = [r for r in records if r["steps"]]
        if not records or (cell.steps and not trained):
            return None
        total += sum(r["seconds"]["evaluation"] for r in records) / len(records)
        if cell.steps:
            total += cell.steps * sum(r["seconds"]["training"] / r["steps"] for r in trained) / len(trained)
    return total


def _run_cell(
    cell: TableCell,
    scale: Scale,
    training_data: str,
    output: Path,
    *,
    data: Path | None,
    device: str | None,
    show_progress_bar: bool,
    evaluate: Callable[..., Sequence[ModelEntry]],
) -> None:
    """Train a cell (or go on with it), evaluate it, and record that it is finished."""
    run = output / "runs" / cell.name
    recipe = _recipe(cell, training_data)
    training: float = 0.0
    if recipe is not None:
        _, summary = train(recipe, run, resume=True, device=device, show_progress_bar=show_progress_bar)
        training = summary["seconds"]
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)  # of no use to a complete run, and gigabytes
        gc.collect()  # the trainer and its model refer to each other: free the weights before others are loaded
        torch.cuda.empty_cache()
    start = time.perf_counter()
    entries = evaluate(
        None if recipe is None else str(run),
        plan=suite.Plan(**_cell_tasks(cell, scale), language_limit=scale.limit),
        baselines=("mean",) if recipe is None else (),
        base=cell.base if recipe is None else None,
        output=output / "evaluation",
        data=data,
        limit=scale.limit,
        dtype=scale.dtype,
        instructions=scale.instructions,
        device=device,
        show_progress_bar=show_progress_bar,
    )
    record = {
        "asked": _cell_request(cell, scale, training_data),
        "subjects": [[s.name, s.revision, s.facts["kind"]] for s in entries],
        "steps": cell.steps,
        "seconds": {"training": training, "evaluation": round(time.perf_counter() - start, 3)},
    }
    with atomic_file(_record(cell, output)) as stage:
        stage.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _recipe(cell: TableCell, training_data: str) -> Recipe | None:
    return None if cell.recipe is None else Recipe.from_dict({**cell.recipe, "data": training_data}, source=cell.name)


def _cell_tasks(cell: TableCell, scale: Scale) -> dict[str, Any]:
    if cell.measure == "recovery":
        return {"vectors": (), "language": (), "recovery": scale.recovery}
    return {"vectors": scale.vectors, "language": scale.language, "recovery": 0}


def _cell_request(cell: TableCell, scale: Scale, training_data: str) -> dict[str, Any]:
    """Everything that a cell's figures depend on, as JSON gives it back."""
    asked = {
        "base": cell.base,
        "recipe": None if cell.recipe is None else {**cell.recipe, "data": training_data},
        **_cell_tasks(cell, scale),
        "limit": scale.limit,
        "dtype": scale.dtype,
        "instructions": scale.instructions,
    }
    value: dict[str, Any] = json.loads(json.dumps(asked))
    return value


def _record(cell: TableCell, output: Path) -> Path:
    return output / "cells" / f"{cell.name}.{cell.measure}.json"


def _read_finished(cell: TableCell, scale: Scale, training_data: str, output: Path) -> Finished | None:
    """The record of a finished cell; None if it is not finished, or with other settings only."""
    path = _record(cell, output)
    if not path.is_file() or (record := read_json(path))["asked"] != _cell_request(cell, scale, training_data):
        return None
    entries = [ModelEntry(name, revision, {"kind": kind}) for name, revision, kind in record["subjects"]]
    return Finished(entries, record["seconds"]["training"], record["seconds"]["evaluation"])
