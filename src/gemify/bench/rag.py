"""``gemify bench rag``: what caches save when one model retrieves and answers (after GritLM's Table 7, arXiv 2402.09906).

Every question goes through every row before the next question does (A B C A B C), so that a busy moment of the machine
falls on all rows alike; ratios are medians of each question's own ratio. Documents are passages lengthened by the ones
after them in the file, so that all have the same number of tokens.
"""

from __future__ import annotations

import re
import statistics
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from gemify.bench.questions import Question
from gemify.io.vectors import normalize
from gemify.model.base import max_positions
from gemify.model.gem import GemModel
from gemify.rag.kv_store import KvStore
from gemify.rag.pipeline import Answer, GemRag, QueryEmbedder, RagSettings


@dataclass(frozen=True)
class Document:
    """A document of the bench, as a passage that was found."""

    text: str
    passage: str
    """Id of the passage that it begins with."""
    title: str = ""
    heading: str = ""
    file: str = ""
    location: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Row:
    """One way to answer; ``over`` names the row that it is compared with."""

    name: str
    settings: RagSettings
    keeps: bool = False
    """Whether documents' caches are kept."""
    embeds: str = "self"
    """self, peer (a second model), or nobody (the vector is known: generation alone)."""
    over: str | None = None
    same: str | None = None
    """The row that should give the same answers; by default the one it is compared with."""


_ASK = RagSettings(passages=1, mode="vector")
_FIRST, _LAST = replace(_ASK, order="question-first"), replace(_ASK, order="passages-first")
ROWS = (
    Row("no retrieval", replace(_FIRST, passages=0)),
    Row("generation alone", _FIRST, embeds="nobody"),
    Row("query, document", replace(_FIRST, query_cache=False), over="generation alone"),
    Row("query cached, document", _FIRST, over="generation alone", same="query, document"),
    Row("document, query", _LAST),
    Row("document cached, query", _LAST, keeps=True, over="document, query"),
    Row("both cached (concatenated)", replace(_FIRST, context="concatenated"), keeps=True, over="document, query"),
    Row("document's special tokens", replace(_LAST, context="special"), keeps=True, over="document, query"),
    Row("two models: document, query", _LAST, embeds="peer", over="document, query"),
)


@dataclass
class Record:
    """What was measured of one row at one length, a value a question."""

    found: list[bool] = field(default_factory=list)
    match: list[bool] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    """Whether the answer is that of the row that should give the same."""
    divergence: list[float] = field(default_factory=list)
    """KL divergence, in nats, of the first answer token's distribution from the exact prompt's."""
    first_token: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    stored_bytes: float = 0.0
    """A document, beside its text."""


class Shelf:
    """Exact search over a few documents' vectors, so that a row's time is the model's."""

    def __init__(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        self._documents = documents
        self._vectors = normalize(vectors)

    def search(
        self, query: str, *, k: int = 10, mode: Any = "vector", vector: np.ndarray | None = None
    ) -> list[Document]:
        assert vector is not None
        best = np.argsort(-(self._vectors @ vector), kind="stable")[:k]
        return [self._documents[int(i)] for i in best]


class _Known:
    """Vectors of questions that were embedded before: an embedder that takes no time."""

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        self._vectors = vectors

    def encode_query(self, inputs: str) -> np.ndarray:
        return self._vectors[inputs]


@dataclass(frozen=True)
class Peer:
    """The second model of the two-model stack: a name for the table, and its `encode` (texts -> [N, D])."""

    name: str
    encode: Callable[[list[str]], np.ndarray]

    def encode_query(self, inputs: str) -> np.ndarray:
        return np.asarray(self.encode([inputs]))[0]


def bench_rag(
    gem: GemModel,
    *,
    passages: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    lengths: Sequence[int],
    peer: Peer | None = None,
    bits: int = 16,
    max_new_tokens: int = 24,
    only: Sequence[str] = (),
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """Measure rows (``only`` these and the ones they are compared with) at every document length (tokens).

    Gives a JSON-ready report. Raises ValueError if the model has no room for a length, or a row has no such name.
    """
    limit = max_positions(gem.lm)
    for length in lengths:
        if length < 1 or (limit is not None and length + 256 + max_new_tokens > limit):
            raise ValueError(f"documents of {length} tokens do not fit: this model takes {limit} tokens in all")
    if not questions:
        raise ValueError("no question given: the data has none")
    rows = [row for row in _chosen(only) if peer is not None or row.embeds != "peer"]
    rows = [row for row in rows if gem.config.k or row.settings.context != "special"]
    texts = [str(p["text"]) for p in passages]
    own = gem.encode_document(texts)
    asked = [q.text for q in questions]
    known = _Known(dict(zip(asked, gem.encode_query(asked), strict=True)))
    theirs = np.asarray(peer.encode(texts)) if peer is not None else None
    report: dict[str, Any] = {
        "questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "kv_bits": bits,
        "dtype": str(gem.lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "peer": peer.name if peer is not None else None,
        "lengths": {},
    }
    bar = tqdm(total=len(lengths) * len(questions) * len(rows), unit="answer", disable=not show_progress_bar)
    for length in lengths:
        documents = list(lengthened(gem, passages, length))
        with tempfile.TemporaryDirectory() as kept:
            stacks: dict[str, GemRag] = {}
            records = {row.name: Record(stored_bytes=own.shape[1] * 4) for row in rows}
            for row in rows:
                kv = KvStore(Path(kept) / row.name, fingerprint="bench", bits=bits) if row.keeps else None
                vectors = theirs if row.embeds == "peer" and theirs is not None else own
                embedder: QueryEmbedder | None = {"self": None, "nobody": known, "peer": peer}[row.embeds]
                settings = replace(row.settings, max_new_tokens=max_new_tokens)
                stacks[row.name] = GemRag(gem, Shelf(documents, vectors), kv=kv, embedder=embedder, settings=settings)
            for question in questions:
                answers: dict[str, Answer] = {}
                for row in rows:
                    rag = stacks[row.name]
                    if row.keeps:  # the cache is made at indexing time, and not timed
                        rag.ask(question.text, max_new_tokens=1)
                    answer = answers[row.name] = rag.ask(question.text)
                    _note(records[row.name], row, question, answer, answers)
                    if row.settings.context != "text":
                        records[row.name].divergence.append(_divergence(rag, stacks[row.over or ""], question, answer))
                    bar.update()
            for row in rows:
                if (kv := stacks[row.name].kv) is not None and len(kv):
                    records[row.name].stored_bytes += kv.nbytes / len(kv)
            report["lengths"][str(length)] = {
                row.name: _summary(records[row.name], records.get(row.over or "")) for row in rows
            }
    bar.close()
    return report


def _chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names (all if none is given) and those they are compared with, in the order of `ROWS`."""
    known = {row.name: row for row in ROWS}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"unknown row {wrong[0]!r}: choose from {', '.join(map(repr, known))}")
    wanted, new = set[str](), set(names or known)
    while new:
        wanted |= new
        new = {other for name in new for other in (known[name].over, known[name].same) if other} - wanted
    return [row for row in ROWS if row.name in wanted]


def lengthened(gem: GemModel, passages: Sequence[Mapping[str, Any]], tokens: int) -> Iterator[Document]:
    """A document a passage: the passage and the ones after it, cut to ``tokens``."""
    rows = gem.text_tokenizer.tokenize_plain([str(p["text"]) + "\n" for p in passages])
    if sum(map(len, rows)) < tokens:
        raise ValueError(f"the passages have {sum(map(len, rows))} tokens in all, documents of {tokens} are wanted")
    for at, passage in enumerate(passages):
        ids: list[int] = []
        step = 0
        while len(ids) < tokens:
            ids += rows[(at + step) % len(rows)]
            step += 1
        yield Document(str(gem.tokenizer.decode(ids[:tokens])), str(passage["_id"]))


def matches(answer: str, gold: Sequence[str]) -> bool:
    """Whether the answer contains one of the gold answers, case, articles and punctuation apart (as GritLM counts)."""
    said = f" {_plain(answer)} "
    return any(f" {_plain(g)} " in said for g in gold if _plain(g))


def _plain(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _note(record: Record, row: Row, question: Question, answer: Answer, answers: Mapping[str, Answer]) -> None:
    record.found.append(any(getattr(p, "passage", None) == question.passage for p in answer.passages))
    record.match.append(matches(answer.text, question.answers))
    record.first_token.append(answer.timing.first_token)
    record.total.append(answer.timing.total)
    record.computed.append(answer.timing.computed)
    if (same := row.same or row.over) is not None:
        record.equal.append(answer.text == answers[same].text)


def _divergence(rag: GemRag, exact: GemRag, question: Question, answer: Answer) -> float:
    """Of the approximation's first token from the exact prompt's, over the same passages, in the row's own order."""
    same = GemRag(exact.gem, None, settings=replace(rag.settings, context="text"))
    wide = [r.conversation().prefill(question.text, answer.passages).logits_BV[0].float() for r in (same, rag)]
    p, q = (torch.log_softmax(logits, dim=-1) for logits in wide)
    return float((p.exp() * (p - q)).sum())


def _summary(record: Record, over: Record | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "recall_at_1": _percent(record.found),
        "match": _percent(record.match),
        "first_token_ms": round(1000 * statistics.median(record.first_token), 1),
        "total_ms": round(1000 * statistics.median(record.total), 1),
        "computed_tokens": statistics.median(record.computed),
        "stored_bytes": round(record.stored_bytes),
    }
    if over is not None:
        summary["first_token_ratio"] = _ratio(record.first_token, over.first_token)
        summary["total_ratio"] = _ratio(record.total, over.total)
        summary["equal_answers"] = _percent(record.equal)
    if record.divergence:
        summary["divergence_nats"] = round(statistics.median(record.divergence), 3)
    return summary


def _percent(values: Sequence[bool]) -> float:
    return round(100 * sum(values) / len(values), 1)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown, a table a length."""
    heads = {
        "match": "match %",
        "recall_at_1": "recall@1 %",
        "first_token_ms": "first token, ms",
        "first_token_ratio": "ratio",
        "total_ms": "total, ms",
        "total_ratio": "ratio",
        "equal_answers": "equal answers %",
        "divergence_nats": "first token, KL nats",
        "computed_tokens": "tokens run",
        "stored_bytes": "bytes a document",
    }
    lines = []
    for length, rows in report["lengths"].items():
        lines += [f"documents of {length} tokens", "", "| | " + " | ".join(heads.values()) + " |"]
        lines.append("|---" * (len(heads) + 1) + "|")
        over = {row.name: row.over for row in ROWS}
        for name, row in rows.items():
            label = f"{name} (over {over[name]})" if over[name] else name
            lines.append(f"| {label} | " + " | ".join(str(row.get(head, "")) for head in heads) + " |")
        lines.append("")
    return "\n".join(lines)
