"""Chat answers from the index: the pipeline of `gemify.rag` over the engine.

    question     prefill in the engine's batches; its special token embeds it there        (`EngineRunner`)
    search       the index, with that vector
    answer       the passages and the rest of the prompt go on from the question's KV  (`Engine.generate`, ``start``)

The pipeline blocks, as it does for `gemify ask`. So each request has a thread until its answer starts; the
threads wait for the engine most of the time.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from gemify.engine.requests import (
    Done,
    EmbeddingOutput,
    EngineRequest,
    Event,
    Failed,
    PrefillOutput,
    PromptStart,
)
from gemify.model.chat_template import ChatTemplate, Message
from gemify.model.forward import special_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import CachedText
from gemify.rag.context import SearchIndex
from gemify.rag.kv_store import KvStore, kv_store_factory
from gemify.rag.pipeline import GemRag, PreparedPrompt, PromptOrder, RagSettings
from gemify.rag.prompt_cache import Ids, PromptRun
from gemify.retrieval.rerank import RerankedIndex, ScoreFn
from gemify.serving.dispatch import RequestCancelledError, SubmitFn
from gemify.serving.settings import ServerSettings

if TYPE_CHECKING:
    from gemify.engine.engine import Engine

_THREADS = 32


def kv_store_of(settings: ServerSettings, uri: str | None) -> Callable[[GemModel], KvStore] | None:
    """Check the settings of kept KV.

    Args:
        settings: the server's options.
        uri: the store whose passages' KV it is. None: there is none.

    Returns:
        What opens the directory of kept KV for a model; None: nothing is kept.
    """
    if settings.keep_kv and uri is None and settings.kv_store is None:
        raise ValueError("--keep-kv keeps caches of an index's passages: give --store DIR")
    return kv_store_factory(
        uri or "",
        keep_kv=settings.keep_kv,
        bits=settings.kv_bits,
        budget=settings.kv_budget,
        directory=settings.kv_store,
    )


class EngineRunner:
    """Runs the prompts of one HTTP request in an engine (`gemify.rag.prompt_cache.PromptRunner`). Its methods block.

    Args:
        engine: runs them.
        tokenize_query: token ids of a question that is embedded alone.
        charge: called with the number of tokens before they are run; may refuse them.
        cache_salt: only requests with equal salts share prefixes.
        is_exact: whether all KV that the pipeline goes on from is what running the tokens gives.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenize_query: Callable[[str], Sequence[int]],
        charge: Callable[[int], None],
        cache_salt: str,
        is_exact: bool,
    ) -> None:
        self._engine, self._tokenize_query, self._charge = engine, tokenize_query, charge
        self._cache_salt, self._is_exact = cache_salt, is_exact
        self._lock = threading.Lock()
        self._request: EngineRequest | None = None
        self.charged_tokens = 0
        """Of prompts; questions that were embedded alone are not among them."""
        self._cancelled = False

    @property
    def gem(self) -> GemModel:
        """The engine's model."""
        return self._engine.gem

    def cancel(self) -> None:
        """Give up what runs, and start nothing more; from any thread."""
        with self._lock:
            self._cancelled = True
            if self._request is not None:
                self._request.cancel()

    def run(self, ids: Ids, start: CachedText, *, embed_from: int | None = None) -> PromptRun:
        """Run a prompt after ``start``, or after what the engine's prefix cache knows; see `PromptRunner.run`."""
        known = start.mask_BT.shape[1]
        self._charge(len(ids) - known)
        self.charged_tokens += len(ids) - known
        given = PromptStart(start, is_exact=self._is_exact) if known else None
        submit = partial(self._engine.prefill, ids, embed_from=embed_from, cache_salt=self._cache_salt, start=given)
        request, events = self._wait(submit)
        output = next(event for event in events if isinstance(event, PrefillOutput))
        vectors = [event.vectors_ND[0] for event in events if isinstance(event, EmbeddingOutput)]
        embedding = torch.from_numpy(vectors[0]) if vectors else None
        computed = len(ids) - known - request.cached_tokens
        return PromptRun(output.text, output.logits_BV, embedding, computed)

    def run_special_tokens(self, text: CachedText) -> DynamicCache:
        """KV of the special tokens after a text that has run."""
        config = self.gem.config
        with self._engine.paused():
            return special_pass(self.gem.lm, text, config.special_ids, shared_position=config.shared_position).cache

    def encode_query(self, inputs: str) -> np.ndarray:
        """Vector [D] of a question alone."""
        ids = self._tokenize_query(inputs)
        self._charge(len(ids))
        _, events = self._wait(partial(self._engine.embed, [ids]))
        vector_D: np.ndarray = next(event.vectors_ND for event in events if isinstance(event, EmbeddingOutput))[0]
        return vector_D

    def cache_prefix(self, ids: Ids) -> None:
        """Do nothing: the engine's prefix cache keeps what was used last."""

    def _wait(self, submit: SubmitFn) -> tuple[EngineRequest, list[Event]]:
        """Submit a request to the engine. Return its events when it is done."""
        arriving: SimpleQueue[Event] = SimpleQueue()
        with self._lock:
            if self._cancelled:
                raise RequestCancelledError
            request = self._request = submit(listener=arriving.put)
        events: list[Event] = []
        while not isinstance(event := arriving.get(), Done):
            if isinstance(event, Failed):
                raise event.error
            events.append(event)
        if not events:  # nothing but the end
            raise RequestCancelledError
        return request, events


@dataclass(frozen=True)
class RagPrompt:
    """A prompt with passages, ready for `Engine.generate`."""

    ids: Ids
    start: PromptStart | None
    """What of it has run."""
    passages: Sequence[Any]
    charged_tokens: int
    """Tokens that were charged for already."""


@dataclass(frozen=True)
class ServedStore:
    """One of the server's stores."""

    name: str
    index: SearchIndex
    kv: KvStore | None = None
    """Where its passages' KV is kept. None: nowhere."""


class RagService:
    """Prepares the prompts of questions to indexes.

    Args:
        engine: runs them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._settings = engine, RagSettings()
        self._template = ChatTemplate(
            copy.deepcopy(engine.gem.tokenizer), own_system=self._settings.system
        )  # the model's own is the engine's
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="gemify-rag")

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def prepare(
        self,
        messages: Sequence[Message],
        store: ServedStore,
        *,
        bind: Callable[[ChatTemplate], ChatTemplate],
        k: int,
        mode: str,
        where: str | None,
        score: ScoreFn | None,
        max_tokens: int,
        tokenize_query: Callable[[str], Sequence[int]],
        charge: Callable[[int], None],
        cache_salt: str,
    ) -> RagPrompt:
        """Embed the last message, find its passages and lay out the prompt, as `gemify ask` does.

        Args:
            messages: the conversation, with the keys ``role`` and ``content``; the last one is the question.
            store: searched for passages.
            bind: gives the chat template the request's variables.
            k: how many passages.
            mode: of the search.
            where: filter of the search. None: all passages.
            score: reranks what is found; called in another thread. None: nothing does.
            max_tokens: positions that the answer needs.
            tokenize_query: token ids of a question that is embedded alone; called in another thread.
            charge: called with the number of tokens before they are run, in another thread; may refuse them.
            cache_salt: only requests with equal salts share prefixes.

        Raises:
            ValueError: a prompt that does not fit the model, or a search that cannot be made.
        """
        exact, template = store.kv is None, bind(self._template)
        index = store.index if score is None else RerankedIndex(store.index, score)
        order: PromptOrder = "question-first" if exact else "passages-first"
        runner = EngineRunner(
            self._engine, tokenize_query=tokenize_query, charge=charge, cache_salt=cache_salt, is_exact=exact
        )

        def work() -> PreparedPrompt:
            rag = GemRag(
                self._engine.gem,
                index,
                kv=store.kv,
                settings=replace(self._settings, passages=k, mode=mode, where=where, order=order),
                runner=runner,
                chat_template=template,
            )
            with torch.inference_mode():
                conversation = rag.conversation(messages[:-1])
                return conversation.prepare(messages[-1]["content"], max_new_tokens=max_tokens)

        try:
            prepared = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            runner.cancel()  # nothing is left to do, unless this was given up
        known = prepared.start.mask_BT.shape[1]
        start = PromptStart(prepared.start, max(0, known - prepared.computed), is_exact=exact) if known else None
        return RagPrompt(prepared.ids, start, prepared.passages, min(runner.charged_tokens, known))
