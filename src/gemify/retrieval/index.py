"""`GemIndex`: files in, passages out. What a directory holds is read, cut, embedded and kept; a question finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from gemify.io.signals import stop_signals
from gemify.retrieval.chunking import ChunkSettings
from gemify.retrieval.document_store import Hit, Precision, Store, StoreMeta
from gemify.retrieval.ingest import Embedder, IndexReport, Options, Run
from gemify.retrieval.loaders import Columns, find_files
from gemify.retrieval.section import Skipped
from gemify.retrieval.vector_table import Corpus

# Several rankings -> one, by reciprocal rank: needs no scores that can be compared.

_SMOOTHING = 60  # Cormack, Clarke and Büttcher (2009)


def fuse(rankings: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Names by the sum over rankings of 1 / (60 + rank), best first; ties keep the order of first mention."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, start=1):
            scores[name] = scores.get(name, 0.0) + 1 / (_SMOOTHING + rank)
    return sorted(scores.items(), key=lambda item: -item[1])


__all__ = ["Embedder", "GemIndex", "IndexReport", "Mode", "Passage", "Skipped"]

Mode = Literal["vector", "fts", "hybrid"]
_POOL = 50  # hits of each kind that a hybrid search fuses, at least


@dataclass(frozen=True)
class Passage:
    """A chunk that a search found."""

    id: str
    """The same as long as the file stays the same."""
    text: str
    file: str
    location: str
    title: str
    heading: str
    score: float
    """Higher is better: a cosine (vector), BM25 (fts), or a sum of reciprocal ranks (hybrid)."""

    def to_json(self) -> dict[str, Any]:
        """Fields under their names in HTTP answers and in ``--json`` output."""
        return {"place" if name == "location" else name: value for name, value in vars(self).items()}


class GemIndex:
    """Passages in a store, and the model that embeds them. Make one with `open`."""

    def __init__(self, store: Store | Corpus, model: Embedder | None) -> None:
        self.store, self.model = store, model

    @classmethod
    def open(
        cls,
        store: str | Path,
        model: Embedder | None,
        *,
        create: bool = True,
        model_name: str = "",
        tokens: int | None = None,
        overlap: int | None = None,
        context: bool | None = None,
        precision: Precision | None = None,
    ) -> GemIndex:
        """Open a store, or make one.

        Args:
            store: a directory, or a URI that LanceDB takes (``s3://bucket/path``).
            model: None serves full-text search, and vector search with vectors of the caller's.
            create: make the store if there is none.
            model_name: by what name the model is loaded, for a new store to remember.
            tokens: most tokens of a passage of a new store. None: the default, or what an existing store was made with.
            overlap: tokens that a passage repeats of the one before; None as for ``tokens``.
            context: embed title and headings with a passage; None as for ``tokens``.
            precision: of the stored vectors; None as for ``tokens``.

        Raises:
            ValueError: no store, a damaged one, or one made by another model or with other settings.
        """
        given: dict[str, Any] = {"tokens": tokens, "overlap": overlap, "context": context}
        given = {name: value for name, value in given.items() if value is not None}
        opened: Store | Corpus
        if Corpus.exists(store):
            opened = Corpus.open(store)
        elif not create or Store.exists(store):
            opened = Store.open(store)
            _require_settings(opened, given | ({} if precision is None else {"precision": precision}))
        elif model is None:
            raise ValueError(f"no store at {store}, and a new one needs a model: give one")
        else:
            settings = ChunkSettings(**given)
            _require_room(settings, model)
            dimension = model.get_embedding_dim()
            opened = Store.create(
                store, StoreMeta(model_name, model.fingerprint, dimension, precision or "float32", settings)
            )
        if model is not None:
            _require_same_model(opened, model)
            if isinstance(opened, Store):
                _require_room(opened.meta.chunk, model)
        return cls(opened, model)

    def __len__(self) -> int:
        """How many passages can be found."""
        return len(self.store)

    def add(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        text_column: str = "text",
        title_column: str = "title",
        limit: int | None = None,
        batch_size: int = 32,
        commit_tokens: int = 65_536,
        show_progress_bar: bool = False,
    ) -> IndexReport:
        """Bring files and directories, as they are now, into the index.

        Unchanged files (by content) are left alone, changed ones replaced, those that are no more removed. A file that cannot be read is reported, and what was known of it stays. Killed at any point, the same
        call finishes the work and ends with the same index; Ctrl-C and SIGTERM end it after the commit under way.

        Args:
            text_column: field of .jsonl rows that holds the text.
            title_column: field of .jsonl rows that holds the title.
            limit: most new or changed files to take in now.
            batch_size: most chunks that the model embeds at a time.
            commit_tokens: tokens embedded between two commits.

        Raises:
            ValueError: a path that does not exist, a damaged store, no model, another process writing.
            StopRequestedError: after a signal; what is committed stays.
        """
        if self.model is None:
            raise ValueError("adding files needs a model: open the index with one")
        if commit_tokens < 1 or batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(
                f"commit_tokens, batch_size and limit must be at least 1, got {commit_tokens}, {batch_size} and {limit}"
            )
        if isinstance(self.store, Corpus):
            raise ValueError(f"{self.store.uri} is a corpus that gemify embed-corpus writes: index files elsewhere")
        known = self.store.files()
        found = find_files([paths] if isinstance(paths, str | Path) else list(paths), known=known)
        options = Options(Columns(text_column, title_column), limit, batch_size, commit_tokens)
        with (
            self.store.writing(),
            stop_signals() as stop_flag,
            tqdm(desc="index", unit=" chunks", disable=not show_progress_bar) as bar,
        ):
            return Run(self.store, self.model, options, stop_flag, bar).over(found)

    def require_text(self) -> None:
        """Refuse to answer from passages of which only vectors are kept."""
        if isinstance(self.store, Corpus) and not self.store.meta.keep_text:
            raise ValueError(f"the corpus {self.store.uri} keeps no text to answer from: embed with --keep-text")

    def passages(self) -> Iterator[Passage]:
        """All passages, in no order (score 0)."""
        return (_passage(hit, 0.0) for hit in self.store.hits())

    def search(
        self, query: str, *, k: int = 10, mode: Mode = "hybrid", vector: np.ndarray | None = None
    ) -> list[Passage]:
        """The ``k`` passages that fit a question best, best first.

        Args:
            mode: ``vector`` (meaning), ``fts`` (words, BM25) or ``hybrid`` (both, fused by rank).
            vector: the question's embedding, where the caller has it already; then no model is needed.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not query.strip() and (mode != "vector" or vector is None):
            raise ValueError("the query is empty: give some words")
        if mode == "fts":
            return [_passage(hit, hit.score) for hit in self.store.text_search(query, k)]
        vector_D = self._embedded(query) if vector is None else np.asarray(vector, dtype=np.float32)
        if mode == "vector":
            return [_passage(hit, hit.score) for hit in self.store.vector_search(vector_D, k)]
        pool = max(_POOL, k)
        rankings = [self.store.vector_search(vector_D, pool), self.store.text_search(query, pool)]
        hits = {hit.id: hit for ranking in rankings for hit in ranking}
        fused = fuse([[hit.id for hit in ranking] for ranking in rankings])
        return [_passage(hits[name], score) for name, score in fused[:k]]

    def _embedded(self, query: str) -> np.ndarray:
        if self.model is None:
            raise ValueError("this search needs a model: open the index with one, give a vector, or set mode to fts")
        return np.asarray(self.model.encode_query(query), dtype=np.float32)


def _passage(hit: Hit, score: float) -> Passage:
    return Passage(hit.id, hit.text, hit.file, hit.location, hit.title, hit.heading, score)


def _require_settings(store: Store, given: dict[str, Any]) -> None:
    made = {**vars(store.meta.chunk), "precision": store.meta.precision}
    for name, value in given.items():
        if value != made[name]:
            raise ValueError(
                f"the store {store.uri} was made with {name} {made[name]}, not {value}: leave the setting out, or index"
                " into another directory"
            )


def _require_same_model(store: Store | Corpus, model: Embedder) -> None:
    meta, dimension = store.meta, model.get_embedding_dim()
    rebuild = "load that model, or index again into another directory"
    if meta.dimension != dimension:
        raise ValueError(
            f"the store {store.uri} holds vectors of {meta.dimension} numbers by {meta.model or 'another model'}, this"
            f" model gives {dimension}: {rebuild}"
        )
    if meta.fingerprint != model.fingerprint:
        raise ValueError(
            f"the store {store.uri} was made by another model ({meta.model or 'unnamed'}, fingerprint"
            f" {meta.fingerprint}; this one has {model.fingerprint}): {rebuild}"
        )


def _require_room(settings: ChunkSettings, model: Embedder) -> None:
    if settings.tokens > model.max_seq_length:
        raise ValueError(
            f"chunks of {settings.tokens} tokens do not fit the model, which reads {model.max_seq_length}: make them"
            " smaller"
        )
