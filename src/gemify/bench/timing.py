"""Timing in pairs, and the one form of every bench's report.

What is compared runs in turn (A B A B), after a warm-up, so that a busy moment of the machine falls on all alike. A
ratio is the median of each round's own ratio. Beside the clock stand the processor's seconds (of all threads), which
other work on the machine moves less.

A report is ``{"machine": {...}, "settings": {...}, "rows": [{"name": ..., figure: ...}, ...]}``, ready for JSON.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from gemify.io.tables import format_number, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Report = dict[str, Any]


@dataclass
class Runs(Generic[T]):
    """The timed runs of one job, a value per round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    results: list[T] = field(default_factory=list)
    """What the job returned."""


def run_in_turn(
    jobs: Mapping[str, Callable[[int], T]],
    *,
    rounds: int,
    warmup: int = 0,
    device: torch.device | None = None,
    description: str = "rounds",
    show_progress_bar: bool = False,
) -> dict[str, Runs[T]]:
    """Run every job once per round, in order, and time it. A GPU (``device``) is waited for.

    A job gets the number of its round, from 0, warm-up rounds included. Those are not kept.
    """
    runs: dict[str, Runs[T]] = {name: Runs() for name in jobs}
    bar = tqdm(total=(warmup + rounds) * len(jobs), desc=description, unit="run", disable=not show_progress_bar)
    with bar:
        for number in range(warmup + rounds):
            for name, job in jobs.items():
                synchronize(device)
                start, cpu_start = time.perf_counter(), time.process_time()
                result = job(number)
                synchronize(device)
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                if number >= warmup:
                    runs[name].seconds.append(seconds)
                    runs[name].cpu_seconds.append(cpu_seconds)
                    runs[name].results.append(result)
                bar.update()
    return runs


def synchronize(device: torch.device | None) -> None:
    """Wait until a GPU has done what it was given; nothing on another device."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of a value divided by the baseline's of the same round."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(values, baseline, strict=True))


def percentiles(values: Sequence[float], of: Sequence[int] = (50, 95, 99), *, name: str = "") -> dict[str, float]:
    """Percentiles as ``{"<name>p50": ...}``; 0 where there is no value."""
    return {f"{name}p{p}": float(np.percentile(values, p)) if len(values) else 0.0 for p in of}


def peak_memory_mb() -> int:
    """Maximum resident memory of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def make_report(settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], **more: Any) -> Report:
    """A report in the form that the head of this file gives; ``more`` stands beside its rows."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    machine = {
        "system": platform.system(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    return {"machine": machine, "settings": dict(settings), "rows": [dict(row) for row in rows], **more}


def rows_by_name(report: Report) -> dict[str, dict[str, Any]]:
    """The rows of a report by their names."""
    return {row["name"]: row for row in report["rows"]}


def rows_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Rows as a Markdown table. ``columns``: header and format spec of each key to show, in order."""
    cells = ([format_number(row.get(key), spec) for key, (_, spec) in columns.items()] for row in rows)
    return markdown_table([header for header, _ in columns.values()], cells, numeric=True)


def plot_rows(
    report: Report, key: str, label: str, *, points: Callable[[dict[str, Any]], Sequence[float]], marker: str = "o"
) -> Figure:
    """A bar per row for the figure ``key``, and over it the points of the row."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(8.0, 1.2 + 0.5 * len(rows)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for at, row in enumerate(rows):
        bar = axes.barh(at, row[key], color="#0072b2", height=0.6)
        axes.bar_label(bar, fmt="{:,.3g}", padding=3)
        values = points(row)
        axes.plot(values, [at] * len(values), marker, color="#000000", markersize=4)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
