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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, get_args

import numpy as np

from gemify.model.answer_parser import ThoughtFormat
from gemify.model.base import max_positions
from gemify.model.chat_template import ChatTemplate, Message
from gemify.model.gem import GemModel
from gemify.model.kv_cache import CachedText, common_prefix_length
from gemify.model.prefill import Prefill
from gemify.model.rope_shift import require_shiftable
from gemify.rag.context import SYSTEM_PROMPT, QueryEmbedder, RetrievedPassage, SearchIndex, label, passage_text
from gemify.rag.kv_store import KvStore, PassageCache
from gemify.rag.prompt_cache import Ids, ModelRunner, PromptCache, PromptRunner

PromptOrder = Literal["question-first", "passages-first"]
ContextMode = Literal["text", "concatenated", "special"]


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
    thoughts: str = ""
    """What the model thought before it answered."""

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
    where: str | None = None
    """Filter of the search, in SQL over the passages' metadata. None: all."""
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
        apart = (
            embedder is not None
            or not config.embeds_from_cache
            or bool(prompted)
            or bool(gem.text_tokenizer.prefix_ids)
        )
        self.reuses_query_cache = self.settings.order == "question-first" and not apart
        self.max_model_len: int | None = max_positions(gem.lm)
        self.chat_template = chat_template or ChatTemplate(gem.tokenizer, own_system=self.settings.system)
        self.thoughts = ThoughtFormat.of(gem.lm, gem.tokenizer)
        if kv is not None and self.settings.order == "question-first" and self.settings.context == "text":
            raise ValueError(
                "kept caches need order 'passages-first' (exact) or context 'concatenated' or 'special'"
                " (approximations): behind a question, a passage's cache is another one"
            )
        if self.settings.context == "special" and not config.embeds_from_cache:
            raise ValueError("this model has no special tokens in a chat's cache: choose context text or concatenated")
        if self.settings.context != "text":
            require_shiftable(gem.lm)
        self.passage_cache = PassageCache(
            self.runner, kv, self.stable_prefix(""), before_ids=self.stable_prefix(label(1))
        )

    def system_messages(self) -> list[Message]:
        """The system message that conversations begin with, if there is one."""
        return [{"role": "system", "content": self.settings.system}] if self.settings.system else []

    def stable_prefix(self, content: str) -> Ids:
        """The ids of a conversation whose first question begins with these words."""
        return self.chat_template.stable_prefix([*self.system_messages(), {"role": "user", "content": content}])

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
            ids = self.stable_prefix(label(1) + passage_text(passage))
            size, new = self.passage_cache.put(self.kv, ids)
            made, held = made + new, held + size
            if budget is not None and held + size > budget:
                break
        return made

    def conversation(self, history: Sequence[Message] = ()) -> Conversation:
        """Start a conversation, whose cache is carried from question to question.

        Args:
            history: messages before the first question, with the keys ``role`` and ``content``. They are never
                forgotten. A system message among them takes the place of the settings'.
        """
        return Conversation(self, history)


@dataclass(frozen=True)
class _Turn:
    """A message, and where in its content passages stand whose KV is moved there."""

    message: Message
    passages: tuple[tuple[int, int], ...] = ()


class Conversation:
    """Questions and answers in one growing prompt (`PromptCache`): what of it has run is not run again.

    Args:
        rag: what answers.
        history: messages before the first question.
    """

    def __init__(self, rag: GemRag, history: Sequence[Message] = ()) -> None:
        self.rag = rag
        rag.runner.cache_prefix(rag.passage_cache.prefix_ids)
        self.prompt = PromptCache(rag.runner)
        has_system = any(message["role"] == "system" for message in history)
        self._turns = [_Turn(message) for message in [*([] if has_system else rag.system_messages()), *history]]
        self._num_fixed = len(self._turns)
        self._max_new_tokens = rag.settings.max_new_tokens
        self._ids: Ids = ()
        self._slices: list[tuple[int, int]] = []
        """Where in ``_ids``, the last prompt as text, the passages of all turns stand."""

    @property
    def messages(self) -> list[Message]:
        """The messages so far."""
        return [turn.message for turn in self._turns]

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None, **options: Any) -> Answer:
        """Answer the next question; see `GemRag.ask`."""
        watch = _Stopwatch()
        generate = {"max_new_tokens": self.rag.settings.max_new_tokens, **self.rag.settings.generate, **options}
        turns = list(self._turns)
        prepared = self.prepare(question, max_new_tokens=int(generate["max_new_tokens"]))
        computed = self.prompt.computed
        try:
            prefill = self.prompt.extend_to(prepared.ids)
            parser = self.rag.thoughts.parser_after(prepared.ids)
            answer = self.prompt.generate(prefill, on_text=on_text, on_token=watch.token, parser=parser, **generate)
        except BaseException:
            self._turns = turns
            raise
        self._turns.append(_Turn({"role": "assistant", "content": answer.text}))
        computed = prepared.computed + self.prompt.computed - computed
        total = watch.total()
        timing = Timing(prepared.embed_s, prepared.search_s, watch.first_token or total, total, computed)
        return Answer(answer.text, prepared.passages, timing, answer.thoughts)

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
        watch, turns, before = _Stopwatch(), list(self._turns), self.prompt.computed + cache.computed
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
            self._turns = turns
            raise
        computed = self.prompt.computed + cache.computed - before
        return PreparedPrompt(ids, start, tuple(passages), computed, embed_s, search_s)

    def embed_question(self, question: str) -> np.ndarray:
        """Vector [D] of the next question: from the prompt that its answer goes on from, or of the question alone."""
        if self.rag.reuses_query_cache:
            turn = _Turn({"role": "user", "content": question})
            ids = self._fit(turn)
            start, end = self.rag.chat_template.content_span([*self.messages, turn.message])
            if start < end:
                vector: np.ndarray = self.prompt.extend_and_embed(ids[:end], start=start).numpy()
                return vector
        return np.asarray(self.rag.embedder.encode_query(question))

    def prefill(self, question: str, passages: Sequence[RetrievedPassage]) -> Prefill:
        """Run the prompt of the next question and its passages, up to where the answer starts.

        What has run, here or in a kept cache, is not run again.
        """
        return self.prompt.extend_to(self._lay_out(question, passages))

    def _search(self, question: str, vector: np.ndarray | None) -> list[Any]:
        settings, index = self.rag.settings, self.rag.index
        if index is None or settings.passages == 0:
            return []
        k, mode, where = settings.passages, settings.mode, settings.where
        return list(index.search(question, k=k, mode=mode, vector=vector, where=where))

    def _lay_out(self, question: str, passages: Sequence[RetrievedPassage]) -> Ids:
        """Add the question to the messages. Return the prompt's ids, of which the prompt cache holds what is kept."""
        rag, parts = self.rag, [label(n) + passage_text(p) for n, p in enumerate(passages, 1)]
        if rag.settings.order == "passages-first":
            before, after = "", question
        else:
            before, after = question + ("\n\n" if parts else ""), ""
        spans, at = [], len(before)
        for n, part in enumerate(parts, 1):
            spans.append((at + len(label(n)), at + len(part)))
            at += len(part) + len("\n\n")
        message = {"role": "user", "content": before + "".join(part + "\n\n" for part in parts) + after}
        if rag.settings.context != "text":
            turn = _Turn(message, tuple(spans))
            self._fit(turn)
            self._turns.append(turn)
            return self._move_passages()
        ids = self._fit(_Turn(message))
        self._turns.append(_Turn(message))
        if parts and rag.kv is not None and len(self._turns) == self._num_fixed + 1:
            # the first passage of a conversation: just where its kept cache stood
            first = rag.stable_prefix(parts[0])
            if ids[: len(first)] == first:
                self.prompt.load(first, rag.passage_cache.get(first))
        return ids

    def _move_passages(self) -> Ids:
        """Put the passages' caches, moved to their positions, into the prompt cache; what stands before them runs."""
        rag, prompt, special = self.rag, self.prompt, self.rag.settings.context == "special"
        ids, slices = self._lay_out_slices(self._turns)
        target: list[int] = []
        places: list[tuple[int, int, Ids]] = []
        done = 0
        for start, end in sorted(slices):
            if start == end or start < done:
                continue  # the template left it out, or took it apart: it is text
            target += ids[done:start]
            places.append((len(target), len(target) + self._moved_length(start, end), ids[start:end]))
            target += rag.gem.special_ids if special else ids[start:end]
            done = end
        target += ids[done:]
        known = common_prefix_length(prompt.ids, target)
        for start, end, passage in places:
            if end <= known:
                continue  # stands there already
            if start <= known:
                prompt.cut_to(target[: start + 1])
            if len(prompt.ids) < start:
                prompt.extend_to(target[:start])
            prompt.concatenate(*rag.passage_cache.moved(passage, to=start, special=special))
            known = end
        self._ids, self._slices = ids, slices
        return tuple(target)

    def _moved_length(self, start: int, end: int) -> int:
        """Positions that a passage of these ids takes in the prompt."""
        special = self.rag.settings.context == "special" and start < end
        return len(self.rag.gem.special_ids) if special else end - start

    def _lay_out_slices(self, turns: Sequence[_Turn]) -> tuple[Ids, list[tuple[int, int]]]:
        """The prompt's ids as text, and where in them the passages stand."""
        template, messages = self.rag.chat_template, [turn.message for turn in turns]
        ids = template.apply(messages)
        common = common_prefix_length(self._ids, ids)
        slices = list(takewhile(lambda place: place[1] <= common, self._slices))
        for index, span in [(i, span) for i, turn in enumerate(turns) for span in turn.passages][len(slices) :]:
            prefixes = (template.stable_prefix(messages, index=index, length=length) for length in span)
            start, end = (common_prefix_length(prefix, ids) for prefix in prefixes)
            slices.append((start, max(start, end)))
        return ids, slices

    def _fit(self, turn: _Turn) -> Ids:
        """Lay out the prompt with one more turn; forget old ones until the answer fits too. Return the ids as text."""
        turns, limit = list(self._turns), self.rag.max_model_len
        while True:
            ids, slices = self._lay_out_slices([*turns, turn])
            tokens = len(ids) + sum(self._moved_length(*place) - (place[1] - place[0]) for place in slices)
            if limit is None or tokens + self._max_new_tokens <= limit:
                self._turns = turns
                return ids
            if len(turns) == self._num_fixed:
                raise ValueError(
                    f"the prompt has {tokens} tokens and the answer may have {self._max_new_tokens}, this model takes"
                    f" {limit} in all: use fewer passages, a shorter question or shorter answers"
                )
            self._forget(turns)

    def _make_room(self) -> None:
        """Forget the oldest messages, so that a quarter of the model's positions is left for the next passages."""
        limit = self.rag.max_model_len
        if limit is None:
            return
        max_tokens = limit - self._max_new_tokens - limit // 4
        while len(self._turns) > self._num_fixed:
            ids, slices = self._lay_out_slices(self._turns)
            if len(ids) + sum(self._moved_length(*place) - (place[1] - place[0]) for place in slices) <= max_tokens:
                return
            self._forget(self._turns)

    def _forget(self, turns: list[_Turn]) -> None:
        """Drop the oldest question and answer; all, where passages are special tokens: their KV is not made again."""
        del turns[self._num_fixed : None if self.rag.settings.context == "special" else self._num_fixed + 2]


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
