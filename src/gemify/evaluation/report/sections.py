"""The sections of a report as Markdown: notes, then tables, of everything that was measured.

Texts come from data and users: each is escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from gemify.evaluation.mteb_tasks import DEVELOPMENT_TASKS, NINE, SUITES, TYPES
from gemify.evaluation.report.comparison import (
    NINE_MEANS,
    PAPER_ROWS,
    PEERS,
    SUBSET,
    TABLES,
    CellResult,
    DiffWord,
    EvaluatedModel,
    LanguageRow,
    describe_settings,
    diff_words,
    language_rows,
    mean_score,
    recovery_buckets,
    sample_by_length,
    tasks_by_type,
    without_development,
)
from gemify.io.tables import escape_markdown, format_number, markdown_table

PUBLISHED = "published, not measured here"
"""Marks the rows of figures that others published."""


def write_sections(
    models: Sequence[EvaluatedModel], *, published: bool = True, examples: bool = True
) -> dict[str, str]:
    """Write the sections that hold a figure.

    Args:
        models: What to report.
        published: Show figures of others beside the measured ones.
        examples: Show texts of the data.

    Returns:
        The Markdown below each heading, in order.
    """
    blocks = {
        "Models": _models(models),
        "Embedding": _embedding(models, published),
        "Language kept": _language(models),
        "Logits beside the base's": _gate(models),
        "Recovery": _recovery(models, examples),
        "Cost of encoding": _cost(models),
        "Training": _training(models),
    }
    return {heading: "\n\n".join(body) for heading, body in blocks.items() if body}


def mark_subset(title: str, is_subset: bool) -> str:
    """A title that says so where its figures are of a subset run."""
    return f"{title} ({SUBSET})" if is_subset and SUBSET not in title else title


def _table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False, escaped: bool = False
) -> list[str]:
    """Caption and table; nothing without rows. ``escaped``: the cells are Markdown already."""
    if not rows:
        return []
    title = mark_subset(caption, any(SUBSET in cell for row in rows for cell in row))  # a label says so, see `_labels`
    cells = rows if escaped else [[escape_markdown(cell) for cell in row] for row in rows]
    table = markdown_table([escape_markdown(name) for name in header], cells, numeric=not prose)
    return [f"**{escape_markdown(title)}**", table]


def _models(models: Sequence[EvaluatedModel]) -> list[str]:
    header = ("model", "kind", "tuning", "base", "special tokens", "settings", "name and revision")
    rows = [
        (
            model.label,
            *(format_number(model.fact(name), "d") for name in ("kind", "tune", "base", "special_tokens")),
            ", ".join(describe_settings(model.entry.facts)),
            f"{model.entry.name} {model.entry.revision}",
        )
        for model in models
    ]
    return _table("What was measured", header, rows, prose=True)


# Embedding


def _embedding(models: Sequence[EvaluatedModel], published: bool) -> list[str]:
    models = [model for model in models if model.scores]
    if not models:
        return []
    by_type = tasks_by_type(models)
    notes = ["Scores are the tasks' main scores in mteb, times 100. A mean is given only where all its tasks are."]
    if any(task in DEVELOPMENT_TASKS for tasks in by_type.values() for task in tasks):
        notes.append("Development splits are shown, and in no mean: settings are chosen on them.")
    sets = _task_sets(models, by_type)
    if published and not sets.keys().isdisjoint(("GEM16", "LLM2VEC15")):
        before, after = (TABLES["table3"].rows[i].values[0] for i in (0, -1))
        notes.append(
            f"GEM16 is the paper's subset as its appendix lists it, LLM2VEC15 the same without ClimateFEVER. For that"
            f" subset the paper gives {before} (Llama-3.2-1B, mean-pooled) and {after} (GEM Llama-3.2-1B)."
        )
    means = [(m.label, *(format_number(mean_score(m.scores, tasks)) for tasks in sets.values())) for m in models]
    header = ["model", *(f"{name} ({len(tasks)})" for name, tasks in sets.items())]
    blocks = [*map(escape_markdown, notes), *_table("Means (number of tasks)", header, means if sets else [])]
    if published:
        for kind, tasks in by_type.items():
            blocks += _task_scores(kind, tasks, models)
        return [*blocks, *_nine_means(models), *_paper_means()]
    for model in models:
        rows = [
            (task, kind, format_number(model.scores[task]))
            for kind, tasks in by_type.items()
            for task in tasks
            if task in model.scores
        ]
        blocks += _table(model.label, ("task", "type", "score"), rows)
    return blocks


def _task_sets(models: Sequence[EvaluatedModel], by_type: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The sets of tasks that means are given of: each type's, all, those every model has, and the suites."""
    sets = {name: without_development(tasks) for name, tasks in by_type.items()}
    everything = [task for tasks in sets.values() for task in tasks]
    sets["all"] = everything
    common = [task for task in everything if all(task in model.scores for model in models)]
    if common != everything:
        sets["those of every model"] = common
    for name, tasks in SUITES.items():
        if any(mean_score(model.scores, tasks) is not None for model in models):
            sets[name] = list(tasks)
    return {name: tasks for name, tasks in sets.items() if tasks}


def _task_scores(kind: str, tasks: Sequence[str], models: Sequence[EvaluatedModel]) -> list[str]:
    """The tasks of a type, peers' published scores below the measured ones."""
    found = {model.label: model.scores for model in models}
    found |= {f"{p} ({PUBLISHED})": scores for p, scores in PEERS.items() if any(task in scores for task in tasks)}
    rows = [(label, *(format_number(scores.get(task)) for task in tasks)) for label, scores in found.items()]
    names = [f"{task} (development)" if task in DEVELOPMENT_TASKS else task for task in tasks]
    return _table(kind, ("model", *names), rows)


def _nine_means(models: Sequence[EvaluatedModel]) -> list[str]:
    """Models with all tasks of `NINE` among peers; nothing without such a model."""
    found = {m.label: mean for m in models if (mean := mean_score(m.scores, NINE)) is not None}
    found |= {f"{peer} ({PUBLISHED})": mean for peer, mean in NINE_MEANS.items() if found}
    rows = [(label, format_number(mean)) for label, mean in found.items()]
    return _table(f"Mean of nine tasks: {', '.join(NINE)}", ("model", "mean"), rows)


def _paper_means() -> list[str]:
    table = TABLES["table1"]
    rows = [(f"{r} ({PUBLISHED})", *(format_number(table.value(r, name)) for name in TYPES)) for r in PAPER_ROWS]
    caption = "From the paper, table 1: means over MTEB's 56 English tasks, not over the tasks above"
    return _table(caption, ("model", *TYPES), rows)


# Language


def _language(models: Sequence[EvaluatedModel]) -> list[str]:
    blocks: list[str] = []
    comparable = True
    for model in models:
        others = [set(m.cells["language"]) for m in models if m.base and m.base.entry == model.entry]
        if others and set(model.cells["language"]) <= set.union(*others):
            continue  # a base whose figures are all in its models' tables
        rows = language_rows(model)
        caption = f"{model.label}, against {model.base.label}" if model.base else model.label
        header = ("task", "metric", "n", "base", "this model", "difference", "standard error")
        blocks += _table(caption, header, [_language_cells(row) for row in rows])
        comparable &= all(row.comparable or row.base is None for row in rows)
    if not blocks:
        return []
    notes = [
        "The difference is this model less its base, on the same samples; its standard error is paired over them."
        " Accuracies are times 100, higher is better; loss is in nats a token, lower is better, and its standard error"
        " is that of the documents' mean losses.",
    ]
    if not comparable:
        notes.append(
            "Where the two models were measured on different samples, or with other numerics (torch version, device,"
            " threads), no difference is given."
        )
    return [*notes, *blocks]


def _language_cells(row: LanguageRow) -> tuple[str, ...]:
    digits = 4 if row.raw else 2
    difference = "0 (identical)" if row.identical else format_number(row.difference, f"+.{digits}f")
    base, value, error = (format_number(number, f".{digits}f") for number in (row.base, row.value, row.error))
    return (row.task, row.metric, str(row.n), base, value, difference, error)


def _gate(models: Sequence[EvaluatedModel]) -> list[str]:
    found = [(model, cell) for model in models if (cell := model.cell("gate", "logits"))]
    if not found:
        return []
    rows = []
    for model, cell in found:
        equal = cell["identical"] == cell["prompts"] > 0 and cell["max_difference"] == 0
        numbers = (str(cell["prompts"]), str(cell["identical"]), format_number(cell["max_difference"], ".3g"))
        rows.append((model.label, *numbers, "equal bit for bit" if equal else "not equal"))
    header = ("model", "prompts", "with identical logits", "largest difference", "verdict")
    note = "Logits of ordinary prompts, without special tokens, compared with the base model's."
    return [note, *_table("Logits", header, rows)]


# Recovery


def _recovery(models: Sequence[EvaluatedModel], examples: bool) -> list[str]:
    blocks: list[str] = []
    notes = [
        "How much of a text can be decoded from what is stored of it. It also measures leakage: who holds the"
        " stored KV of a text's special tokens can read that share of the text.",
    ]
    for model in models:
        from_kv = [cell for task, cell in model.cells["recovery"].items() if task.startswith("special_tokens")]
        for cell in sorted(from_kv, key=lambda found: found["k"]):
            tokens = "1 special token" if cell["k"] == 1 else f"{cell['k']} special tokens"
            blocks += _recovered(f"{model.label}: from the KV of {tokens}", cell["rows"])
            if examples:
                blocks += _examples(f"{model.label}: examples, from {tokens}", cell["rows"], "recovered")
        if guessed := model.cell("recovery", "vector"):
            blocks += _recovered(f"{model.label}: guessed from the vector alone", guessed["rows"])
            if examples:
                blocks += _examples(f"{model.label}: guesses from the vector", guessed["rows"], "guess")
            chance = guessed.get("chance_token_f1")
            facts = [] if chance is None else [f"token F1 by chance {format_number(chance, '.3f')}."]
            facts += [str(guessed["note"])] if guessed.get("note") else []
            notes += [f"{model.label}, vector alone: {' '.join(facts)}"] if facts else []
    return [*map(escape_markdown, notes), *blocks] if blocks else []


def _recovered(caption: str, rows: Sequence[CellResult]) -> list[str]:
    lines = []
    for bucket in recovery_buckets(rows):
        exact = format_number(None if bucket.exact is None else 100.0 * bucket.exact, ".1f")
        others = (format_number(share, ".3f") for share in (bucket.token_f1, bucket.rouge_l))
        lines.append((bucket.label, str(bucket.n), exact, *others))
    return _table(caption, ("tokens", "n", "exact match, %", "token F1", "ROUGE-L"), lines)


def _examples(caption: str, rows: Sequence[CellResult], field: str) -> list[str]:
    """A few texts next to what was decoded; words that only one of the two has are in bold."""

    def bold(words: Sequence[DiffWord]) -> str:
        runs = [(d, escape_markdown(" ".join(w.text for w in run))) for d, run in groupby(words, lambda w: w.differs)]
        return " ".join(f"**{run}**" if differs else run for differs, run in runs)

    lines = []
    for row in sample_by_length(rows):
        text, back = diff_words(str(row["text"]), str(row[field]))
        lines.append((str(row["tokens"]), bold(text), bold(back), format_number(row.get("token_f1"), ".3f")))
    return _table(caption, ("tokens", "text", field, "token F1"), lines, prose=True, escaped=True)


# Cost and training

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


def _cost(models: Sequence[EvaluatedModel]) -> list[str]:
    found = [(model, cell) for model in models if (cell := model.cell("cost", "encode"))]
    note = "Padding is the share of computed tokens; tokens a second are without it. A query is one short text."
    return [note, *_figures("Encoding", _COST, found)] if found else []


def _training(models: Sequence[EvaluatedModel]) -> list[str]:
    return _figures("Training", _TRAINING, [(model, facts) for model in models if (facts := model.fact("training"))])


def _figures(
    caption: str, columns: Mapping[str, tuple[str, str]], found: Sequence[tuple[EvaluatedModel, Mapping[str, Any]]]
) -> list[str]:
    rows = [(m.label, *(format_number(facts.get(n), spec) for n, (_, spec) in columns.items())) for m, facts in found]
    return _table(caption, ("model", *(title for title, _ in columns.values())), rows)
