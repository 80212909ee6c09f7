"""Run a table: train each cell, evaluate it, write the table. What is finished is never run again.

Layout of the output, which all tables may share (a cell that is in two tables is run once)::

    DIR/<table>.md              the table, written anew after every cell
    DIR/runs/<cell>/            a training run (`gemify.training.trainer`), its checkpoints removed when it is complete
    DIR/evaluation/             what was measured (`gemify.evaluation.results.ResultStore`)
    DIR/cells/<cell>.<measure>.json   a finished cell: its settings, its entries in the store, seconds
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gemify.evaluation import suite
from gemify.evaluation.results import ModelEntry, ResultStore, read_json
from gemify.io.atomic import atomic_file
from gemify.reproduce.report import Finished, write_markdown
from gemify.reproduce.tables import TABLE_NAMES, Scale, TableCell, cells_of, scale_of
from gemify.training.recipe import Recipe
from gemify.training.trainer import CHECKPOINTS, train

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
