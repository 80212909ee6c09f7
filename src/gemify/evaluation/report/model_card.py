"""The model card of a saved GEM: what it is, and what was measured of it. Nothing that was not measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gemify.evaluation.report.comparison import eval_results
from gemify.evaluation.report.render import card_section
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.io.atomic import atomic_file
from gemify.model.base import STARTER, STARTER_REPO
from gemify.model.config import GemConfig

CARD_FILE = "README.md"
_START, _END = "<!-- gemify: measured results -->", "<!-- gemify: end of measured results -->"


def write_card(directory: Path, store: ResultStore, entry: ModelEntry) -> Path:
    """Write or renew the measured results in a GEM's README.md; what else stands in it stays."""
    config = GemConfig.from_directory(directory)
    path = directory / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else _description(directory.resolve().name, config)
    block = f"{_START}\n{card_section(store, entry).strip()}\n{_END}"
    found = re.search(f"{re.escape(_START)}.*?{re.escape(_END)}", text, re.S)
    text = text[: found.start()] + block + text[found.end() :] if found else f"{text.rstrip()}\n\n{block}\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    known = {k: v for k, v in data.to_dict().items() if k != "model-index"}
    results = [EvalResult(**row) for row in eval_results(store, entry)]
    name = directory.resolve().name
    card.data = ModelCardData(**{"model_name": name, **known, **({"eval_results": results} if results else {})})
    with atomic_file(path) as stage:
        stage.write_text(str(card), encoding="utf-8")
    return path


def _description(name: str, config: GemConfig) -> str:
    base = STARTER_REPO if config.base == STARTER else config.base
    hub_name = base if base.count("/") == 1 and not Path(base).exists() else None
    lines = ["---", "library_name: gemify", "tags:", "- embeddings", "- feature-extraction", "- gemify"]
    lines += [f"base_model: {hub_name}"] if hub_name else []
    kept = (
        "The base model's weights are untouched: without a special token in the input, logits are the base's to the bit."
        if config.frozen_base
        else "The base model's weights were trained, so its language model has changed: see the differences below."
    )
    return "\n".join(
        [
            *lines,
            "---",
            "",
            f"# {name}",
            "",
            f"One language model that writes and embeds: {Path(base).name}, tuned `{config.tune}` with {config.k} special"
            f" token(s) by gemify (GEM, arXiv 2506.04344). {kept}",
            "",
            "```python",
            "from gemify import GemModel",
            "",
            f'gem = GemModel.from_pretrained("{name}")',
            'vectors = gem.encode(["a text", "another"])',
            'answer = gem.chat([{"role": "user", "content": "a question"}])',
            "```",
            "",
        ]
    )
