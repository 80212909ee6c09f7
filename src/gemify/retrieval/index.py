"""`GemIndex`: files in, passages out. It reads, cuts, embeds and stores files, and finds their passages by a query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from gemify.io.signals import stop_signals
from gemify.retrieval.chunking import ChunkSettings
from gemify.retrieval.document_store import Store
from gemify.retrieval.documents import Skipped
from gemify.retrieval.ingest import Embedder, IndexOptions, IndexReport, IndexRun
from gemify.retrieval.lance import StoreUnavailableError
from gemify.retrieval.loaders import Columns, FileListing, find_files
from gemify.retrieval.metadata import Value, to_metadata
from gemify.retrieval.ocr import require_ocr
from gemify.retrieval.store_meta import Precision, StoreMeta
from gemify.retrieval.store_rows import Hit
from gemify.retrieval.vector_table import Corpus, find_store, open_store

__all__ = ["Embedder", "GemIndex", "IndexReport", "Mode", "Passage", "Skipped"]

Mode = Literal["vector", "fts", "hybrid"]
_MIN_CANDIDATES = 50  # hits of each kind that a hybrid search fuses
_RANK_CONSTANT = 60  # of reciprocal rank fusion


@dataclass(frozen=True)
class Passage:
    """A chunk that a search found."""

    id: str
    """Stays the same as long as the file does."""
    text: str
    file: str
    location: str
    title: str
    heading: str
    score: float
    """Higher is better: a cosine (vector), BM25 (fts), or a sum of reciprocal ranks (hybrid)."""
    meta: Mapping[str, Value] = field(default_factory=dict)
    """Its metadata: date, kind, and what the file, its row or the run said."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields under their names in HTTP answers and in ``--json`` output."""
        meta = {name: value.isoformat() if isinstance(value, date) else value for name, value in self.meta.items()}
        fields = {**vars(self), "meta": meta}
        return {"place" if name == "location" else name: value for name, value in fields.items()}


class PassageNotFoundError(ValueError):
    """A store has no passage of this id, any more."""


class GemIndex:
    """Passages in a store, and the model that embeds them. `open` makes one."""

    def __init__(self, store: Store | Corpus, model: Embedder | None) -> None:
        self.store, self.model = store, model

    @classmethod
    def open(
        cls,
        store: str | Path | Store | Corpus,
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

        Settings apply to a new store. Those of an existing store must be None, or what it was made with.

        Args:
            store: A directory, a URI that LanceDB takes (``s3://bucket/path``), or an open store or corpus.
            model: The model. Without one only full-text search works, and vector search with the caller's vectors.
            create: Whether to make a store if there is none.
            model_name: The name that loads the model, which a new store keeps.
            tokens: Maximum tokens of a passage. Default 256.
            overlap: Tokens that a passage repeats of the one before. Default 32.
            context: Whether title and headings are embedded with a passage. Default True.
            precision: Precision of the vectors. Default float32.

        Returns:
            An index over the store.

        Raises:
            ValueError: There is no store, or it is damaged, or was made by another model or with other settings.
        """
        given: dict[str, Any] = {"tokens": tokens, "overlap": overlap, "context": context}
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(store, Store | Corpus):
            opened: Store | Corpus | None = store
        else:
            opened = find_store(store) if create else open_store(store)
        if isinstance(opened, Store):
            _require_settings(opened, given | ({} if precision is None else {"precision": precision}))
        elif opened is None:
            if model is None:
                raise ValueError(f"no store at {store}, and a new one needs a model: give one")
            opened = _create_store(str(store), model, model_name, precision or "float32", ChunkSettings(**given))
        if model is not None:
            _require_same_model(opened, model)
            if isinstance(opened, Store):
                _require_chunks_fit(opened.meta.chunk, model)
        return cls(opened, model)

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self.store)

    def add(
        self,
        paths: str | Path | Sequence[str | Path] | FileListing,
        *,
        text_column: str = "text",
        title_column: str = "title",
        ocr: bool = False,
        meta: Mapping[str, Value] | None = None,
        limit: int | None = None,
        batch_size: int = 32,
        commit_tokens: int = 65_536,
        show_progress_bar: bool = False,
    ) -> IndexReport:
        """Bring files and directories, as they are now, into the index.

        Files whose content is unchanged are left alone, changed ones replaced, deleted ones removed. A file that cannot
        be read is reported, and its earlier passages stay. After a kill at any point, the same call finishes the work
        with the same index. Ctrl-C and SIGTERM end it after the commit under way.

        Args:
            paths: Files and directories, or what `find_files` found.
            text_column: The column of files of rows that holds the text.
            title_column: The column of files of rows that holds the title.
            ocr: Whether pages of PDF files without text are recognized (extra ``ocr``). What was recognized in earlier
                runs stays.
            meta: Metadata of all these files, over what they say themselves.
            limit: Maximum new or changed files to index now.
            batch_size: Maximum passages that the model embeds at a time.
            commit_tokens: Tokens embedded between two commits.
            show_progress_bar: Whether to show a progress bar on stderr.

        Returns:
            What was added, changed, removed and skipped.

        Raises:
            ValueError: A path does not exist, the store is damaged, there is no model, or another process writes.
            StopRequestedError: A signal came. What is committed stays.
            ModuleNotFoundError: ``ocr`` without its extra.
        """
        if ocr:
            require_ocr()
        if self.model is None:
            raise ValueError("adding files needs a model: open the index with one")
        if commit_tokens < 1 or batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(
                f"commit_tokens, batch_size and limit must be at least 1, got {commit_tokens}, {batch_size} and {limit}"
            )
        if isinstance(self.store, Corpus):
            raise ValueError(f"{self.store.uri} is a corpus that gemify embed-corpus writes: index files elsewhere")
        if not isinstance(paths, FileListing):
            listed = [paths] if isinstance(paths, str | Path) else list(paths)
            paths = find_files(listed, known=self.store.files())
        columns = Columns(text_column, title_column)
        options = IndexOptions(columns, ocr, to_metadata(meta or {}), limit, batch_size, commit_tokens)
        with (
            self.store.write_lock(),
            stop_signals() as stop_flag,
            tqdm(desc="index", unit=" chunks", disable=not show_progress_bar) as bar,
        ):
            return IndexRun(self.store, self.model, options, stop_flag, bar).run(paths)

    def require_text(self) -> None:
        """Raise ValueError if the passages have vectors alone, and no text to answer from."""
        if isinstance(self.store, Corpus) and not self.store.meta.keep_text:
            raise ValueError(f"the corpus {self.store.uri} keeps no text to answer from: embed with --keep-text")

    def passages(self) -> Iterator[Passage]:
        """Yield all passages, in no order, with score 0."""
        return (_passage(hit, 0.0) for hit in self.store.hits())

    def files(self) -> dict[str, int]:
        """Return the number of passages of every file. Raises ValueError for a corpus, which has rows and no files."""
        if isinstance(self.store, Corpus):
            raise ValueError(f"the corpus {self.store.uri} has rows and no files to list: search it")
        return {path: record.chunks for path, record in self.store.files().items()}

    def read(self, passage_id: str, *, before: int = 0, after: int = 0) -> list[Passage]:
        """Read a passage and its neighbours.

        Args:
            passage_id: The id of a passage that was found.
            before: Passages of the same file to read before it.
            after: Passages of the same file to read after it.

        Returns:
            The passages in the order of the file, with score 0.

        Raises:
            PassageNotFoundError: There is no such passage, any more.
            ValueError: The store is damaged.
        """
        hits = self.store.read(passage_id, before, after)
        if not hits:
            raise PassageNotFoundError(f"no passage {passage_id[:100]!r}: search again, its file may be new")
        return [_passage(hit, 0.0) for hit in hits]

    def search(
        self,
        query: str,
        *,
        k: int = 10,
        mode: Mode = "hybrid",
        vector: np.ndarray | None = None,
        where: str | None = None,
    ) -> list[Passage]:
        """Find the passages that match a query best.

        Args:
            query: A question, or words to find.
            k: How many passages to find.
            mode: ``vector`` (meaning), ``fts`` (words, BM25) or ``hybrid`` (both, fused by rank).
            vector: The query's embedding, [D], where the caller has it. Then no model is needed.
            where: Search only passages whose metadata fits this expression in SQL, such as
                ``lang = 'de' and date > date '2025-01-01'``.

        Returns:
            At most ``k`` passages, best first.

        Raises:
            ValueError: The query is empty, a setting or the filter is not allowed, the search needs a model that is
                missing, or another model has made the store again.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not query.strip() and (mode != "vector" or vector is None):
            raise ValueError("the query is empty: give some words")
        self.require_same_store()
        if mode == "fts":
            return [_passage(hit, hit.score) for hit in self.store.text_search(query, k, where)]
        vector_D = self._embed_query(query) if vector is None else np.asarray(vector, dtype=np.float32)
        if mode == "vector":
            return [_passage(hit, hit.score) for hit in self.store.vector_search(vector_D, k, where)]
        candidates = max(_MIN_CANDIDATES, k)
        rankings = [
            self.store.vector_search(vector_D, candidates, where),
            self.store.text_search(query, candidates, where),
        ]
        hits = {hit.id: hit for ranking in rankings for hit in ranking}
        fused = fuse([[hit.id for hit in ranking] for ranking in rankings])
        return [_passage(hits[name], score) for name, score in fused[:k]]

    def require_same_store(self) -> None:
        """Raise StoreUnavailableError if another model has made the store again: its vectors are of another space."""
        if isinstance(self.store, Store):
            opened, made = self.store.meta, self.store.read_meta()
            if (made.fingerprint, made.dimension) != (opened.fingerprint, opened.dimension):
                raise StoreUnavailableError(
                    f"the store {self.store.uri} was made again by another model ({made.model or 'unnamed'}): open it"
                    " anew, with that model"
                )

    def _embed_query(self, query: str) -> np.ndarray:
        if self.model is None:
            raise ValueError("this search needs a model: open the index with one, give a vector, or set mode to fts")
        return np.asarray(self.model.encode_query(query), dtype=np.float32)


def fuse(rankings: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Merge rankings by reciprocal rank (Cormack, Clarke and Büttcher, 2009), which compares no scores.

    Args:
        rankings: Lists of names, best first.

    Returns:
        Each name with the sum of 1 / (60 + rank) over the rankings, best first; ties in the order of first mention.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, start=1):
            scores[name] = scores.get(name, 0.0) + 1 / (_RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: -item[1])


def _passage(hit: Hit, score: float) -> Passage:
    return Passage(hit.id, hit.text, hit.file, hit.location, hit.title, hit.heading, score, hit.meta)


def _create_store(uri: str, model: Embedder, name: str, precision: Precision, chunk: ChunkSettings) -> Store:
    _require_chunks_fit(chunk, model)
    return Store.create(uri, StoreMeta(name, model.fingerprint, model.get_embedding_dim(), precision, chunk))


def _require_settings(store: Store, given: dict[str, Any]) -> None:
    stored = {**vars(store.meta.chunk), "precision": store.meta.precision}
    for name, value in given.items():
        if value != stored[name]:
            raise ValueError(
                f"the store {store.uri} was made with {name} {stored[name]}, not {value}: leave the setting out, or"
                " index into another directory"
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


def _require_chunks_fit(settings: ChunkSettings, model: Embedder) -> None:
    if settings.tokens > model.max_seq_length:
        raise ValueError(
            f"chunks of {settings.tokens} tokens do not fit the model, which reads {model.max_seq_length}: make them"
            " smaller"
        )
