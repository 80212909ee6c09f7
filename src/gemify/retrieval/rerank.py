"""Rerankers: passages that were found, sorted anew by a score of each with the question.

    bi    the cosine of the passage's vector and the question's
    lm    the base model's odds of yes against no, after a question and a passage (Nogueira et al., 2020, with a
          decoder and without training)

Both use the weights of the GEM. The language model runs as the base: no adapter takes part.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gemify.io.vectors import normalize
from gemify.model.base import max_positions
from gemify.model.chat_template import ChatTemplate, Ids, Message
from gemify.model.forward import PASS_OVERHEAD_TOKENS, left_pad, length_groups
from gemify.model.gem import GemModel
from gemify.model.kv_cache import common_prefix_length, empty_text, keeps_all_positions, new_cache
from gemify.model.prefill import extend
from gemify.retrieval.index import GemIndex, Passage

Rerank = Literal["none", "bi", "lm"]
CANDIDATES = 20
"""Passages that a search finds for a reranker to sort, if fewer are wanted."""
MAX_PASSAGE_TOKENS = 512
_MAX_PASSAGE_CHARACTERS = 16 * MAX_PASSAGE_TOKENS
_MIN_PASSAGE_TOKENS = 16
_CUT_MARGIN = 8  # tokens by which a cut passage may grow inside a prompt
_BATCH_TOKENS = 2048
_INSTRUCTION = "Does the passage answer the question? Answer yes or no."

ScoreFn = Callable[[str, Sequence[str]], np.ndarray]
"""Scores [N], float64, of texts for a question; higher is better."""


class YesNoPrompts:
    """Prompts that ask the base model whether a passage answers a question, in its own chat format.

    The question stands before the passage, so that all prompts of a question share a prefix. The instruction stands
    last: small models forget one that comes first. Several threads may use it.

    Args:
        tokenizer: The base model's. It is copied.
        max_model_len: Most tokens of a prompt. None: no limit.

    Raises:
        ValueError: The tokenizer has no chat template, or writes yes and no with the same tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int | None) -> None:
        self._tokenizer, self._max_model_len = copy.deepcopy(tokenizer), max_model_len
        template = ChatTemplate(self._tokenizer)
        self._template = template.bind({"enable_thinking": False} if template.reads("enable_thinking") else {})
        self._lock = threading.Lock()
        yes, no = (_answer_ids(self._tokenizer, word) for word in ("yes", "no"))
        self._yes_ids, self._no_ids = sorted(yes - no), sorted(no - yes)
        if not (self._yes_ids and self._no_ids):
            raise ValueError("this tokenizer writes yes and no with the same tokens: rerank with bi")

    @classmethod
    def of(cls, gem: GemModel) -> YesNoPrompts | None:
        """Return the prompts of a model, None if it can have none."""
        with contextlib.suppress(ValueError):
            return cls(gem.tokenizer, max_positions(gem.lm))
        return None

    def messages(self, question: str, passage: str) -> list[Message]:
        """The conversation whose answer is yes or no."""
        return [{"role": "user", "content": f"{_head(question)}{passage}\n\n{_INSTRUCTION}"}]

    def __call__(self, question: str, passages: Sequence[str]) -> tuple[Ids, list[Ids]]:
        """Lay out the prompts of a question.

        Args:
            question: The question.
            passages: Each is cut at `MAX_PASSAGE_TOKENS`, or earlier if the model has few positions.

        Returns:
            The ids that all prompts begin with, fewer than any prompt has, and the ids of each prompt.

        Raises:
            ValueError: The question leaves no room for a passage.
        """
        with self._lock:
            empty = self.messages(question, "")
            budget = MAX_PASSAGE_TOKENS
            if self._max_model_len is not None:
                taken = len(self._template.apply(empty))
                budget = min(budget, self._max_model_len - taken - _CUT_MARGIN)
                if budget < _MIN_PASSAGE_TOKENS:
                    raise ValueError(
                        f"the question's prompt has {taken} tokens, which leaves no room for a passage in the"
                        f" {self._max_model_len} of this model: shorten the question"
                    )
            rows = [self._template.apply(self.messages(question, self._cut(text, budget))) for text in passages]
            prefix = self._template.stable_prefix(empty, length=len(_head(question)))
        shared = min((common_prefix_length(prefix, row) for row in rows), default=0)
        return prefix[: min([shared, *(len(row) - 1 for row in rows)])], rows

    def log_odds(self, logits_BV: Tensor) -> np.ndarray:
        """Log odds [B] of yes against no, in float64, from the logits where an answer starts."""
        yes_B, no_B = (logits_BV[:, ids].double().logsumexp(-1) for ids in (self._yes_ids, self._no_ids))
        odds_B: np.ndarray = (yes_B - no_B).cpu().numpy()
        return odds_B

    def _cut(self, text: str, budget: int) -> str:
        text = text[:_MAX_PASSAGE_CHARACTERS].strip()
        offsets = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        return text if len(offsets) <= budget else text[: offsets[budget - 1][1]]


def _padded(lm: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids_BT, mask_BT = left_pad(rows)
    return ids_BT.to(lm.device), mask_BT.to(lm.device)


def _head(question: str) -> str:
    return f"Question: {question.strip()}\n\nPassage: "


def _answer_ids(tokenizer: Any, word: str) -> set[int]:
    """Ids of the tokens that are a word, in any case and with a space before it or none; else its first tokens."""
    variants = [space + form for form in (word, word.capitalize(), word.upper()) for space in ("", " ")]
    rows = tokenizer(variants, add_special_tokens=False)["input_ids"]
    return {row[0] for row in rows if len(row) == 1} or {row[0] for row in rows if row}


class LmReranker:
    """Scores passages by the base model's odds of yes against no.

    Args:
        gem: The model. Where threads share it, hold its lock around each call.

    Raises:
        ValueError: The base model has no chat template, or its tokenizer has no yes and no.
    """

    def __init__(self, gem: GemModel) -> None:
        self.gem = gem
        self.prompts = YesNoPrompts(gem.tokenizer, max_positions(gem.lm))

    @torch.no_grad()
    def __call__(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """Log odds [N] of yes, float64. The prompts' common prefix runs once.

        Args:
            question: The question.
            passages: The passages, which may be empty.

        Raises:
            ValueError: The question leaves no room for a passage.
        """
        lm = self.gem.lm.eval()
        prefix, rows = self.prompts(question, passages)
        text, ids_1T = empty_text(lm), torch.empty(1, 0, dtype=torch.long, device=lm.device)
        if prefix:
            run = extend(lm, text, ids_1T, *_padded(lm, [prefix]), single=True)
            text, ids_1T = run.text, run.ids_BT
        parts = list(dict.fromkeys(row[len(prefix) :] for row in rows))
        scores: dict[Ids, float] = {}
        # sliding windows would be measured over the padding
        overhead = PASS_OVERHEAD_TOKENS if keeps_all_positions(new_cache(lm)) else 0.0
        lengths = [len(part) for part in parts]
        for group in length_groups(lengths, max_tokens=_BATCH_TOKENS, pass_overhead_tokens=overhead):
            ids_BT, mask_BT = _padded(lm, [parts[i] for i in group])
            before = text.rows([0] * len(group))
            run = extend(lm, before, ids_1T.expand(len(group), -1), ids_BT, mask_BT, single=False)
            scores.update(zip((parts[i] for i in group), self.prompts.log_odds(run.logits_BV), strict=True))
        return np.array([scores[row[len(prefix) :]] for row in rows], dtype=np.float64)


class BiReranker:
    """Scores passages by the cosine of their vectors and the question's.

    Args:
        model: Embeds them, as `GemModel` does.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """Cosines [N], float64."""
        if not passages:
            return np.empty(0)
        query_1D = normalize(np.asarray(self.model.encode_query(question), dtype=np.float32)[None])
        documents_ND = normalize(np.asarray(self.model.encode_document(list(passages)), dtype=np.float32))
        return (documents_ND @ query_1D[0]).astype(np.float64)


class RerankedIndex:
    """An index whose best passages are sorted anew: it has the `search` of `GemIndex`.

    Args:
        index: Finds candidates.
        score: A reranker.
        candidates: How many are scored, if fewer passages are wanted.
    """

    def __init__(self, index: Any, score: ScoreFn, *, candidates: int = CANDIDATES) -> None:
        self.index, self.score, self.candidates = index, score, candidates

    def search(
        self,
        query: str,
        *,
        k: int = 10,
        mode: Any = "hybrid",
        vector: np.ndarray | None = None,
        where: str | None = None,
    ) -> list[Passage]:
        """Find passages as `GemIndex.search` does, score them, and return the ``k`` best with their new scores."""
        found = self.index.search(query, k=max(k, self.candidates), mode=mode, vector=vector, where=where)
        scores = self.score(query, [text_with_context(passage) for passage in found])
        return sort_passages(found, scores, k)


def sort_passages(passages: Sequence[Passage], scores_N: np.ndarray, k: int) -> list[Passage]:
    """Return the ``k`` passages with the highest scores, best first, with these scores."""
    return [replace(passages[i], score=float(scores_N[i])) for i in np.argsort(-scores_N, kind="stable")[:k]]


def text_with_context(passage: Passage) -> str:
    """Return a passage after its title and headings, as an index embeds it."""
    headings = passage.heading.split(" > ") if passage.heading else []
    path = [passage.title] if passage.title and passage.title not in headings else []
    context = " > ".join([*path, *headings])
    return f"{context}\n{passage.text}" if context else passage.text


def require_rerank(name: str) -> None:
    """Raise ValueError for an unknown reranker."""
    if name not in get_args(Rerank):
        raise ValueError(f"unknown rerank {name!r}: choose one of {', '.join(get_args(Rerank))}")


def rerank_index(index: GemIndex, name: str, gem: GemModel | None) -> GemIndex | RerankedIndex:
    """Return an index that reranks what it finds with a model; ``none``: the index itself.

    Raises:
        ValueError: The name is unknown, or the model cannot rerank so.
    """
    require_rerank(name)
    if name == "none":
        return index
    if gem is None:
        raise ValueError(f"to rerank by {name} needs a model: give one")
    return RerankedIndex(index, LmReranker(gem) if name == "lm" else BiReranker(gem))
