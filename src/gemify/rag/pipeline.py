"""`GemRag`: answers from an index, by the model that made the index, each text computed once.

    question first     head | question S | passage 1 | ... | tail | answer   the question's cache goes on into the
                                                                             answer; S embeds it and leaves no trace
    passages first     head | passage 1 | ... | question | tail | answer     passage 1's cache may come from disk

``context`` says what the answer sees of the passages:

- ``text``: the passages themselves, one after the other. Exact. A kept cache serves the first passage.
- ``concatenated``: caches of passages that ran apart, moved to their places (`gemify.model.rope_shift`). Any number of kept
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
from gemify.model.chat_template import ChatPrompt, ChatTemplate, TokenizedMessage
from gemify.model.gem import GemModel
from gemify.model.prefill import Prefill
from gemify.model.rope_shift import require_shiftable
from gemify.rag.context import SYSTEM_PROMPT, RetrievedPassage, passage_text
from gemify.rag.kv_store import KvStore
from gemify.rag.passage_cache import PassageCache
from gemify.rag.prompt_cache import PromptCache

PromptOrder = Literal["question-first", "passages-first"]
ContextMode = Literal["text", "concatenated", "special"]


Ids = tuple[int, ...]


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
    passages: tuple[RetrievedPassage, ...]
    timing: Timing

    def sources(self) -> list[str]:
        """A line a source: its number, file and place."""
        return [f"[{n}] {p.file}{f' ({p.location})' if p.location else ''}" for n, p in enumerate(self.passages, 1)]


@dataclass(frozen=True)
class RagSettings:
    """How answers are made; ValueError for what does not fit together."""

    passages: int = 3
    """How many go into the prompt."""
    mode: str = "hybrid"
    """Of the search: vector, fts or hybrid."""
    order: PromptOrder = "question-first"
    context: ContextMode = "text"
    query_cache: bool = True
    """False: the question is run for its vector and run again for the answer (for comparison)."""
    system: str = SYSTEM_PROMPT
    max_new_tokens: int = 256
    generate: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})
    """Further options of transformers' `generate`."""

    def __post_init__(self) -> None:
        for name, value, kinds in (("order", self.order, PromptOrder), ("context", self.context, ContextMode)):
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
        settings: RagSettings | None = None,
    ) -> None:
        self.gem, self.index, self.kv, self.settings = gem, index, kv, settings or RagSettings()
        self.embedder: QueryEmbedder = embedder or gem
        config = gem.config
        prompted = config.prompts.get("query", config.prompts.get(config.default_prompt_name or "", ""))
        # Where a question's vector is not in the chat's cache, the question is run for it apart.
        apart = embedder is not None or not config.k or bool(prompted) or bool(gem.text_tokenizer.prefix_ids)
        self.reuses_query_cache = self.settings.order == "question-first" and not apart
        self.limit: int | None = max_positions(gem.lm)
        self.chat_template = ChatTemplate(gem.tokenizer)
        head = [self.chat_template.message("system", self.settings.system)] if self.settings.system else []
        empty = self.chat_template.apply([*head, TokenizedMessage("user", ())])
        self.passage_cache = PassageCache(
            gem, kv, empty.ids[: empty.content_starts[-1]], label=self.chat_template.encode("[1] ")
        )
        if kv is not None and self.settings.order == "question-first" and self.settings.context == "text":
            raise ValueError(
                "kept caches need order 'passages-first' (exact) or context 'concatenated' or 'special' (approximations):"
                " behind a question, a passage's cache is another one"
            )
        if self.settings.context == "special" and not config.k:
            raise ValueError("this model has no special tokens: choose context text or concatenated")
        if self.settings.context != "text":
            require_shiftable(gem.lm)

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """One question, one answer. ``on_text`` gets the answer's pieces as they are made.

        ``options`` are those of transformers' `generate`, over the settings'.
        """
        return self.conversation().ask(question, on_text=on_text, **options)

    def embed_question(self, question: str) -> np.ndarray:
        """A first question's vector [D], as `ask` takes it."""
        return self.conversation().embed_question(question)

    def keep(self, passages: Iterable[RetrievedPassage]) -> int:
        """Compute and keep the caches of passages ahead of the questions, as far as the budget goes. Gives how many."""
        if self.kv is None:
            raise ValueError("there is nowhere to keep caches: make GemRag with kv=KvStore(...)")
        made, held, budget = 0, 0, self.kv.budget_bytes  # caches of other passages give way to these
        for passage in passages:
            size, new = self.passage_cache.keep(self.kv, self.chat_template.encode(passage_text(passage) + "\n\n"))
            made, held = made + new, held + size
            if budget is not None and held + size > budget:
                break
        return made

    def conversation(self) -> Conversation:
        """A conversation whose cache is carried over its turns."""
        return Conversation(self)


class Conversation:
    """Questions and answers in one growing prompt (`PromptCache`): no turn is run twice."""

    def __init__(self, rag: GemRag) -> None:
        self.rag = rag
        self.prompt = PromptCache(rag.gem)
        self.prompt.load(*rag.passage_cache.start())
        self.messages: list[TokenizedMessage] = (
            [rag.chat_template.message("system", rag.settings.system)] if rag.settings.system else []
        )
        self._fixed = len(self.messages)
        self._answer = rag.settings.max_new_tokens

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """The next question, and its answer."""
        if not question.strip():
            raise ValueError("no question given: ask something")
        settings, prompt, caches = self.rag.settings, self.prompt, self.rag.passage_cache
        watch = _Watch()
        generate = {"max_new_tokens": settings.max_new_tokens, **settings.generate, **options}
        self._answer = int(generate["max_new_tokens"])
        self._make_room()
        before, turns = prompt.computed + caches.computed, list(self.messages)
        vector = None if settings.mode == "fts" else self.embed_question(question)
        embed = watch.lap()
        passages = self._search(question, vector)
        search = watch.lap()
        if self.rag.reuses_query_cache and not settings.query_cache:
            prompt.load(*caches.start())
        try:
            handle = self.read(question, passages)
            written = prompt.write(handle, on_text=on_text, on_token=watch.token, **generate)
        except BaseException:
            self.messages = turns
            raise
        self.messages.append(TokenizedMessage("assistant", written.ids))
        total = watch.total()
        computed = prompt.computed + caches.computed - before
        timing = Timing(embed, search, watch.first_token or total, total, computed)
        return Answer(written.text, tuple(passages), timing)

    def embed_question(self, question: str) -> np.ndarray:
        """The next question's vector [D]: from the prompt that its answer goes on from, or of the question alone."""
        if not self.rag.reuses_query_cache:
            return np.asarray(self.rag.embedder.encode_query(question))
        asked = self.rag.chat_template.encode(question)
        layout = self._fitting(TokenizedMessage("user", asked))
        start = layout.content_starts[-1]
        vector: np.ndarray = self.prompt.extend_and_embed(layout.ids[: start + len(asked)], since=start).numpy()
        return vector

    def read(self, question: str, passages: Sequence[RetrievedPassage]) -> Prefill:
        """Run the prompt of the next question and its passages, up to where the answer starts.

        What has run, here or in a kept cache, is not run again.
        """
        rag, prompt, plain = self.rag, self.prompt, self.rag.chat_template.encode
        asked = plain(question)
        parts = [(plain(f"[{n}] "), plain(passage_text(p) + "\n\n")) for n, p in enumerate(passages, 1)]
        first = rag.settings.order == "question-first"
        before, after = (asked + (plain("\n\n") if parts else ()), ()) if first else ((), asked)
        if rag.settings.context == "text":
            context = tuple(i for label, text in parts for i in label + text)
            turn = TokenizedMessage("user", before + context + after)
            layout = self._fitting(turn)
            self.messages.append(turn)
            if parts and rag.kv is not None and layout.content_starts[-1] == len(rag.passage_cache.head):
                # a first turn's first passage: just where its kept cache stood
                prompt.load(*rag.passage_cache.exact(rag.passage_cache.head + parts[0][0] + parts[0][1]))
            return prompt.extend_to(layout.ids)
        special = rag.settings.context == "special"
        columns = sum(len(label) + (len(rag.gem.special_ids) if special else len(text)) for label, text in parts)
        layout = self._fitting(TokenizedMessage("user", before + after), columns=columns)
        start = layout.content_starts[-1]
        prompt.extend_to(layout.ids[: start + len(before)])
        for label, text in parts:
            prompt.append(label)
            prompt.join(*rag.passage_cache.moved(text, to=len(prompt.ids), special=special))
        self.messages.append(TokenizedMessage("user", prompt.ids[start:] + after))
        return prompt.append(layout.ids[start + len(before) :])

    # Inside

    def _search(self, question: str, vector: np.ndarray | None) -> list[Any]:
        settings, index = self.rag.settings, self.rag.index
        if index is None or settings.passages == 0:
            return []
        return list(index.search(question, k=settings.passages, mode=settings.mode, vector=vector))

    def _fitting(self, turn: TokenizedMessage, *, columns: int = 0) -> ChatPrompt:
        """The prompt with one more turn, and room for further columns and the answer: old turns are forgotten for it."""
        turns, limit = list(self.messages), self.rag.limit
        while True:
            layout = self.rag.chat_template.apply([*turns, turn])
            tokens = len(layout.ids) + columns
            if limit is None or tokens + self._answer <= limit:
                self.messages = turns
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
        while len(self.messages) > self._fixed and sum(len(t.ids) for t in self.messages) > room:
            self._forget(self.messages)

    def _forget(self, turns: list[TokenizedMessage]) -> None:
        """The oldest question and answer; all, where passages are special tokens, whose columns no ids give again."""
        del turns[self._fixed : None if self.rag.settings.context == "special" else self._fixed + 2]


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
