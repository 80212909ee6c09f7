"""`gemify bench rag`: what caches save when one model retrieves and answers (after GritLM's Table 7, arXiv 2402.09906).

Every question is answered in every way before the next question is. Documents are passages lengthened by the ones after
them in the file, so that all have the same number of tokens.
"""

from __future__ import annotations

import re
import statistics
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gemify.bench.retrieval import Question
from gemify.bench.timing import Report, make_report, median_ratio, rows_table, run_in_turn
from gemify.io.vectors import normalize
from gemify.model.base import max_positions
from gemify.model.gem import GemModel
from gemify.rag.context import QueryEmbedder
from gemify.rag.kv_store import KvStore
from gemify.rag.pipeline import Answer, GemRag, RagSettings


@dataclass(frozen=True)
class Document:
    """A document of the bench, as a retrieved passage."""

    text: str
    passage: str
    """Id of the passage that it begins with."""
    title: str = ""
    heading: str = ""
    file: str = ""
    location: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Pipeline:
    """One way to answer."""

    name: str
    settings: RagSettings
    baseline: str | None = None
    """The pipeline that its times are divided by."""
    exact: str | None = None
    """The pipeline that must give the same answers. None: the baseline."""
    keeps_caches: bool = False
    """Whether the documents' caches are kept."""
    embedder: Literal["self", "second model", "none"] = "self"
    """What embeds the question; ``none``: its vector is known, so that only generation is timed."""


_RAG = RagSettings(passages=1, mode="vector")
_FIRST, _LAST = replace(_RAG, order="question-first"), replace(_RAG, order="passages-first")
_KEPT = {"baseline": "document, query", "keeps_caches": True}
PIPELINES = (
    Pipeline("no retrieval", replace(_FIRST, passages=0)),
    Pipeline("generation alone", _FIRST, embedder="none"),
    Pipeline("query, document", replace(_FIRST, query_cache=False), "generation alone"),
    Pipeline("query cached, document", _FIRST, "generation alone", "query, document"),
    Pipeline("document, query", _LAST),
    Pipeline("document cached, query", _LAST, **_KEPT),  # type: ignore[arg-type]
    Pipeline("both cached (concatenated)", replace(_FIRST, context="concatenated"), **_KEPT),  # type: ignore[arg-type]
    Pipeline("document's special tokens", replace(_LAST, context="special"), **_KEPT),  # type: ignore[arg-type]
    Pipeline("two models: document, query", _LAST, "document, query", embedder="second model"),
)


class ExactSearch:
    """Exact search over a few documents' vectors, so that a pipeline's time is the model's."""

    def __init__(self, documents: Sequence[Document], vectors: np.ndarray) -> None:
        self._documents = documents
        self._vectors_ND = normalize(vectors)

    def search(
        self,
        query: str,
        *,
        k: int = 10,
        mode: Any = "vector",
        vector: np.ndarray | None = None,
        where: str | None = None,
    ) -> list[Document]:
        """The k documents nearest to ``vector``."""
        assert vector is not None
        best = np.argsort(-(self._vectors_ND @ vector), kind="stable")[:k]
        return [self._documents[int(i)] for i in best]


class _KnownVectors:
    """Vectors of questions that were embedded before: an embedder that takes no time."""

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        self._vectors = vectors

    def encode_query(self, inputs: str) -> np.ndarray:
        return self._vectors[inputs]


@dataclass(frozen=True)
class SecondEncoder:
    """The embedding model of a two-model stack."""

    name: str
    encode: Callable[[list[str]], np.ndarray]
    """Texts to vectors [N, D]."""

    def encode_query(self, inputs: str) -> np.ndarray:
        """Vector [D] of one question."""
        return np.asarray(self.encode([inputs]))[0]


def bench_rag(
    gem: GemModel,
    *,
    passages: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    lengths: Sequence[int],
    second_encoder: SecondEncoder | None = None,
    bits: int = 16,
    max_new_tokens: int = 24,
    only: Sequence[str] = (),
    show_progress_bar: bool = True,
) -> Report:
    """Answer the questions by every pipeline over documents of every length (in tokens).

    ``only`` names pipelines; those that they are compared with are added. The two-model pipeline needs a
    ``second_encoder``. Raises ValueError for a length that the model does not take, and for an unknown pipeline.
    """
    limit = max_positions(gem.lm)
    for length in lengths:
        if length < 1 or (limit is not None and length + 256 + max_new_tokens > limit):
            raise ValueError(f"documents of {length} tokens do not fit: this model takes {limit} tokens in all")
    if not questions:
        raise ValueError("no question given: the data has none")
    pipelines = [
        p
        for p in _select(only)
        if (second_encoder is not None or p.embedder != "second model")
        and (gem.config.k or p.settings.context != "special")
    ]
    texts, asked = [str(p["text"]) for p in passages], [q.text for q in questions]
    vectors = {"self": gem.encode_document(texts)}
    vectors["none"] = vectors["self"]
    known = _KnownVectors(dict(zip(asked, gem.encode_query(asked), strict=True)))
    if second_encoder is not None:
        vectors["second model"] = np.asarray(second_encoder.encode(texts))
    embedders: dict[str, QueryEmbedder | None] = {"self": None, "none": known, "second model": second_encoder}
    rows = []
    for length in lengths:
        documents = list(make_documents(gem, passages, length))
        with tempfile.TemporaryDirectory() as directory:
            rags = {}
            for p in pipelines:
                kv = KvStore(Path(directory) / p.name, fingerprint="bench", bits=bits) if p.keeps_caches else None
                index = ExactSearch(documents, vectors[p.embedder])
                settings = replace(p.settings, max_new_tokens=max_new_tokens)
                rags[p.name] = GemRag(gem, index, kv=kv, embedder=embedders[p.embedder], settings=settings)
            runs = run_in_turn(
                {p.name: lambda n, rag=rags[p.name]: _answer(rag, questions[n]) for p in pipelines},  # type: ignore[misc]
                rounds=len(questions),
                description=f"{length} tokens",
                show_progress_bar=show_progress_bar,
            )
            answers = {name: run.results for name, run in runs.items()}
            for p in pipelines:
                row = {"document_tokens": length, **_row(p, answers, questions, rags)}
                row["stored_bytes"] = round(4 * vectors["self"].shape[1] + _bytes_per_cache(rags[p.name].kv))
                rows.append(row)
    used = {
        "questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "kv_bits": bits,
        "dtype": str(gem.lm.dtype).removeprefix("torch."),
        "second_encoder": second_encoder.name if second_encoder is not None else None,
    }
    return make_report(used, rows)


def _answer(rag: GemRag, question: Question) -> Answer:
    if rag.kv is not None:  # the cache is made when documents are indexed, and not timed
        rag.ask(question.text, max_new_tokens=1)
    return rag.ask(question.text)


def _bytes_per_cache(kv: KvStore | None) -> float:
    return kv.nbytes / len(kv) if kv is not None and len(kv) else 0.0


def _select(names: Sequence[str]) -> list[Pipeline]:
    """The pipelines of these names (all if none is given) and those they are compared with, in order."""
    known = {p.name: p for p in PIPELINES}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"unknown pipeline {wrong[0]!r}: choose from {', '.join(map(repr, known))}")
    selected, new = set[str](), set(names or known)
    while new:
        selected |= new
        new = {other for name in new for other in (known[name].baseline, known[name].exact) if other} - selected
    return [p for p in PIPELINES if p.name in selected]


def make_documents(gem: GemModel, passages: Sequence[Mapping[str, Any]], tokens: int) -> Iterator[Document]:
    """One document per passage: the passage and the ones after it, cut to ``tokens``."""
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
    """Whether the answer holds a gold answer, without regard to case, articles and punctuation (as GritLM counts)."""
    words = f" {_normalize_words(answer)} "
    return any(f" {g} " in words for g in map(_normalize_words, gold) if g)


def _normalize_words(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _divergence(rag: GemRag, exact: GemRag, question: Question, answer: Answer) -> float:
    """KL divergence, in nats, of the approximation's first token from the exact prompt's over the same passages."""
    same_order = GemRag(exact.gem, None, settings=replace(rag.settings, context="text"))
    logits = [r.conversation().prefill(question.text, answer.passages).logits_BV[0].float() for r in (same_order, rag)]
    p, q = (torch.log_softmax(row, dim=-1) for row in logits)
    return float((p.exp() * (p - q)).sum())


def _row(
    pipeline: Pipeline,
    answers: Mapping[str, Sequence[Answer]],
    questions: Sequence[Question],
    rags: Mapping[str, GemRag],
) -> dict[str, Any]:
    ours = answers[pipeline.name]
    asked = list(zip(questions, ours, strict=True))
    first_token, total = _seconds(ours)
    row: dict[str, Any] = {
        "name": pipeline.name,
        "baseline": pipeline.baseline,
        "recall_at_1": _percent([any(getattr(p, "passage", None) == q.passage for p in a.passages) for q, a in asked]),
        "match": _percent([matches(a.text, q.answers) for q, a in asked]),
        "first_token_ms": round(1000 * statistics.median(first_token), 1),
        "total_ms": round(1000 * statistics.median(total), 1),
        "computed_tokens": statistics.median(a.timing.computed for a in ours),
    }
    if pipeline.baseline is not None:
        baseline_first_token, baseline_total = _seconds(answers[pipeline.baseline])
        row["first_token_ratio"] = round(median_ratio(first_token, baseline_first_token), 3)
        row["total_ratio"] = round(median_ratio(total, baseline_total), 3)
        exact = answers[pipeline.exact or pipeline.baseline]
        row["equal_answers"] = _percent([a.text == b.text for a, b in zip(ours, exact, strict=True)])
    if pipeline.settings.context != "text":
        rag, exact_rag = rags[pipeline.name], rags[pipeline.baseline or ""]
        row["divergence_nats"] = round(statistics.median(_divergence(rag, exact_rag, q, a) for q, a in asked), 3)
    return row


def _seconds(answers: Sequence[Answer]) -> tuple[list[float], list[float]]:
    return [a.timing.first_token for a in answers], [a.timing.total for a in answers]


def _percent(values: Sequence[bool]) -> float:
    return round(100 * sum(values) / len(values), 1)


COLUMNS = {
    "name": ("pipeline", ""),
    "document_tokens": ("document tokens", ",d"),
    "match": ("match %", ""),
    "recall_at_1": ("recall@1 %", ""),
    "first_token_ms": ("first token (ms)", ""),
    "first_token_ratio": ("over baseline", ""),
    "total_ms": ("total (ms)", ""),
    "total_ratio": ("over baseline", ""),
    "baseline": ("baseline", ""),
    "equal_answers": ("equal answers %", ""),
    "divergence_nats": ("first token, KL (nats)", ""),
    "computed_tokens": ("tokens computed", ""),
    "stored_bytes": ("bytes per document", ",d"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    return rows_table(report["rows"], COLUMNS)
