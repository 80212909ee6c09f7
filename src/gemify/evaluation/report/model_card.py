"""The model card of a saved GEM: what it is, and what was measured of it. Nothing that was not measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gemify import __version__
from gemify.evaluation.report.comparison import SUBSET, describe_settings, language_rows, load_model
from gemify.evaluation.report.sections import mark_subset, write_sections
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.evaluation.task_suites import task_type
from gemify.io.atomic import atomic_file
from gemify.io.tables import MISSING, escape_markdown
from gemify.model.base import STARTER, STARTER_REPO
from gemify.model.config import GemConfig

CARD_FILE = "README.md"
_START, _END = "<!-- gemify: measured results -->", "<!-- gemify: end of measured results -->"


def write_card(directory: Path, store: ResultStore, entry: ModelEntry) -> Path:
    """Write or renew the measured results in a GEM's README.md, and keep what else stands in it.

    Args:
        directory: The GEM's directory.
        store: Where its results are.
        entry: Which of the store's models it is.

    Raises:
        ValueError: The directory holds no GEM, or the store no results of the model.
    """
    config = GemConfig.from_directory(directory)
    path = directory / CARD_FILE
    name = directory.resolve().name
    text = path.read_text(encoding="utf-8") if path.is_file() else _description(name, config)
    block = f"{_START}\n{card_section(store, entry).strip()}\n{_END}"
    found = re.search(f"{re.escape(_START)}.*?{re.escape(_END)}", text, re.S)
    text = text[: found.start()] + block + text[found.end() :] if found else f"{text.rstrip()}\n\n{block}\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    known = {k: v for k, v in data.to_dict().items() if k != "model-index"}
    results = [EvalResult(**row) for row in eval_results(store, entry)]
    card.data = ModelCardData(**{"model_name": name, **known, **({"eval_results": results} if results else {})})
    with atomic_file(path) as stage:
        stage.write_text(str(card), encoding="utf-8")
    return path


def card_section(store: ResultStore, entry: ModelEntry) -> str:
    """The measured results of one model as Markdown, from a second-level heading down.

    Figures and their settings only: none of others, and no texts of the data.

    Raises:
        ValueError: The store has no results of the model.
    """
    model = load_model(store, entry)
    settings = ", ".join(describe_settings(model.entry.facts))
    intro = f"Measured with gemify {__version__} ({settings}). {MISSING}: not measured."
    if model.is_subset:
        intro += " A subset run, on some samples of each task: not comparable with scores of whole tasks."
    blocks = [f"## {mark_subset('Measured results', model.is_subset)}", escape_markdown(intro)]
    sections = write_sections([model], published=False, examples=False)
    for heading in [name for name in sections if name != "Models"]:
        title = mark_subset(heading, SUBSET in sections[heading])
        blocks += [f"### {escape_markdown(title)}", sections[heading]]
    return "\n\n".join(blocks) + "\n"


def eval_results(store: ResultStore, entry: ModelEntry) -> list[dict[str, Any]]:
    """Arguments of huggingface_hub's ``EvalResult``: one for each embedding task and language metric.

    Values are percentages; loss is in nats a token. There are none of a subset run: a model index cannot mark it.
    """
    model = load_model(store, entry)
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


def _description(name: str, config: GemConfig) -> str:
    base = STARTER_REPO if config.base == STARTER else config.base
    hub_name = base if base.count("/") == 1 and not Path(base).exists() else None
    weights = (
        "The base model's weights are untouched: without a special token in the input, logits are the base's to the"
        " bit."
        if config.frozen_base
        else "The base model's weights were trained, so its language model has changed: see the differences below."
    )
    return f"""---
library_name: gemify
tags:
- embeddings
- feature-extraction
- gemify
{f"base_model: {hub_name}" if hub_name else ""}
---

# {name}

One language model that writes and embeds: {Path(base).name}, tuned `{config.tune}` with {config.k} special token(s)
by gemify (GEM, arXiv 2506.04344). {weights}

```python
from gemify import GemModel

gem = GemModel.from_pretrained("{name}")
vectors = gem.encode(["a text", "another"])
answer = gem.chat([{{"role": "user", "content": "a question"}}])
```
"""
