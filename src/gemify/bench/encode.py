"""`gemify bench encode`: our `encode` against other ways to embed with the same weights.

    gemify                     the plain weights (with the special token, not gated), as `gemify export` writes them;
                               of a GEM with an embedding pass of its own the GEM itself
    gemify, compiled           the same with ``compile=True``
    gemify, gated              the model itself, if it is a gated one
    sentence-transformers      its `encode` on the export, with its defaults
    bidirectional              every token sees every token, mean over the text (LLM2Vec, arXiv 2404.05961)
    Echo                       the text twice, mean over the second (arXiv 2402.15449)

Tokens are the texts' own: neither padding nor a repeated text counts.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemify.bench.timing import Report, Runs, make_report, median_ratio, plot_rows, rows_table, run_in_turn
from gemify.evaluation.baselines import BaselineEncoder, BidirectionalEncoder, load_sentence_transformer
from gemify.io.rows import find_row_file, load_rows
from gemify.model.base import default_device
from gemify.model.export import export
from gemify.model.gem import GemModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENTENCE_TRANSFORMERS = "sentence-transformers"
OURS, COMPILED, GATED = "gemify", "gemify, compiled", "gemify, gated"
ENCODERS = (OURS, COMPILED, GATED, SENTENCE_TRANSFORMERS, "bidirectional", "Echo")


@dataclass(frozen=True)
class Encoder:
    """One way to embed."""

    encode: Callable[[list[str]], np.ndarray]
    """Texts to vectors [N, D]."""
    padding: Callable[[], float | None] = lambda: None
    """Share of padding among the tokens of its last batch of texts, if known."""


def read_texts(path: Path, count: int) -> list[str]:
    """Texts of a corpus, taken evenly over the file.

    Args:
        path: A file of rows with ``text`` (and ``title``), or a directory that holds one named ``corpus``.
        count: How many texts to take.

    Returns:
        At most ``count`` texts, each behind its title.

    Raises:
        ValueError: There is no such file, or a row without text.
    """
    found = path if path.is_file() else find_row_file(path, "corpus")
    if found is None:
        raise ValueError(f"{path} is no file of rows and holds no corpus.jsonl (or .csv, .parquet, ...)")
    texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in load_rows(found, {"text": str})]
    return [texts[int(at)] for at in np.linspace(0, len(texts) - 1, min(count, len(texts)))]


def bench_encode(
    model: str,
    texts: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    encoders: Sequence[str] = ENCODERS,
    rounds: int = 3,
    max_tokens: int | None = None,
    show_progress_bar: bool = True,
) -> Report:
    """Time encoders (names of `ENCODERS`) over the texts. ``max_tokens``: of a batch of ours."""
    if unknown := sorted(set(encoders) - set(ENCODERS)):
        raise ValueError(f"unknown encoder {unknown[0]!r}: choose from {'; '.join(ENCODERS)}")
    listed = list(texts)
    device = device or str(default_device())  # the same for every encoder
    with (
        tempfile.TemporaryDirectory() as directory,
        _load_encoders(model, Path(directory) / "plain", dtype, device, encoders, max_tokens) as (loaded, count_tokens),
    ):
        few = listed[: max(1, len(listed) // 4)]
        warmup = run_in_turn({name: lambda _, e=e: e.encode(few) for name, e in loaded.items()}, rounds=1)  # type: ignore[misc]
        runs = run_in_turn(
            {name: lambda _, e=e: e.encode(listed) for name, e in loaded.items()},  # type: ignore[misc]
            rounds=rounds,
            description="encode",
            show_progress_bar=show_progress_bar,
        )
        tokens = sum(count_tokens(listed))
        rows = [
            {
                **_row(name, runs, tokens, loaded[name].padding()),
                "first_pass_seconds": round(warmup[name].seconds[0], 2),
            }
            for name in loaded
        ]
    settings = {"model": model, "texts": len(listed), "tokens": tokens, "rounds": rounds, "max_tokens": max_tokens}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "device": device}
    return make_report(settings, rows)


@contextmanager
def _load_encoders(
    model: str, directory: Path, dtype: torch.dtype, device: str | None, wanted: Sequence[str], max_tokens: int | None
) -> Iterator[tuple[dict[str, Encoder], Callable[[list[str]], list[int]]]]:
    """The encoders to time, all on the same weights, and what counts the tokens that they read of each text."""
    gem = GemModel.from_pretrained(model, dtype=dtype, device=device)
    gated = gem.config.tune == "gated"
    written = export(without_gate(gem), directory)
    if len(written.embedding) != 1:
        raise ValueError(f"a plain export of {gem.config.k} special tokens is as many encoders: give a model of one")
    own_pass = gem.config.tune == "embedding_lora"  # its export holds merged weights, which are no GEM
    plain = GemModel.from_pretrained(model if own_pass else directory, dtype=dtype, device=device)
    own = GemModel.from_pretrained(model, dtype=dtype, device=device) if gated and GATED in wanted else None
    made: dict[str, Encoder] = {
        OURS: _ours(plain, max_tokens=max_tokens),
        COMPILED: _ours(plain, max_tokens=max_tokens, compile=True),
    }
    if own is not None:
        made[GATED] = _ours(own, max_tokens=max_tokens)
    if SENTENCE_TRANSFORMERS in wanted:
        made[SENTENCE_TRANSFORMERS] = _theirs(str(directory / written.embedding[0]), device, dtype)
    base = plain.lm, plain.tokenizer
    made["bidirectional"] = Encoder(BidirectionalEncoder(*base, "mean", plain.config.max_length).encode)
    made["Echo"] = Encoder(BaselineEncoder(*base, "echo", plain.config.max_length).encode)

    def count_tokens(texts: list[str]) -> list[int]:
        return [len(ids) + 1 for ids in plain.text_tokenizer(texts, max_tokens=plain.config.max_text_tokens)]

    yield {name: made[name] for name in ENCODERS if name in wanted and name in made}, count_tokens


def without_gate(gem: GemModel) -> GemModel:
    """The model with its trained embedding rows but without its gated LoRA, which no plain export holds."""
    if gem.config.tune != "gated":
        return gem
    assert gem.adapter is not None
    lm = gem.adapter.unload(gem.lm)
    return GemModel(lm, gem.tokenizer, dataclasses.replace(gem.config, tune="tokens"), gem.adapter)


def _ours(gem: GemModel, **options: Any) -> Encoder:
    def padding() -> float:
        return gem.meter.padding / max(1, gem.meter.tokens)

    return Encoder(lambda texts: np.asarray(gem.encode(texts, **options)), padding)


def _theirs(directory: str, device: str | None, dtype: torch.dtype) -> Encoder:
    transformer = load_sentence_transformer(directory, device=device or "cpu", dtype=dtype)
    seen = {"tokens": 0, "real": 0}

    def count(module: Any, args: tuple[Any, ...]) -> None:
        seen["tokens"] += args[0]["attention_mask"].numel()
        seen["real"] += int(args[0]["attention_mask"].sum())

    transformer[0].register_forward_pre_hook(count)

    def encode(texts: list[str]) -> np.ndarray:
        seen.update(tokens=0, real=0)
        return np.asarray(transformer.encode(texts, show_progress_bar=False), dtype=np.float32)

    return Encoder(encode, lambda: 1.0 - seen["real"] / max(1, seen["tokens"]))


def _row(name: str, runs: Mapping[str, Runs[np.ndarray]], tokens: int, padding: float | None) -> dict[str, Any]:
    ours, theirs = runs[name], runs.get(SENTENCE_TRANSFORMERS)
    row: dict[str, Any] = {
        "name": name,
        "seconds": [round(s, 3) for s in ours.seconds],
        "cpu_seconds": [round(s, 3) for s in ours.cpu_seconds],
        "tokens_per_second": round(tokens / statistics.median(ours.seconds), 1),
        "tokens_per_cpu_second": round(tokens / max(1e-9, statistics.median(ours.cpu_seconds)), 1),
        "padding": None if padding is None else round(padding, 4),
    }
    if theirs is not None:
        row["speedup"] = round(median_ratio(theirs.seconds, ours.seconds), 3)
        row["cpu_speedup"] = round(median_ratio(theirs.cpu_seconds, ours.cpu_seconds), 3)
        if name in (OURS, COMPILED):
            row["max_difference"] = float(np.abs(ours.results[-1] - theirs.results[-1]).max())
    return row


COLUMNS = {
    "name": ("encoder", ""),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "speedup": (f"over {SENTENCE_TRANSFORMERS}", ".2f"),
    "tokens_per_cpu_second": ("tokens/CPU s", ",.0f"),
    "cpu_speedup": (f"over {SENTENCE_TRANSFORMERS}", ".2f"),
    "padding": ("padding", ".1%"),
    "max_difference": ("max difference", ".1e"),
    "first_pass_seconds": ("first pass (s)", ".1f"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    s = report["settings"]
    head = f"{s['texts']} texts, {s['tokens']:,} tokens, {s['dtype']}, {report['machine']['threads']} threads,"
    return f"{head} medians of {s['rounds']} rounds\n\n{rows_table(report['rows'], COLUMNS)}"


def plot(report: Report) -> Figure:
    """Tokens per second of every encoder; points: its rounds."""
    s = report["settings"]
    label = f"tokens per second ({s['dtype']}, {report['machine']['threads']} threads; points: rounds)"
    return plot_rows(report, "tokens_per_second", label, points=lambda row: [s["tokens"] / x for x in row["seconds"]])
