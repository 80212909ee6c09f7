"""`GemRag`: answers from an index, by the model that made the index, each text computed once.

    question first     prefix | question S | passage 1 | ... | suffix | answer   the question's cache goes on into the
                                                                                 answer; S embeds it and leaves no trace
    passages first     prefix | passage 1 | ... | question | suffix | answer     passage 1's cache may come from disk

``context`` says what the answer sees of the passages:

- ``text``: the passages themselves, one after the other. Exact. A kept cache serves the first passage.
- ``concatenated``: caches of passages that ran apart, moved to their positions (`gemify.model.rope_shift`). Any number
  of kept caches serve; the passages have not seen each other. An approximation.
- ``special``: the passages' special tokens alone, k tokens each (GEM, Section 3.1). An approximation, and a strong one.

The same pipeline runs in this thread (`ask`, the command line) and in a server's engine (`gemify.serving.rag`): only
the runner differs (`gemify.rag.prompt_cache`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

from gemify.model.base import max_positions
from gemify.model.chat_template import ChatPrompt, ChatTemplate, TokenizedMessage
from gemify.model.gem import GemModel
from gemify.model.kv_cache import CachedText
from gemify.model.prefill import Prefill
from gemify.model.rope_shift import require_shiftable
from gemify.rag.kv_store import KvStore, PassageCache
from gemify.rag.prompt_cache import Ids, ModelRunner, PromptCache, PromptRunner

SYSTEM_PROMPT = "You answer questions from the given passages, in a few words."


class RetrievedPassage(Protocol):
    """A passage that a search returned (`gemify.retrieval.index.Passage`)."""

    @property
    def text(self) -> str:
        """The passage itself."""

    @property
    def title(self) -> str:
        """Title of its file or row; may be empty."""

    @property
    def heading(self) -> str:
        """Heading that it stands under; may be empty."""

    @property
    def file(self) -> str:
        """File or row that it comes from."""

    @property
    def location(self) -> str:
        """Where in the file, such as a page or a line; may be empty."""

    @property
    def score(self) -> float:
        """How well it matches; higher is better."""


def passage_text(passage: RetrievedPassage) -> str:
    """Return a passage as it stands in a prompt: its heading or title, and its text."""
    about = passage.heading or passage.title
    return f"{about}: {passage.text}" if about else passage.text


PromptOrder = Literal["question-first", "passages-first"]
ContextMode = Literal["text", "concatenated", "special"]


class QueryEmbedder(Protocol):
    """A model that embeds questions."""

    def encode_query(self, inputs: str) -> Any:
        """Vector [D] of a question."""


class SearchIndex(Protocol):
    """An index (`gemify.retrieval.index.GemIndex`)."""

    def search(
        self, query: str, *, k: int = 10, mode: Any = "vector", vector: np.ndarray | None = None
    ) -> Sequence[Any]:
        """Return the ``k`` best passages for a question, whose vector [D] may be given."""


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
        """Return a line a source: its number, file and location."""
        return [f"[{n}] {p.file}{f' ({p.location})' if p.location else ''}" for n, p in enumerate(self.passages, 1)]


@dataclass(frozen=True)
class RagSettings:
    """How answers are made.

    Raises:
        ValueError: an unknown order or context, or a negative number of passages.
    """

    passages: int = 3
    """How many go into the prompt."""
    mode: str = "hybrid"
    """Of the search: vector, fts or hybrid."""
    order: PromptOrder = "question-first"
    context: ContextMode = "text"
    query_cache: bool = True
    """False: the question is run for its vector and run again for the answer (for comparison)."""
    system: str = SYSTEM_PROMPT
    """System message of conversations that have none of their own; empty: none."""
    max_new_tokens: int = 256
    generate: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})
    """Further options of transformers' `generate`."""

    def __post_init__(self) -> None:
        for name, value, kinds in (("order", self.order, PromptOrder), ("context", self.context, ContextMode)):
            if value not in get_args(kinds):
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(get_args(kinds))}")
        if self.passages < 0:
            raise ValueError(f"passages must be at least 0, got {self.passages}")


@dataclass(frozen=True)
class PreparedPrompt:
    """A question's prompt up to where the answer starts, and what of it has run."""

    ids: Ids
    start: CachedText
    """KV of the first tokens of ``ids``, less than all of them."""
    passages: tuple[RetrievedPassage, ...]
    computed: int
    """Tokens that were run so far."""
    embed_s: float
    """Seconds from the question to its vector."""
    search_s: float


class GemRag:
    """Questions to an index, answered by the model that searches it.

    Args:
        gem: the model, of whose own embeddings ``index`` is made.
        index: searched for passages. None: the model answers alone.
        kv: where passages' caches are kept. None: they are computed each time.
        embedder: another model that embeds questions, of which ``index`` is made: for comparison with two models.
        settings: how answers are made.
        runner: runs the prompts. None: the calling thread does.
        chat_template: lays them out. None: that of the model's tokenizer.

    Raises:
        ValueError: settings that do not fit the model or each other, or a model without a chat template.
    """

    def __init__(
        self,
        gem: GemModel,
        index: SearchIndex | None,
        *,
        kv: KvStore | None = None,
        embedder: QueryEmbedder | None = None,
        settings: RagSettings | None = None,
        runner: PromptRunner | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.gem, self.index, self.kv, self.settings = gem, index, kv, settings or RagSettings()
        self.runner = runner or ModelRunner(gem)
        self.embedder: QueryEmbedder = embedder or self.runner
        config = gem.config
        prompted = config.prompts.get("query", config.prompts.get(config.default_prompt_name or "", ""))
        # Where a question's vector is not in the chat's cache, the question is run for it apart.
        apart = embedder is not None or not config.k or bool(prompted) or bool(gem.text_tokenizer.prefix_ids)
        self.reuses_query_cache = self.settings.order == "question-first" and not apart
        self.max_model_len: int | None = max_positions(gem.lm)
        self.chat_template = chat_template or ChatTemplate(gem.tokenizer)
        if kv is not None and self.settings.order == "question-first" and self.settings.context == "text":
            raise ValueError(
                "kept caches need order 'passages-first' (exact) or context 'concatenated' or 'special'"
                " (approximations): behind a question, a passage's cache is another one"
            )
        if self.settings.context == "special" and not config.k:
            raise ValueError("this model has no special tokens: choose context text or concatenated")
        if self.settings.context != "text":
            require_shiftable(gem.lm)
        empty = self.chat_template.apply([*self.system_messages(), TokenizedMessage("user", ())])
        prefix_ids = empty.ids[: empty.content_starts[-1]]
        self.passage_cache = PassageCache(self.runner, kv, prefix_ids, label_ids=self.chat_template.encode("[1] "))

    def system_messages(self) -> list[TokenizedMessage]:
        """The system message that conversations begin with, if there is one."""
        return [self.chat_template.message("system", self.settings.system)] if self.settings.system else []

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Answer one question.

        Args:
            question: what to search for, and to answer.
            on_text: gets the answer's pieces as they are generated.
            options: those of transformers' `generate`, over the settings'.
        """
        return self.conversation().ask(question, on_text=on_text, **options)

    def embed_question(self, question: str) -> np.ndarray:
        """Vector [D] of a first question, as `ask` searches with it."""
        return self.conversation().embed_question(question)

    def keep(self, passages: Iterable[RetrievedPassage]) -> int:
        """Compute and keep the caches of passages ahead of the questions, within the budget. Return how many."""
        if self.kv is None:
            raise ValueError("there is nowhere to keep caches: make GemRag with kv=KvStore(...)")
        self.runner.cache_prefix(self.passage_cache.prefix_ids)
        made, held, budget = 0, 0, self.kv.budget_bytes  # caches of other passages give way to these
        for passage in passages:
            size, new = self.passage_cache.put(self.kv, self.chat_template.encode(passage_text(passage) + "\n\n"))
            made, held = made + new, held + size
            if budget is not None and held + size > budget:
                break
        return made

    def conversation(self, history: Sequence[Mapping[str, str]] = ()) -> Conversation:
        """Start a conversation, whose cache is carried from question to question.

        Args:
            history: messages before the first question, with the keys ``role`` and ``content``. They are never
                forgotten. A system message among them takes the place of the settings'.
        """
        return Conversation(self, [self.chat_template.message(m["role"], m["content"]) for m in history])


class Conversation:
    """Questions and answers in one growing prompt (`PromptCache`): no message is run twice.

    Args:
        rag: what answers.
        history: messages before the first question.
    """

    def __init__(self, rag: GemRag, history: Sequence[TokenizedMessage] = ()) -> None:
        self.rag = rag
        rag.runner.cache_prefix(rag.passage_cache.prefix_ids)
        self.prompt = PromptCache(rag.runner)
        has_system = any(message.role == "system" for message in history)
        self.messages = [*([] if has_system else rag.system_messages()), *history]
        self._num_fixed = len(self.messages)
        self._max_new_tokens = rag.settings.max_new_tokens

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Answer the next question; see `GemRag.ask`."""
        watch = _Stopwatch()
        generate = {"max_new_tokens": self.rag.settings.max_new_tokens, **self.rag.settings.generate, **options}
        messages = list(self.messages)
        prepared = self.prepare(question, max_new_tokens=int(generate["max_new_tokens"]))
        computed = self.prompt.computed
        try:
            prefill = self.prompt.extend_to(prepared.ids)
            answer = self.prompt.generate(prefill, on_text=on_text, on_token=watch.token, **generate)
        except BaseException:
            self.messages = messages
            raise
        self.messages.append(TokenizedMessage("assistant", answer.ids))
        computed = prepared.computed + self.prompt.computed - computed
        total = watch.total()
        timing = Timing(prepared.embed_s, prepared.search_s, watch.first_token or total, total, computed)
        return Answer(answer.text, prepared.passages, timing)

    def prepare(self, question: str, *, max_new_tokens: int | None = None) -> PreparedPrompt:
        """Embed the next question, find its passages and lay out its prompt, but run no more than that takes.

        Args:
            question: what to search for, and to answer.
            max_new_tokens: positions that the answer needs. None: the settings'.

        Raises:
            ValueError: an empty question, or a prompt that leaves no room for the answer.
        """
        if not question.strip():
            raise ValueError("no question given: ask something")
        settings, cache = self.rag.settings, self.rag.passage_cache
        self._max_new_tokens = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        self._make_room()
        watch, messages, before = _Stopwatch(), list(self.messages), self.prompt.computed + cache.computed
        try:
            vector = None if settings.mode == "fts" else self.embed_question(question)
            embed_s = watch.lap()
            passages = self._search(question, vector)
            search_s = watch.lap()
            if self.rag.reuses_query_cache and not settings.query_cache:
                self.prompt.clear()
            ids = self._lay_out(question, passages)
            start = self.prompt.cut_to(ids)
        except BaseException:
            self.messages = messages
            raise
        computed = self.prompt.computed + cache.computed - before
        return PreparedPrompt(ids, start, tuple(passages), computed, embed_s, search_s)

    def embed_question(self, question: str) -> np.ndarray:
        """Vector [D] of the next question: from the prompt that its answer goes on from, or of the question alone."""
        if not self.rag.reuses_query_cache:
            return np.asarray(self.rag.embedder.encode_query(question))
        question_ids = self.rag.chat_template.encode(question)
        layout = self._fit(TokenizedMessage("user", question_ids))
        start = layout.content_starts[-1]
        vector: np.ndarray = self.prompt.extend_and_embed(layout.ids[: start + len(question_ids)], start=start).numpy()
        return vector

    def prefill(self, question: str, passages: Sequence[RetrievedPassage]) -> Prefill:
        """Run the prompt of the next question and its passages, up to where the answer starts.

        What has run, here or in a kept cache, is not run again.
        """
        return self.prompt.extend_to(self._lay_out(question, passages))

    # Inside

    def _search(self, question: str, vector: np.ndarray | None) -> list[Any]:
        settings, index = self.rag.settings, self.rag.index
        if index is None or settings.passages == 0:
            return []
        return list(index.search(question, k=settings.passages, mode=settings.mode, vector=vector))

    def _lay_out(self, question: str, passages: Sequence[RetrievedPassage]) -> Ids:
        """Add the question to the messages. Return the prompt's ids, of which the prompt cache holds what is kept."""
        rag, encode = self.rag, self.rag.chat_template.encode
        question_ids = encode(question)
        parts = [(encode(f"[{n}] "), encode(passage_text(p) + "\n\n")) for n, p in enumerate(passages, 1)]
        question_first = rag.settings.order == "question-first"
        before, after = (question_ids + (encode("\n\n") if parts else ()), ()) if question_first else ((), question_ids)
        if rag.settings.context != "text":
            return self._lay_out_moved(before, parts, after)
        context = tuple(i for label, text in parts for i in label + text)
        message = TokenizedMessage("user", before + context + after)
        layout = self._fit(message)
        self.messages.append(message)
        if parts and rag.kv is not None and layout.ids[: layout.content_starts[-1]] == rag.passage_cache.prefix_ids:
            # the first passage of a conversation: just where its kept cache stood
            first = rag.passage_cache.prefix_ids + parts[0][0] + parts[0][1]
            self.prompt.load(first, rag.passage_cache.get(first))
        return layout.ids

    def _lay_out_moved(self, before: Ids, parts: Sequence[tuple[Ids, Ids]], after: Ids) -> Ids:
        """`_lay_out` with caches that are moved to their positions; what stands before them runs."""
        rag, prompt = self.rag, self.prompt
        special = rag.settings.context == "special"
        num_moved = sum(len(label) + (len(rag.gem.special_ids) if special else len(text)) for label, text in parts)
        layout = self._fit(TokenizedMessage("user", before + after), num_moved=num_moved)
        start = layout.content_starts[-1]
        prompt.extend_to(layout.ids[: start + len(before)])
        for label, text in parts:
            prompt.append(label)
            prompt.concatenate(*rag.passage_cache.moved(text, to=len(prompt.ids), special=special))
        self.messages.append(TokenizedMessage("user", prompt.ids[start:] + after))
        return prompt.ids + layout.ids[start + len(before) :]

    def _fit(self, message: TokenizedMessage, *, num_moved: int = 0) -> ChatPrompt:
        """Lay out the prompt with one more message; forget old ones until further tokens and the answer fit too."""
        messages, limit = list(self.messages), self.rag.max_model_len
        while True:
            layout = self.rag.chat_template.apply([*messages, message])
            tokens = len(layout.ids) + num_moved
            if limit is None or tokens + self._max_new_tokens <= limit:
                self.messages = messages
                return layout
            if len(messages) == self._num_fixed:
                raise ValueError(
                    f"the prompt has {tokens} tokens and the answer may have {self._max_new_tokens}, this model takes"
                    f" {limit} in all: use fewer passages, a shorter question or shorter answers"
                )
            self._forget(messages)

    def _make_room(self) -> None:
        """Forget the oldest messages, so that a quarter of the model's positions is left for the next passages."""
        limit = self.rag.max_model_len
        if limit is None:
            return
        max_tokens = limit - self._max_new_tokens - limit // 4
        while len(self.messages) > self._num_fixed and sum(len(m.ids) for m in self.messages) > max_tokens:
            self._forget(self.messages)

    def _forget(self, messages: list[TokenizedMessage]) -> None:
        """Drop the oldest question and answer; all, where passages are special tokens, whose KV no ids give again."""
        del messages[self._num_fixed : None if self.rag.settings.context == "special" else self._num_fixed + 2]


class _Stopwatch:
    def __init__(self) -> None:
        self._start = self._lap = time.perf_counter()
        self.first_token: float | None = None

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def token(self) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter() - self._start

    def total(self) -> float:
        return time.perf_counter() - self._start
