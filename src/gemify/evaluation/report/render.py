"""The report as it is read: sections of tables, in Markdown and as one HTML page, and the part for a model card.

The page is self-contained (style and plots inside, no script, nothing fetched). Texts in it come from data and users:
Markdown is escaped here, HTML by the template engine.
"""

from __future__ import annotations

import base64
import importlib.resources
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from gemify import __version__
from gemify.evaluation.report import comparison, plots
from gemify.evaluation.report.comparison import Bucket, DiffWord, LanguageRow, Model
from gemify.evaluation.report.published import NINE_MEANS, PAPER_ROWS, PEERS, TABLES
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.evaluation.task_suites import DEVELOPMENT_TASKS, NINE, SUITES, TYPES
from gemify.io.atomic import atomic_file

MISSING = "\N{EN DASH}"
SUBSET = plots.SUBSET
PUBLISHED = "published, not measured here"


Cell = str | tuple[DiffWord, ...]


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    published: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    is_subset: bool = False
    prose: bool = False
    """Whether its cells are words, not figures."""

    @property
    def title(self) -> str:
        return _marked(self.caption, self.is_subset)


@dataclass(frozen=True)
class Drawing:
    name: str
    title: str
    png: bytes

    @property
    def inline(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Section:
    key: str
    heading: str
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    drawings: tuple[Drawing, ...] = ()

    @property
    def title(self) -> str:
        return _marked(self.heading, any(table.is_subset for table in self.tables))


def _marked(title: str, is_subset: bool) -> str:
    return f"{title} ({SUBSET})" if is_subset and SUBSET not in title else title


def shown(value: Any, form: str = ".2f") -> str:
    """A figure as text; a dash for what was not measured."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format(value, form) if math.isfinite(value) else "not finite"


# Sections


def sections(models: Sequence[Model], *, published: bool = True, examples: bool = True) -> list[Section]:
    """Everything that was measured of the models; sections without a figure are left out.

    ``published``: with the rows of others; ``examples``: with texts of the data.
    """
    found = [
        _models(models),
        _embedding(models, published),
        _language(models),
        _gate(models),
        _recovery(models, examples),
        _cost(models),
        _training(models),
    ]
    return [section for section in found if section.tables]


def _table(
    caption: str, columns: Sequence[str], rows: Sequence[Row], models: Sequence[Model], *, prose: bool = False
) -> list[Table]:
    """A table, or none without rows. ``models``: those whose figures it shows."""
    is_subset = any(model.is_subset for model in models)
    return [Table(caption, tuple(columns), tuple(rows), is_subset, prose)] if rows else []


def _models(models: Sequence[Model]) -> Section:
    columns = ("model", "kind", "tuning", "base", "special tokens", "settings", "name and revision")
    rows = [
        Row(
            (
                model.label,
                *(shown(model.fact(n), "d") for n in ("kind", "tune", "base", "special_tokens")),
                ", ".join(comparison.describe_settings(model.entry.facts)),
                f"{model.entry.name} {model.entry.revision}",
            )
        )
        for model in models
    ]
    return Section("models", "Models", (), tuple(_table("What was measured", columns, rows, models, prose=True)))


def _embedding(models: Sequence[Model], published: bool) -> Section:
    models = [model for model in models if model.scores]
    by_type = comparison.tasks_by_type(models)
    notes = ["Scores are the tasks' main scores in mteb, times 100. A mean is given only where all its tasks are."]
    if any(task in DEVELOPMENT_TASKS for tasks in by_type.values() for task in tasks):
        notes.append("Development splits are shown, and in no mean: settings are chosen on them.")
    tables = _means(models, by_type)
    if any(column.startswith(("GEM16", "LLM2VEC15")) for table in tables for column in table.columns) and published:
        before, after = (TABLES["table3"].rows[i].values[0] for i in (0, -1))
        notes.append(
            f"GEM16 is the paper's subset as its appendix lists it, LLM2VEC15 the same without ClimateFEVER. For that"
            f" subset the paper gives {before} (Llama-3.2-1B, mean-pooled) and {after} (GEM Llama-3.2-1B)."
        )
    if published:
        tables += [table for name, tasks in by_type.items() for table in _scores(name, tasks, models)]
    else:
        for model in models:
            rows = [
                Row((t, kind, shown(model.scores[t]))) for kind in by_type for t in by_type[kind] if t in model.scores
            ]
            tables += _table(model.label, ("task", "type", "score"), rows, [model])
    if published and models:
        tables += [*_nine_table(models), *_paper_table()]
    return Section("embedding", "Embedding", tuple(notes), tuple(tables))


def _means(models: Sequence[Model], by_type: Mapping[str, Sequence[str]]) -> list[Table]:
    sets = {name: comparison.counted(tasks) for name, tasks in by_type.items()}
    everything = [task for tasks in sets.values() for task in tasks]
    sets["all"] = everything
    common = [task for task in everything if all(task in model.scores for model in models)]
    if common and common != everything:
        sets["those of every model"] = common
    suites = {n: t for n, t in SUITES.items() if any(comparison.mean_score(m, t) is not None for m in models)}
    sets.update({name: list(tasks) for name, tasks in suites.items()})
    sets = {name: tasks for name, tasks in sets.items() if tasks}
    if not sets:
        return []
    rows = [Row((m.label, *(shown(comparison.mean_score(m, tasks)) for tasks in sets.values()))) for m in models]
    columns = ["model", *(f"{name} ({len(tasks)})" for name, tasks in sets.items())]
    return _table("Means (number of tasks)", columns, rows, models)


def _scores(kind: str, tasks: Sequence[str], models: Sequence[Model]) -> list[Table]:
    """The tasks of a type, peers' published scores below the measured ones."""
    rows = [Row((m.label, *(shown(m.scores.get(task)) for task in tasks))) for m in models]
    rows += [
        Row((f"{peer} ({PUBLISHED})", *(shown(scores.get(task)) for task in tasks)), published=True)
        for peer, scores in PEERS.items()
        if any(task in scores for task in tasks)
    ]
    heads = [f"{task} (development)" if task in DEVELOPMENT_TASKS else task for task in tasks]
    return _table(kind, ("model", *heads), rows, models)


def _nine_table(models: Sequence[Model]) -> list[Table]:
    """Models with all of `NINE` among peers; none without such a model."""
    found = [(model, mean) for model in models if (mean := comparison.mean_score(model, NINE)) is not None]
    rows = [Row((model.label, shown(mean))) for model, mean in found]
    rows += [Row((f"{peer} ({PUBLISHED})", shown(mean)), published=True) for peer, mean in NINE_MEANS.items() if found]
    return _table(f"Mean of nine tasks: {', '.join(NINE)}", ("model", "mean"), rows, [model for model, _ in found])


def _paper_table() -> list[Table]:
    table = TABLES["table1"]
    rows = [
        Row((f"{label} ({PUBLISHED})", *(shown(table.value(label, name)) for name in TYPES)), published=True)
        for label in PAPER_ROWS
    ]
    caption = "From the paper, table 1: means over MTEB's 56 English tasks, not over the tasks above"
    return _table(caption, ("model", *TYPES), rows, ())


def _language(models: Sequence[Model]) -> Section:
    tables, comparable = [], True
    for model in models:
        beside = [set(m.cells["language"]) for m in models if m.base and m.base.entry == model.entry]
        if beside and set(model.cells["language"]) <= set.union(*beside):
            continue  # a base whose figures all stand beside its models'
        rows = comparison.language_rows(model)
        against = f", against {model.base.label}" if model.base else ""
        both = [model, *([model.base] if model.base else [])]
        columns = ("task", "metric", "n", "base", "this model", "difference", "standard error")
        tables += _table(model.label + against, columns, [_language_row(row) for row in rows], both)
        comparable &= all(row.comparable or row.base is None for row in rows)
    notes = [
        "The difference is this model less its base, on the same samples; its standard error is paired over them."
        " Accuracies are times 100, higher is better; loss is in nats a token, lower is better, and its standard error"
        " is that of the documents' mean losses.",
    ]
    if not comparable:
        notes.append(
            "Where the two sides were measured on different samples, or in another arithmetic, no difference is given."
        )
    return Section("language", "Language kept", tuple(notes), tuple(tables))


def _language_row(row: LanguageRow) -> Row:
    digits = 4 if row.raw else 2
    difference = "0 (identical)" if row.identical else shown(row.difference, f"+.{digits}f")
    figures = [shown(row.base, f".{digits}f"), shown(row.value, f".{digits}f"), difference]
    return Row((row.task, row.metric, str(row.n), *figures, shown(row.error, f".{digits}f")))


def _gate(models: Sequence[Model]) -> Section:
    rows, those = [], []
    for model in models:
        if cell := model.cell("gate", "logits"):
            equal = cell["identical"] == cell["prompts"] > 0 and cell["max_difference"] == 0
            verdict = "equal bit for bit" if equal else "not equal"
            figures = (shown(cell["prompts"], "d"), shown(cell["identical"], "d"), shown(cell["max_difference"], ".3g"))
            rows.append(Row((model.label, *figures, verdict)))
            those.append(model)
    columns = ("model", "prompts", "with identical logits", "largest difference", "verdict")
    notes = ("Logits of ordinary prompts, without special tokens, compared with the base model's.",)
    return Section("gate", "Logits beside the base's", notes, tuple(_table("Logits", columns, rows, those)))


def _recovery(models: Sequence[Model], examples: bool) -> Section:
    tables: list[Table] = []
    notes = [
        "How much of a text can be decoded from what is stored of it. This is as much a measure of leakage: whoever"
        " holds the stored KV of a text's special tokens can read that share of the text.",
    ]
    for model in models:
        from_kv = [cell for task, cell in model.cells["recovery"].items() if task.startswith("special_tokens")]
        for rows, k in sorted(((cell["rows"], cell["k"]) for cell in from_kv), key=lambda found: found[1]):
            tokens = "1 special token" if k == 1 else f"{k} special tokens"
            tables += _buckets(f"{model.label}: from the KV of {tokens}", rows, model)
            if examples:
                tables += _examples(f"{model.label}: examples, from {tokens}", rows, "recovered", model)
        if cell := model.cell("recovery", "vector"):
            tables += _buckets(f"{model.label}: guessed from the vector alone", cell["rows"], model)
            if examples:
                tables += _examples(f"{model.label}: guesses from the vector", cell["rows"], "guess", model)
            chance = cell.get("chance_token_f1")
            said = [] if chance is None else [f"token F1 by chance {shown(chance, '.3f')}."]
            said += [str(cell["note"])] if cell.get("note") else []
            notes += [f"{model.label}, vector alone: {' '.join(said)}"] if said else []
    return Section("recovery", "Recovery", tuple(notes), tuple(tables))


def _buckets(caption: str, rows: Sequence[Mapping[str, Any]], model: Model) -> list[Table]:
    def cells(bucket: Bucket) -> tuple[str, ...]:
        exact = None if bucket.exact is None else 100.0 * bucket.exact
        return (shown(exact, ".1f"), shown(bucket.token_f1, ".3f"), shown(bucket.rouge_l, ".3f"))

    lines = [Row((bucket.label, str(bucket.n), *cells(bucket))) for bucket in comparison.buckets(rows)]
    return _table(caption, ("tokens", "n", "exact match, %", "token F1", "ROUGE-L"), lines, [model])


def _examples(caption: str, rows: Sequence[Mapping[str, Any]], field: str, model: Model) -> list[Table]:
    lines = []
    for row in comparison.spread(rows):
        text, back = comparison.compared(str(row["text"]), str(row[field]))
        lines.append(Row((str(row["tokens"]), text, back, shown(row.get("token_f1"), ".3f"))))
    return _table(caption, ("tokens", "text", field, "token F1"), lines, [model], prose=True)


_COST = {
    "device": ("device", ""),
    "threads": ("threads", "d"),
    "tokens": ("tokens measured", ",.0f"),
    "tokens_per_second": ("tokens a second", ",.0f"),
    "texts_per_second": ("texts a second", ",.1f"),
    "padding": ("padding", ".1%"),
    "peak_memory_mb": ("peak memory, MB", ",.0f"),
    "milliseconds_a_query": ("a query, ms (median)", ",.1f"),
    "milliseconds_a_query_p95": ("a query, ms (95th percentile)", ",.1f"),
}
_TRAINING = {
    "steps": ("steps", ",d"),
    "tokens": ("tokens", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "tokens_per_second": ("tokens a second", ",.0f"),
    "padding": ("padding", ".1%"),
    "peak_memory_mb": ("peak memory, MB", ",.0f"),
    "trainable_parameters": ("trained parameters", ",d"),
    "loss": ("last loss", ".4f"),
    "ntp": ("last next-token loss, nats", ".4f"),
    "contrastive": ("last contrastive loss", ".4f"),
}


def _cost(models: Sequence[Model]) -> Section:
    found = [(model, cell) for model in models if (cell := model.cell("cost", "encode"))]
    notes = ("Padding is the share of computed tokens; tokens a second are without it. A query is one short text.",)
    return Section("cost", "Cost of encoding", notes, tuple(_figures("Encoding", _COST, found)))


def _training(models: Sequence[Model]) -> Section:
    found = [(model, facts) for model in models if (facts := model.fact("training"))]
    return Section("training", "Training", (), tuple(_figures("Training", _TRAINING, found)))


def _figures(
    caption: str, columns: Mapping[str, tuple[str, str]], found: Sequence[tuple[Model, Mapping[str, Any]]]
) -> list[Table]:
    rows = [Row((m.label, *(shown(cell.get(name), form) for name, (_, form) in columns.items()))) for m, cell in found]
    return _table(caption, ("model", *(head for head, _ in columns.values())), rows, [m for m, _ in found])


# Markdown


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def markdown_of(section: Section, *, level: int = 2) -> str:
    """A section as Markdown (tables as GitHub reads them)."""
    parts = [f"{'#' * level} {plain(section.title)}", *(plain(note) for note in section.notes)]
    for table in section.tables:
        align = [":--" if table.prose or at == 0 else "--:" for at in range(len(table.columns))]
        lines = [[plain(column) for column in table.columns], align]
        lines += [[plain(_text(cell)) for cell in row.cells] for row in table.rows]
        parts += [f"**{plain(table.title)}**", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += [f"![{plain(drawing.title)}]({drawing.name})" for drawing in section.drawings]
    return "\n\n".join(parts) + "\n"


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else " ".join(word.text for word in cell)


def card_section(store: ResultStore, entry: ModelEntry) -> str:
    """Measured results of one model for its model card: Markdown from a second-level heading down, figures with their
    settings, no figure of others, no texts of the data. ValueError if the store does not know the model."""
    model = comparison.one_model(store, entry)
    head = _marked("Measured results", model.is_subset)
    settings = ", ".join(comparison.describe_settings(model.entry.facts))
    intro = f"Measured with gemify {__version__} ({settings}). {MISSING}: not measured."
    if model.is_subset:
        intro += " A subset run, on some samples of each task: not comparable with scores of whole tasks."
    parts = sections([model], published=False, examples=False)
    body = [markdown_of(part, level=3) for part in parts if part.key != "models"]
    return "\n".join([f"## {head}\n", f"{plain(intro)}\n", *body])


# Files


def write_report(directories: Sequence[Path], output: Path) -> list[Path]:
    """Put the models evaluated in the directories side by side: ``report.md``, ``report.html`` and the plots
    (``report-*.png``) in ``output``. Each file is replaced whole; plots of an earlier report that have no data now are
    removed. Returns the paths written. ValueError for a directory without models or an output that is a file."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"cannot write a report to {output}: it is a file, give a directory")
    models = comparison.load(directories)
    parts = []
    for section in sections(models):
        drawings = [
            Drawing(f"report-{name}.png", figure.get_suptitle(), _png(figure))
            for name, (where, draw) in plots.PLOTS.items()
            if where == section.key and (figure := draw(models)) is not None
        ]
        parts.append(replace(section, drawings=tuple(drawings)))
    notes, is_subset = _header(models)
    title = _marked("Evaluation report", bool(is_subset))
    top = [f"# {plain(title)}", *([f"> **{plain(is_subset)}**"] if is_subset else []), *(plain(note) for note in notes)]
    text = "\n\n".join([*top, *(markdown_of(part) for part in parts)])
    files = {drawing.name: drawing.png for part in parts for drawing in part.drawings}
    files |= {"report.md": text.encode(), "report.html": _html(title, is_subset, notes, parts).encode()}
    for name, content in files.items():
        with atomic_file(output / name) as stage:
            stage.write_bytes(content)
    for name in plots.PLOTS:
        if f"report-{name}.png" not in files:
            (output / f"report-{name}.png").unlink(missing_ok=True)
    first = ("report.md", "report.html")
    return [output / name for name in (*first, *sorted(set(files) - set(first)))]


def _header(models: Sequence[Model]) -> tuple[list[str], str]:
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    notes = [
        f"{count}, written by gemify {__version__}. {MISSING}: not measured. Undated: the same results give the same"
        " report.",
    ]
    is_subset = [model for model in models if model.is_subset]
    limits = ", ".join(str(limit) for limit in sorted({model.fact("limit") for model in is_subset}))
    said = f"{SUBSET}: {len(is_subset)} of {count} measured on at most {limits} samples of each task. Not comparable"
    return notes, f"{said} with figures of whole tasks." if is_subset else ""


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Title": figure.get_suptitle(), "Software": "gemify"})
    return buffer.getvalue()


def _html(title: str, is_subset: str, notes: Sequence[str], parts: Sequence[Section]) -> str:
    from jinja2 import Environment, StrictUndefined

    source = (
        importlib.resources.files("gemify.evaluation.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(title=title, is_subset=is_subset, notes=notes, sections=parts)
