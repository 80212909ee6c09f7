"""`GemRag`: answers from an index, by the model that made the index, each text computed once.

    question first     head | question S | passage 1 | ... | tail | answer   the question's cache goes on into the
                                                                             answer; S embeds it and leaves no trace
    passages first     head | passage 1 | ... | question | tail | answer     passage 1's cache may come from disk

``documents`` says what the answer sees of the passages:

- ``text``: the passages themselves, one after the other. Exact. A kept cache serves the first passage.
- ``joined``: caches of passages that ran apart, moved to their places (`gemify.model.rope_shift`). Any number of kept
  caches serve; the passages have not seen each other. An approximation.
- ``special``: the passages' special tokens alone, k tokens each (GEM, Section 3.1). An approximation, and a strong one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

from gemify.model.base import max_positions
from gemify.model.gem import GemModel
from gemify.model.prefill import Prefill
from gemify.model.rope_shift import require_shiftable
from gemify.rag.chat_template import ChatFormat, Layout, Turn
from gemify.rag.kv_store import KvStore
from gemify.rag.passage_cache import PassageCaches
from gemify.rag.prompt_cache import RunningPrompt

Order = Literal["question-first", "passages-first"]
Documents = Literal["text", "joined", "special"]
SYSTEM = "You answer questions from the given passages, in a few words."


Ids = tuple[int, ...]


class Found(Protocol):
    """A passage that was found (`gemify.retrieval.index.Passage`)."""

    @property
    def text(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def heading(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def location(self) -> str: ...
    @property
    def score(self) -> float: ...


class QueryEmbedder(Protocol):
    """Whose vectors an index is made of."""

    def encode_query(self, inputs: str) -> Any: ...


class Searchable(Protocol):
    """What is searched (`gemify.retrieval.index.GemIndex`)."""

    def search(
        self, query: str, *, k: int = 10, mode: Any = "vector", vector: np.ndarray | None = None
    ) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Timing:
    """Seconds of one answer, and the tokens that were run for it."""

    embed: float
    """From the question to its vector."""
    search: float
    first_token: float
    """From the question to the answer's first token."""
    total: float
    computed: int
    """Prompt tokens that were run."""


@dataclass(frozen=True)
class Answer:
    """An answer and where it comes from: ``passages[0]`` is source [1]."""

    text: str
    passages: tuple[Found, ...]
    timing: Timing

    def sources(self) -> list[str]:
        """A line a source: its number, file and place."""
        return [f"[{n}] {p.file}{f' ({p.location})' if p.location else ''}" for n, p in enumerate(self.passages, 1)]


@dataclass(frozen=True)
class Settings:
    """How answers are made; ValueError for what does not fit together."""

    passages: int = 3
    """How many go into the prompt."""
    mode: str = "hybrid"
    """Of the search: vector, fts or hybrid."""
    order: Order = "question-first"
    documents: Documents = "text"
    handover: bool = True
    """False: the question is run for its vector and run again for the answer (for comparison)."""
    system: str = SYSTEM
    max_new_tokens: int = 256
    generate: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})
    """Further options of transformers' `generate`."""

    def __post_init__(self) -> None:
        for name, value, kinds in (("order", self.order, Order), ("documents", self.documents, Documents)):
            if value not in get_args(kinds):
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(get_args(kinds))}")
        if self.passages < 0:
            raise ValueError(f"passages must be at least 0, got {self.passages}")


class GemRag:
    """Questions to an index, answered by the model that searches it.

    Args:
        gem: the model, of whose own embeddings ``index`` is made.
        index: searched for passages; None: the model answers alone.
        kv: where passages' caches are kept; None: they are computed each time.
        embedder: another model that embeds questions, of which ``index`` is made: for comparison with two models.
    """

    def __init__(
        self,
        gem: GemModel,
        index: Searchable | None,
        *,
        kv: KvStore | None = None,
        embedder: QueryEmbedder | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.gem, self.index, self.kv, self.settings = gem, index, kv, settings or Settings()
        self.embedder: QueryEmbedder = embedder or gem
        config = gem.config
        prompted = config.prompts.get("query", config.prompts.get(config.default_prompt_name or "", ""))
        # Where a question's vector is not in the chat's cache, the question is run for it apart.
        apart = embedder is not None or not config.k or bool(prompted) or bool(gem.text_tokenizer.prefix_ids)
        self.in_place = self.settings.order == "question-first" and not apart
        self.limit: int | None = max_positions(gem.lm)
        self.format = ChatFormat(gem.tokenizer)
        head = [self.format.turn("system", self.settings.system)] if self.settings.system else []
        empty = self.format.layout([*head, Turn("user", ())])
        self.caches = PassageCaches(gem, kv, empty.ids[: empty.starts[-1]], label=self.format.plain("[1] "))
        if kv is not None and self.settings.order == "question-first" and self.settings.documents == "text":
            raise ValueError(
                "kept caches need order 'passages-first' (exact) or documents 'joined' or 'special' (approximations):"
                " behind a question, a passage's cache is another one"
            )
        if self.settings.documents == "special" and not config.k:
            raise ValueError("this model has no special tokens: choose documents text or joined")
        if self.settings.documents != "text":
            require_shiftable(gem.lm)

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """One question, one answer. ``on_text`` gets the answer's pieces as they are made.

        ``options`` are those of transformers' `generate`, over the settings'.
        """
        return self.conversation().ask(question, on_text=on_text, **options)

    def embed_question(self, question: str) -> np.ndarray:
        """A first question's vector [D], as `ask` takes it."""
        return self.conversation().embed_question(question)

    def keep(self, passages: Iterable[Found]) -> int:
        """Compute and keep the caches of passages ahead of the questions, as far as the budget goes. Gives how many."""
        if self.kv is None:
            raise ValueError("there is nowhere to keep caches: make GemRag with kv=KvStore(...)")
        made, held, budget = 0, 0, self.kv.budget_bytes  # caches of other passages give way to these
        for passage in passages:
            size, new = self.caches.keep(self.kv, self.format.plain(passage_text(passage) + "\n\n"))
            made, held = made + new, held + size
            if budget is not None and held + size > budget:
                break
        return made

    def conversation(self) -> Conversation:
        """A conversation whose cache is carried over its turns."""
        return Conversation(self)


class Conversation:
    """Questions and answers in one growing prompt (`RunningPrompt`): no turn is run twice."""

    def __init__(self, rag: GemRag) -> None:
        self.rag = rag
        self._prompt = RunningPrompt(rag.gem)
        self._prompt.adopt(*rag.caches.start())
        self._turns: list[Turn] = [rag.format.turn("system", rag.settings.system)] if rag.settings.system else []
        self._fixed = len(self._turns)
        self._answer = rag.settings.max_new_tokens

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """The next question, and its answer."""
        if not question.strip():
            raise ValueError("no question given: ask something")
        settings, prompt, caches = self.rag.settings, self._prompt, self.rag.caches
        watch = _Watch()
        generate = {"max_new_tokens": settings.max_new_tokens, **settings.generate, **options}
        self._answer = int(generate["max_new_tokens"])
        self._make_room()
        before, turns = prompt.computed + caches.computed, list(self._turns)
        vector = None if settings.mode == "fts" else self.embed_question(question)
        embed = watch.lap()
        passages = self._search(question, vector)
        search = watch.lap()
        if self.rag.in_place and not settings.handover:
            prompt.adopt(*caches.start())
        try:
            handle = self.read(question, passages)
            written = prompt.write(handle, on_text=on_text, on_token=watch.token, **generate)
        except BaseException:
            self._turns = turns
            raise
        self._turns.append(Turn("assistant", written.ids))
        total = watch.total()
        computed = prompt.computed + caches.computed - before
        timing = Timing(embed, search, watch.first_token or total, total, computed)
        return Answer(written.text, tuple(passages), timing)

    def embed_question(self, question: str) -> np.ndarray:
        """The next question's vector [D]: from the prompt that its answer goes on from, or of the question alone."""
        if not self.rag.in_place:
            return np.asarray(self.rag.embedder.encode_query(question))
        asked = self.rag.format.plain(question)
        layout = self._fitting(Turn("user", asked))
        start = layout.starts[-1]
        vector: np.ndarray = self._prompt.reach_and_embed(layout.ids[: start + len(asked)], since=start).numpy()
        return vector

    def read(self, question: str, passages: Sequence[Found]) -> Prefill:
        """Run the prompt of the next question and its passages, up to where the answer starts.

        What has run, here or in a kept cache, is not run again.
        """
        rag, prompt, plain = self.rag, self._prompt, self.rag.format.plain
        asked = plain(question)
        parts = [(plain(f"[{n}] "), plain(passage_text(p) + "\n\n")) for n, p in enumerate(passages, 1)]
        first = rag.settings.order == "question-first"
        before, after = (asked + (plain("\n\n") if parts else ()), ()) if first else ((), asked)
        if rag.settings.documents == "text":
            context = tuple(i for label, text in parts for i in label + text)
            turn = Turn("user", before + context + after)
            layout = self._fitting(turn)
            self._turns.append(turn)
            if parts and rag.kv is not None and layout.starts[-1] == len(rag.caches.head):
                # a first turn's first passage: just where its kept cache stood
                prompt.adopt(*rag.caches.exact(rag.caches.head + parts[0][0] + parts[0][1]))
            return prompt.reach(layout.ids)
        special = rag.settings.documents == "special"
        columns = sum(len(label) + (len(rag.gem.special_ids) if special else len(text)) for label, text in parts)
        layout = self._fitting(Turn("user", before + after), columns=columns)
        start = layout.starts[-1]
        prompt.reach(layout.ids[: start + len(before)])
        for label, text in parts:
            prompt.append(label)
            prompt.join(*rag.caches.moved(text, to=len(prompt.ids), special=special))
        self._turns.append(Turn("user", prompt.ids[start:] + after))
        return prompt.append(layout.ids[start + len(before) :])

    # Inside

    def _search(self, question: str, vector: np.ndarray | None) -> list[Any]:
        settings, index = self.rag.settings, self.rag.index
        if index is None or settings.passages == 0:
            return []
        return list(index.search(question, k=settings.passages, mode=settings.mode, vector=vector))

    def _fitting(self, turn: Turn, *, columns: int = 0) -> Layout:
        """The prompt with one more turn, and room for further columns and the answer: old turns are forgotten for it."""
        turns, limit = list(self._turns), self.rag.limit
        while True:
            layout = self.rag.format.layout([*turns, turn])
            tokens = len(layout.ids) + columns
            if limit is None or tokens + self._answer <= limit:
                self._turns = turns
                return layout
            if len(turns) == self._fixed:
                raise ValueError(
                    f"the prompt has {tokens} tokens and the answer may have {self._answer}, this model takes {limit} in"
                    " all: use fewer passages, a shorter question or shorter answers"
                )
            self._forget(turns)

    def _make_room(self) -> None:
        """Forget the oldest turns, so that a quarter of the model's room is left for the next question's passages."""
        if self.rag.limit is None:
            return
        room = self.rag.limit - self._answer - self.rag.limit // 4
        while len(self._turns) > self._fixed and sum(len(t.ids) for t in self._turns) > room:
            self._forget(self._turns)

    def _forget(self, turns: list[Turn]) -> None:
        """The oldest question and answer; all, where passages are special tokens, whose columns no ids give again."""
        del turns[self._fixed : None if self.rag.settings.documents == "special" else self._fixed + 2]


def passage_text(passage: Found) -> str:
    """A passage as the prompt has it."""
    about = passage.heading or passage.title
    return f"{about}: {passage.text}" if about else passage.text


class _Watch:
    def __init__(self) -> None:
        self._start = self._lap = time.perf_counter()
        self.first_token: float | None = None

    def lap(self) -> float:
        now = time.perf_counter()
        took, self._lap = now - self._lap, now
        return took

    def token(self) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter() - self._start

    def total(self) -> float:
        return time.perf_counter() - self._start
