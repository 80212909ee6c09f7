"""The report's plots, one function each: models in, a matplotlib Figure out, or None where there is nothing to draw.

No pyplot: nothing here touches global state or needs a display. The background is white, for light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemify.evaluation.report.comparison import (
    PAPER_ROWS,
    SUBSET,
    TABLES,
    EvaluatedModel,
    language_rows,
    mean_score,
    recovery_buckets,
    tasks_by_type,
    without_development,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which white paper swallows."""
GREYS = ("#c8c8c8", "#9a9a9a", "#6e6e6e")
MARKERS = "osD^vPX"


def scores_by_type(models: Sequence[EvaluatedModel]) -> Figure | None:
    """Bars: mean embedding score by task type, measured models and published ones (hatched)."""
    models = [model for model in models if model.scores]
    sets = {name: tasks for name, found in tasks_by_type(models).items() if (tasks := without_development(found))}
    sets = {name: t for name, t in sets.items() if any(mean_score(m.scores, t) is not None for m in models)}
    if not sets:
        return None
    table = TABLES["table1"]
    bars: list[tuple[str, list[float | None], dict[str, Any]]] = []
    for at, label in enumerate(PAPER_ROWS):
        values = [table.value(label, name) if name in table.columns else None for name in sets]
        hatched = {"color": GREYS[at % len(GREYS)], "hatch": "//", "edgecolor": "white"}
        bars.append((f"{label} (published, MTEB-56)", values, hatched))
    for at, model in enumerate(models):
        means = [mean_score(model.scores, tasks) for tasks in sets.values()]
        bars.append((_label(model), means, {"color": _colour(at)}))
    figure, axes = _figure(
        "Embedding score by task type",
        models,
        height=1.6 + 0.2 * len(bars) * len(sets),
        lines=len(bars),
    )
    thickness = 0.85 / len(bars)
    for at, (label, values, style) in enumerate(bars):
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        where = [row + (at - (len(bars) - 1) / 2) * thickness for row, _ in known]
        axes.barh(where, [value for _, value in known], height=thickness, label=label, **style)
        for y, (_, value) in zip(where, known, strict=True):
            axes.annotate(f"{value:.1f}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(sets)), [f"{name}\n({len(tasks)} measured)" for name, tasks in sets.items()])
    axes.set_ylim(len(sets) - 0.45, -0.55)
    axes.set_xlabel("mean main score, % (published figures: all tasks of the type in MTEB-56, not the same set)")
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=1)
    return figure


def trade_off(models: Sequence[EvaluatedModel]) -> Figure | None:
    """Points: mean embedding score over the tasks that all GEMs share, by the language lost against the base."""
    gems = [model for model in models if model.fact("kind") == "gem" and model.scores]
    loss = {model.label: worse for model in gems if (worse := _loss_added(model)) is not None}
    accuracy = {model.label: worse for model in gems if (worse := _accuracy_lost(model)) is not None}
    lost, what = (loss, "held-out loss added, nats a token") if loss else (accuracy, "mean accuracy lost, points")
    gems = [model for model in gems if model.label in lost]
    shared = sorted(set.intersection(*(set(model.scores) for model in gems))) if gems else []
    shared = without_development(shared) or shared
    if not shared:
        return None
    figure, axes = _figure(
        "Embedding against language lost", [*gems, *(m.base for m in gems if m.base)], lines=len(gems)
    )
    axes.axvline(0.0, color="#888888", linewidth=1, linestyle="--")
    for at, model in enumerate(gems):
        x, y = lost[model.label], sum(model.scores[task] for task in shared) / len(shared)
        axes.plot(
            [x], [y], MARKERS[at % len(MARKERS)], color=_colour(at), markersize=9, label=f"{at + 1}: {_label(model)}"
        )
        axes.annotate(f"{at + 1}", (x, y), (7, 5), textcoords="offset points", fontsize=9)
    axes.set_xlabel(f"{what} (against the base; right is worse)")
    tasks = shared[0] if len(shared) == 1 else f"mean of {len(shared)} tasks"
    axes.set_ylabel(f"embedding score, % ({tasks})")
    axes.margins(0.25)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def _loss_added(model: EvaluatedModel) -> float | None:
    found = [row.difference for row in language_rows(model) if row.metric == "loss" and row.difference is not None]
    return found[0] if found else None


def _accuracy_lost(model: EvaluatedModel) -> float | None:
    rows = [row for row in language_rows(model) if not row.raw and " micro (" not in row.task]
    found = [row.difference for row in rows if row.difference is not None]
    return -sum(found) / len(found) if found else None


def recovery_by_length(models: Sequence[EvaluatedModel]) -> Figure | None:
    """Lines: token F1 (solid) and exact match (dashed) of recovered texts by their length."""
    found = [(model, cell["rows"]) for model in models if (cell := model.cell("recovery", "special_tokens"))]
    lines = [(model, recovery_buckets(rows)[:-1]) for model, rows in found if rows]
    if not lines:
        return None
    order = sorted({b.label for _, line in lines for b in line}, key=lambda label: int(label.rstrip("+").split("-")[0]))
    figure, axes = _figure(
        "Recovery from the special tokens' KV, by length", [model for model, _ in lines], lines=2 * len(lines)
    )
    for at, (model, line) in enumerate(lines):
        style: dict[str, Any] = {"color": _colour(at), "marker": MARKERS[at % len(MARKERS)]}
        for name, dash in (("token_f1", "-"), ("exact", "--")):
            points = [(order.index(b.label), 100.0 * v) for b in line if (v := getattr(b, name)) is not None]
            label = f"{_label(model)}: {'token F1' if name == 'token_f1' else 'exact match'}"
            if points:
                axes.plot(*zip(*points, strict=True), linestyle=dash, label=label, **style)
    axes.set_xticks(range(len(order)), order)
    axes.set_xlabel("length of the text, tokens")
    axes.set_ylabel("recovered, %")
    axes.set_ylim(-4, 104)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def loss_curves(models: Sequence[EvaluatedModel]) -> Figure | None:
    """Lines: the training losses by step, next-token and contrastive side by side."""
    panels = {
        "ntp": "next-token loss, nats a token",
        "contrastive": "contrastive loss, nats",
        "loss": "loss, nats",
    }
    curves = {name: _curves(models, name) for name in panels}
    if curves["ntp"] or curves["contrastive"]:
        del curves["loss"]  # their weighted sum says no more
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        return None
    labels = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    drawn = [model for model in models if model.label in labels]
    figure, _ = _figure("Training loss", drawn, width=5.0 + 3.5 * (len(curves) - 1), lines=len(labels), axes=False)
    handles: dict[str, Any] = {}
    for at, (name, lines) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), at + 1)
        for model in drawn:
            if model.label in lines:
                steps, values = zip(*lines[model.label], strict=True)
                number = labels.index(model.label)
                dash = ("-", "--", "-.", ":")[number % 4]
                marker = "." if len(steps) < 3 else ""
                (handle,) = axes.plot(steps, values, dash, marker=marker, color=_colour(number), linewidth=1.4)
                handles[_label(model)] = handle
        axes.set_xlabel("step")
        axes.set_ylabel(panels[name])
        axes.grid(alpha=0.3)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", fontsize=8)
    return figure


def _curves(models: Sequence[EvaluatedModel], name: str) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for model in models:
        curve: Sequence[Mapping[str, Any]] = model.fact("curve") or []
        points = [(entry["step"], entry[name]) for entry in curve if entry.get(name) is not None]
        if points:
            found[model.label] = points
    return found


PLOTS: dict[str, tuple[str, Callable[[Sequence[EvaluatedModel]], Figure | None]]] = {
    "embedding": ("Embedding", scores_by_type),
    "trade-off": ("Language kept", trade_off),
    "recovery": ("Recovery", recovery_by_length),
    "training": ("Training", loss_curves),
}
"""Every plot by name, with the heading of the section that shows it."""


def _figure(
    title: str,
    models: Sequence[EvaluatedModel],
    *,
    width: float = 8.0,
    height: float = 4.2,
    lines: int = 0,
    axes: bool = True,
) -> tuple[Figure, Axes]:
    """A figure with its title, which says so if a figure in it is of a subset run, and its only axes.

    ``lines``: of the legend below, which the height in inches is added to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + 0.2 * lines), layout="constrained", facecolor="white")
    is_subset = any(model.is_subset for model in models)
    figure.suptitle(f"{title} ({SUBSET})" if is_subset else title, fontsize=12)
    made: Any = figure.add_subplot() if axes else None
    if made is not None:
        made.spines[["top", "right"]].set_visible(False)
    return figure, made


def _colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]


def _label(model: EvaluatedModel) -> str:
    """A model's label for a legend: one short line, read neither as a formula nor as hidden (a leading underscore)."""
    text = " ".join(model.label.split())
    text = (text if len(text) <= 90 else f"{text[:89]}…").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
