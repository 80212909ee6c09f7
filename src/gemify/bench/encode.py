"""``gemify bench encode``: our `encode` against other ways to embed with the same weights.

    gemify                     the plain weights (the model's special token, nothing gated), as `gemify export` writes them
    gemify, compiled           the same with ``compile=True``
    gemify, gated              the model itself, where it is a gated one
    sentence-transformers      its `encode` on the export, with its defaults
    bidirectional              every token sees every token, mean over the text (LLM2Vec, arXiv 2404.05961)
    Echo                       the text twice, mean over the second (arXiv 2402.15449)

All embed the same texts in turn (A B C A B C), after a warm-up; tokens are the texts' own, so that neither padding nor a
repeated text counts. A ratio is the median of the rounds' own ratios. Beside the clock stand the processor's seconds,
which other work on the machine moves less.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from gemify.evaluation.baselines import BaselineEncoder, BidirectionalEncoder, load_sentence_transformer
from gemify.io.rows import find_row_file, load_rows
from gemify.model.base import default_device
from gemify.model.export import export
from gemify.model.gem import GemModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEER = "sentence-transformers"
OURS, COMPILED, GATED = "gemify", "gemify, compiled", "gemify, gated"
SIDES = (OURS, COMPILED, GATED, PEER, "bidirectional", "Echo")


@dataclass(frozen=True)
class Side:
    """One way to embed: texts -> vectors, and what share of the columns it computed was padding."""

    encode: Callable[[list[str]], np.ndarray]
    padding: Callable[[], float | None] = lambda: None


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
    sides: Sequence[str] = SIDES,
    rounds: int = 3,
    max_tokens: int | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """Time every side over the texts; gives a JSON-ready report. ``max_tokens``: columns of our batches."""
    if unknown := sorted(set(sides) - set(SIDES)):
        raise ValueError(f"unknown side {unknown[0]!r}: choose from {'; '.join(SIDES)}")
    listed = list(texts)
    device = device or str(default_device())  # the same for every side
    with (
        tempfile.TemporaryDirectory() as kept,
        _sides(model, Path(kept) / "plain", dtype, device, sides, max_tokens) as (run, tokens),
    ):
        vectors, seconds_to_start = {}, {}
        for name, side in run.items():  # the first passes, which compile what is to be compiled
            start = time.perf_counter()
            side.encode(listed[: max(1, len(listed) // 4)])
            seconds_to_start[name] = round(time.perf_counter() - start, 2)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in run}
        bar = tqdm(total=rounds * len(run), desc="encode", unit="run", disable=not show_progress_bar)
        for _ in range(rounds):
            for name, side in run.items():
                start, used = time.perf_counter(), time.process_time()
                vectors[name] = side.encode(listed)
                times[name].append((time.perf_counter() - start, time.process_time() - used))
                bar.update()
        bar.close()
        count = sum(tokens(listed))
        rows = {name: _row(name, times, count, run[name], vectors) for name in run}
    for name, row in rows.items():
        row["seconds_to_start"] = seconds_to_start[name]
    return {
        "model": model,
        "texts": len(listed),
        "tokens": count,
        "rounds": rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
        "max_tokens": max_tokens,
        "rows": rows,
    }


@contextmanager
def _sides(
    model: str, directory: Path, dtype: torch.dtype, device: str | None, wanted: Sequence[str], max_tokens: int | None
) -> Iterator[tuple[dict[str, Side], Callable[[list[str]], list[int]]]]:
    """The sides to time, all on the same weights, and how many tokens they read of each text."""
    gem = GemModel.from_pretrained(model, dtype=dtype, device=device)
    gated = gem.config.tune == "gated"
    written = export(_ungated(gem), directory)
    if len(written.embedding) != 1:
        raise ValueError(f"a plain export of {gem.config.k} special tokens is as many encoders: give a model of one")
    plain = GemModel.from_pretrained(directory, dtype=dtype, device=device)
    own = GemModel.from_pretrained(model, dtype=dtype, device=device) if gated and GATED in wanted else None
    made: dict[str, Side] = {
        OURS: _ours(plain, max_tokens=max_tokens),
        COMPILED: _ours(plain, max_tokens=max_tokens, compile=True),
    }
    if own is not None:
        made[GATED] = _ours(own, max_tokens=max_tokens)
    if PEER in wanted:
        made[PEER] = _theirs(str(directory / written.embedding[0]), device, dtype)
    made["bidirectional"] = Side(
        BidirectionalEncoder(plain.lm, plain.tokenizer, "mean", plain.config.max_length).encode
    )
    made["Echo"] = Side(BaselineEncoder(plain.lm, plain.tokenizer, "echo", plain.config.max_length).encode)

    def tokens(texts: list[str]) -> list[int]:
        return [len(ids) + 1 for ids in plain.text_tokenizer(texts, max_tokens=plain.config.max_text_tokens)]

    yield {name: made[name] for name in SIDES if name in wanted and name in made}, tokens


def _ungated(gem: GemModel) -> GemModel:
    """The model with its trained rows alone: a gated LoRA is in no plain export."""
    if gem.config.tune != "gated":
        return gem
    assert gem.adapter is not None
    lm = gem.adapter.unload(gem.lm)
    return GemModel(lm, gem.tokenizer, dataclasses.replace(gem.config, tune="tokens"), gem.adapter)


def _ours(gem: GemModel, **options: Any) -> Side:
    def padding() -> float:
        return gem.meter.padding / max(1, gem.meter.tokens)

    return Side(lambda texts: np.asarray(gem.encode(texts, **options)), padding)


def _theirs(directory: str, device: str | None, dtype: torch.dtype) -> Side:
    peer = load_sentence_transformer(directory, device=device or "cpu", dtype=dtype)
    seen = {"columns": 0, "real": 0}

    def count(module: Any, args: tuple[Any, ...]) -> None:
        seen["columns"] += args[0]["attention_mask"].numel()
        seen["real"] += int(args[0]["attention_mask"].sum())

    peer[0].register_forward_pre_hook(count)

    def encode(texts: list[str]) -> np.ndarray:
        seen.update(columns=0, real=0)
        return np.asarray(peer.encode(texts, show_progress_bar=False), dtype=np.float32)

    return Side(encode, lambda: 1.0 - seen["real"] / max(1, seen["columns"]))


def _row(
    name: str,
    times: Mapping[str, Sequence[tuple[float, float]]],
    tokens: int,
    side: Side,
    vectors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    clock, used = ([pair[at] for pair in times[name]] for at in (0, 1))
    padding = side.padding()
    row: dict[str, Any] = {
        "seconds": [round(s, 3) for s in clock],
        "processor_seconds": [round(s, 3) for s in used],
        "tokens_per_second": round(tokens / statistics.median(clock), 1),
        "tokens_per_processor_second": round(tokens / max(1e-9, statistics.median(used)), 1),
        "padding": None if padding is None else round(padding, 4),
        "ratio": None,
        "processor_ratio": None,
        "largest_difference": None,
    }
    if PEER in times:
        pairs = list(zip(times[PEER], times[name], strict=True))
        row["ratio"] = round(statistics.median(theirs[0] / own[0] for theirs, own in pairs), 3)
        row["processor_ratio"] = round(statistics.median(theirs[1] / max(1e-9, own[1]) for theirs, own in pairs), 3)
        if name in (OURS, COMPILED):
            row["largest_difference"] = float(np.abs(vectors[name] - vectors[PEER]).max())
    return row


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"{report['texts']} texts, {report['tokens']:,} tokens, {report['dtype']}, {report['threads']} threads,"
        f" medians of {report['rounds']} rounds",
        "",
        f"| | tokens/s | over {PEER} | tokens/processor s | over {PEER} | padding | largest difference | first pass (s) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['tokens_per_processor_second']:,.0f}",
            "" if row["processor_ratio"] is None else f"{row['processor_ratio']:.2f}",
            "" if row["padding"] is None else f"{row['padding']:.1%}",
            "" if row["largest_difference"] is None else f"{row['largest_difference']:.1e}",
            f"{row['seconds_to_start']:.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: Mapping[str, Any]) -> Figure:
    """Bars: tokens a second of every side; points: its rounds."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(8.0, 1.2 + 0.5 * len(rows)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for at, row in enumerate(rows.values()):
        axes.barh(at, row["tokens_per_second"], color="#0072b2", height=0.6)
        rounds = [report["tokens"] / seconds for seconds in row["seconds"]]
        axes.plot(rounds, [at] * len(rounds), "o", color="#000000", markersize=4)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second ({report['dtype']}, {report['threads']} threads; points: rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Encoding {report['texts']} texts with the same weights", fontsize=12)
    return figure
