"""A report as files: Markdown, the same as one HTML page, and the plots; the model card of a saved GEM.

The page is self-contained: style and plots inside, no script, nothing fetched. The card says what a GEM
is, and what was measured of it. Nothing that was not measured.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gemify import __version__
from gemify.evaluation.mteb_tasks import task_type
from gemify.evaluation.report.comparison import (
    SUBSET,
    EvaluatedModel,
    describe_settings,
    language_rows,
    load_model,
    load_models,
)
from gemify.evaluation.report.plots import PLOTS
from gemify.evaluation.report.sections import PUBLISHED, mark_subset, write_sections
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.io.atomic import atomic_file
from gemify.io.tables import MISSING, escape_markdown
from gemify.model.config import GemConfig
from gemify.model.hub import CARD_FILE, model_card

if TYPE_CHECKING:
    from markdown_it.token import Token
    from matplotlib.figure import Figure


def write_report(directories: Sequence[Path], output: Path) -> list[Path]:
    """Put the models of result directories side by side in ``report.md``, ``report.html`` and ``report-*.png``.

    Each file is replaced whole. Plots of an earlier report that have no data now are removed.

    Args:
        directories: What `gemify eval` wrote.
        output: Directory of the report.

    Returns:
        The paths written, ``report.md`` and ``report.html`` first.

    Raises:
        ValueError: A directory holds no models, or the output is a file.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"cannot write a report to {output}: it is a file, give a directory")
    models = load_models(directories)
    images: dict[str, bytes] = {}
    blocks = _header(models)
    for heading, body in write_sections(models).items():
        blocks.append(f"## {escape_markdown(mark_subset(heading, SUBSET in body))}")
        for name, (section, draw) in PLOTS.items():
            if section == heading and (figure := draw(models)) is not None:
                images[f"report-{name}.png"] = _png(figure)
                blocks.append(f"![{escape_markdown(figure.get_suptitle())}](report-{name}.png)")
        blocks.append(body)
    text = "\n\n".join(blocks) + "\n"
    files = {"report.md": text.encode(), "report.html": to_html(text, images).encode(), **images}
    for name, content in files.items():
        with atomic_file(output / name) as stage:
            stage.write_bytes(content)
    for name in PLOTS:
        if f"report-{name}.png" not in files:
            (output / f"report-{name}.png").unlink(missing_ok=True)
    return [output / name for name in ("report.md", "report.html", *sorted(images))]


def _header(models: Sequence[EvaluatedModel]) -> list[str]:
    """Title and first lines."""
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    limits = sorted({model.fact("limit") for model in models if model.is_subset})
    blocks = [f"# {mark_subset('Evaluation report', bool(limits))}"]
    if limits:
        blocks.append(
            f"> **{SUBSET}: {sum(m.is_subset for m in models)} of {count} measured on at most"
            f" {', '.join(map(str, limits))} samples of each task. Not comparable with figures of whole tasks.**"
        )
    note = f"{count}, written by gemify {__version__}. {MISSING}: not measured."
    return [*blocks, f"{note} Undated: the same results give the same report."]


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Title": figure.get_suptitle(), "Software": "gemify"})
    return buffer.getvalue()


def to_html(text: str, images: Mapping[str, bytes]) -> str:
    """Markdown as a page of its own: HTML in it is shown as text, its images are put inside, its sections get links.

    Args:
        text: Markdown with tables; its first heading is the page's title.
        images: Content of the PNG files that it names.
    """
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(text)
    title, links = "", []
    for token, following in zip(tokens, [*tokens[1:], *tokens[:1]], strict=True):
        if token.type == "heading_open":
            words = "".join(child.content for child in following.children or [])
            title = title or words
            words = words.removesuffix(f" ({SUBSET})")
            token.attrSet("id", re.sub(r"\W+", "-", words.lower()).strip("-"))
            if token.tag == "h2":
                links.append(f'<a href="#{token.attrGet("id")}">{html.escape(words)}</a>')
        elif token.type == "inline":
            for child in token.children or []:
                if child.type == "image":
                    data = base64.b64encode(images[str(child.attrGet("src"))]).decode("ascii")
                    child.attrSet("src", f"data:image/png;base64,{data}")
        elif token.type in ("th_open", "td_open") and token.attrs.pop("style", ""):
            token.attrSet("class", "number")
    _mark_published(tokens)
    body = reader.renderer.render(tokens, reader.options, {})
    body = body.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
    page = importlib.resources.files("gemify.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(page).substitute(title=html.escape(title), links="\n".join(links), body=body)


def _mark_published(tokens: Sequence[Token]) -> None:
    """Set off the table rows with others' figures."""
    for at, token in enumerate(tokens):
        if token.type == "tr_open" and PUBLISHED in tokens[at + 2].content:
            token.attrSet("class", "published")


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
    text = path.read_text(encoding="utf-8") if path.is_file() else model_card(name, config)
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
