"""One prompt that grows: what of it has run is not run again.

A conversation's next prompt begins with the last one, a question's prompt with the question, a document's with the
document. `extend_to` runs only what is new; where a prompt differs from what has run, the cache is cut there.

A prompt's tokens are run by this thread with a `GemModel` (`ModelRunner`), or by an engine (`gemify.serving.rag`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from gemify.model.answer_parser import AnswerDelta, AnswerParser
from gemify.model.config import require_finite
from gemify.model.forward import special_pass, text_and_special_pass
from gemify.model.gem import GemModel
from gemify.model.kv_cache import (
    CachedText,
    PrefixCache,
    common_prefix_length,
    empty_text,
    keeps_all_positions,
    output_cache,
    take_prefix,
)
from gemify.model.prefill import Prefill, extend, find_eos_ids, generate_ids
from gemify.model.rope_shift import concatenate
from gemify.model.streaming import IncrementalDetokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True)
class PromptRun:
    """A prompt that has run."""

    text: CachedText
    """Its KV."""
    logits_BV: Tensor | None
    """Logits [1, V] of the next token. None: the LM head did not run."""
    embedding: Tensor | None
    """Vector [D] of the prompt, if one was asked for."""
    computed: int
    """Tokens that were run now; the others had run before."""


class PromptRunner(Protocol):
    """Runs prompts through one model."""

    @property
    def gem(self) -> GemModel:
        """The model."""

    def run(self, ids: Ids, start: CachedText, *, embed_from: int | None = None) -> PromptRun:
        """Run a prompt.

        Args:
            ids: the prompt, at least one token longer than ``start``.
            start: what of it has run. An empty text: the runner may know a prefix that has run.
            embed_from: also embed the prompt; its special tokens see the positions from this one on.
        """

    def run_special_tokens(self, text: CachedText) -> DynamicCache:
        """KV of the special tokens after a text that has run."""

    def encode_query(self, inputs: str) -> np.ndarray:
        """Vector [D] of a question alone."""

    def cache_prefix(self, ids: Ids) -> None:
        """Have the prefix of all conversations run once."""


class ModelRunner:
    """Runs prompts in the calling thread.

    Args:
        gem: the model.
    """

    def __init__(self, gem: GemModel) -> None:
        self.gem = gem
        self._prefixes = PrefixCache(gem.lm, min_tokens=1)

    @torch.no_grad()
    def run(self, ids: Ids, start: CachedText, *, embed_from: int | None = None) -> PromptRun:
        """Run a prompt after ``start``, or after a cached prefix; see `PromptRunner.run`."""
        gem = self.gem
        gem.lm.eval()
        if not start.mask_BT.shape[1]:
            start = self._prefixes.match(ids)
        done = start.mask_BT.shape[1]
        before_BT, new_BT = (
            torch.tensor(part, dtype=torch.long, device=gem.device)[None] for part in (ids[:done], ids[done:])
        )
        mask_BT = torch.ones_like(new_BT, dtype=torch.bool)
        config = gem.config
        if embed_from is not None and config.layer is None and keeps_all_positions(start.cache):
            gem.require_embeddable_prefill()
            text, hidden_BKD = text_and_special_pass(
                gem.lm,
                start,
                new_BT,
                mask_BT,
                gem.special_ids,
                start=embed_from,
                shared_position=config.shared_position,
                suffix_ids=gem.text_tokenizer.suffix_ids,
            )
            vector_D = require_finite(gem.pool(hidden_BKD)[0].cpu())
            return PromptRun(text, None, vector_D, len(ids) - done)
        prefill = extend(gem.lm, start, before_BT, new_BT, mask_BT, single=True)
        embedding = None if embed_from is None else gem.embed(prefill, start=embed_from)
        return PromptRun(prefill.text, prefill.logits_BV, embedding, len(ids) - done)

    @torch.no_grad()
    def run_special_tokens(self, text: CachedText) -> DynamicCache:
        """KV of the special tokens after a text that has run."""
        config = self.gem.config
        return special_pass(self.gem.lm, text, config.special_ids, shared_position=config.shared_position).cache

    def encode_query(self, inputs: str) -> np.ndarray:
        """Vector [D] of a question alone."""
        return np.asarray(self.gem.encode_query(inputs))

    def cache_prefix(self, ids: Ids) -> None:
        """Run the prefix of all conversations, if it has not run yet, and keep its KV."""
        if ids and not len(self._prefixes):
            self._prefixes.insert(ids, self.run(ids, self._prefixes.match(ids)).text)


@dataclass(frozen=True)
class GeneratedText:
    """An answer: its text, its ids without the end token, and how many tokens were generated."""

    text: str
    """Without thoughts."""
    ids: Ids
    num_tokens: int
    thoughts: str = ""


class PromptCache:
    """The KV of one prompt.

    Args:
        runner: runs its tokens.
    """

    def __init__(self, runner: PromptRunner) -> None:
        self._runner = runner
        self.computed = 0
        """Tokens run so far."""
        self.clear()

    def clear(self) -> None:
        """Forget what has run."""
        self.ids: Ids = ()
        self.text = empty_text(self._runner.gem.lm)
        """KV of ``ids``."""
        self._logits_BV: Tensor | None = None

    def load(self, ids: Sequence[int], text: CachedText) -> None:
        """Take the KV of ``ids``, which was computed elsewhere."""
        self.ids, self.text, self._logits_BV = tuple(ids), text, None

    def cut_to(self, ids: Sequence[int]) -> CachedText:
        """Keep what has run of ``ids``, less than all of it; drop the rest. Return what is kept."""
        if not ids:
            raise ValueError("no token given: a prompt must not be empty")
        common = common_prefix_length(self.ids, ids[:-1])
        if common < len(self.ids):
            try:
                text = take_prefix(self._runner.gem.lm, self.text, common)
            except ValueError:  # sliding windows have dropped what is wanted: start over
                self.clear()
            else:
                self.load(ids[:common], text)
        return self.text

    def extend_to(self, ids: Sequence[int]) -> Prefill:
        """Run what is new of ``ids`` after what has run already."""
        target = tuple(ids)
        if self._logits_BV is None or self.ids != target:
            self._keep(target, self._runner.run(target, self.cut_to(target)))
        assert self._logits_BV is not None
        ids_BT = torch.tensor([target], device=self._runner.gem.device)
        return Prefill(self.text, ids_BT, self._logits_BV, single=True)

    def extend_and_embed(self, ids: Sequence[int], *, start: int) -> Tensor:
        """Run what is new of ``ids``, and the special tokens after it.

        Args:
            ids: the prompt.
            start: the special tokens see the prompt from this position on. They leave no trace in it, nor does the
                template's suffix before them.

        Returns:
            The prompt's vector, [D] or [K * D].
        """
        target = tuple(ids)
        run = self._runner.run(target, self.cut_to(target), embed_from=start)
        self._keep(target, run)
        assert run.embedding is not None
        return run.embedding

    def append(self, ids: Sequence[int]) -> Prefill:
        """Run ``ids`` after all that has run, also after a concatenated cache."""
        return self.extend_to((*self.ids, *ids))

    def concatenate(self, ids: Sequence[int], cache: DynamicCache) -> None:
        """Put a cache that was computed elsewhere, and moved to this position, behind what has run."""
        gem = self._runner.gem
        whole = concatenate(gem.lm, [self.text.cache, cache]) if self.ids else cache
        mask_BT = torch.ones(1, len(self.ids) + len(ids), dtype=torch.bool, device=gem.device)
        self.load((*self.ids, *ids), CachedText(whole, mask_BT))

    def generate(
        self,
        prefill: Prefill,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] | None = None,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[], None] | None = None,
        parser: AnswerParser | None = None,
        **options: Any,
    ) -> GeneratedText:
        """Answer the prompt in this thread, and keep the answer's KV too.

        Args:
            prefill: the prompt, as `extend_to` gave it.
            max_new_tokens: most tokens of the answer.
            stop: the answer ends before the first of these strings.
            on_text: gets the pieces of text as they are generated, without thoughts.
            on_token: called for each token.
            parser: finds the thoughts. None: there are none.
            options: those of transformers' `generate`.
        """
        gem, before = self._runner.gem, prefill.ids_BT.shape[1]
        answer = _ParsedText(parser, on_text)
        pieces = IncrementalDetokenizer(
            gem,
            sink=answer.feed,
            stop=stop,
            max_new_tokens=max_new_tokens,
            skip_special_tokens=parser is None,
            prompt_tokens=before,
        )
        criteria = [pieces] if on_token is None else [_OnToken(on_token), pieces]
        with torch.no_grad():
            out = generate_ids(
                gem.lm,
                gem.tokenizer,
                prefill,
                prefill.ids_BT,
                prefill.text.mask_BT,
                suppressed_ids=gem.special_ids,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList(criteria),
                return_dict_in_generate=True,
                **options,
            )
        sequence = out.sequences[0].tolist()
        new = sequence[before:]
        pieces.finish(str(gem.tokenizer.decode(new, skip_special_tokens=True)) if parser is None else None)
        answer.finish()
        mask_BT = torch.ones(1, len(sequence) - 1, dtype=torch.bool, device=gem.device)
        self.load(sequence[:-1], CachedText(output_cache(out), mask_BT))  # the last token was generated, not run
        kept = new[:-1] if new and new[-1] in find_eos_ids(gem.lm, gem.tokenizer) else new
        return GeneratedText(answer.text, tuple(kept), len(new), answer.thoughts)

    def _keep(self, ids: Ids, run: PromptRun) -> None:
        self.ids, self.text, self._logits_BV = ids, run.text, run.logits_BV
        self.computed += run.computed


class _OnToken(StoppingCriteria):
    """Calls a function after every token; never stops."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _ParsedText:
    """Pieces of an answer, its thoughts apart."""

    def __init__(self, parser: AnswerParser | None, on_text: Callable[[str], None] | None) -> None:
        self._parser, self._on_text = parser, on_text
        self.text = self.thoughts = ""

    def feed(self, piece: str) -> None:
        self._add([AnswerDelta(piece)] if self._parser is None else self._parser.feed(piece))

    def finish(self) -> None:
        """Add what the parser has held back."""
        self._add([] if self._parser is None else self._parser.finish())

    def _add(self, deltas: Sequence[AnswerDelta]) -> None:
        for delta in deltas:
            self.text += delta.text
            self.thoughts += delta.reasoning
            if delta.text and self._on_text is not None:
                self._on_text(delta.text)
