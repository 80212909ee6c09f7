"""Examples -> micro-batches, as a function of the step number: a resumed run sees exactly what it would have seen.

Examples come from files read as a stream (any size), or from a Hugging Face data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from gemify.model.chat_template import ChatTemplate
from gemify.model.tokenization import TextTokenizer
from gemify.paper.objectives import FILLER
from gemify.paper.tokens import Row, random_split, raw_row, reconstruction_row, soft_prompt_row, split_row, summary_row
from gemify.paper.views import View, full_view
from gemify.training.conversations import ChatTokens
from gemify.training.distributed import RankShard
from gemify.training.examples import Example, Source
from gemify.training.objective import MicroBatch, target_count
from gemify.training.recipe import DataSource, Recipe
from gemify.training.teacher import Teacher


def shard_batch(whole: MicroBatch, rank: int, world: int) -> MicroBatch:
    """Return the part of a micro-batch that one process works on."""
    rows, views = RankShard.of(whole.rows, rank, world), RankShard.of(whole.views, rank, world)
    targets = None if whole.targets is None else RankShard.of(whole.targets, rank, world).items
    return replace(
        whole,
        rows=rows.items,
        views=views.items,
        micro_batches=whole.micro_batches * world,
        own_rows=rows.own,
        own_pairs=views.own,
        pairs=views.total,
        targets=targets,
    )


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of an example, and of its other texts if it is a pair."""

    ids: tuple[int, ...]
    second: tuple[int, ...] = ()
    kind: str = "text"
    texts: tuple[str, ...] = ()
    """The texts themselves, if there is a teacher."""
    negatives: tuple[tuple[int, ...], ...] = ()
    """Of a pair: what the anchor is not to be near."""
    id: str | None = None
    score: float | None = None
    """How alike the texts of a scored pair are."""
    chat: ChatTokens | None = None
    """The conversation of which the texts are the first question and answer."""

    @property
    def length(self) -> int:
        """Tokens of the text, of both texts of a pair, or of the conversation."""
        return len(self.chat.ids) if self.chat is not None else len(self.ids) + len(self.second)

    def with_negatives(self, chosen: Sequence[int]) -> TokenizedExample:
        """Return the example with some of its negatives."""
        negatives = tuple(self.negatives[i] for i in chosen)
        texts = (*self.texts[:2], *(self.texts[2 + i] for i in chosen)) if self.texts else ()
        return replace(self, negatives=negatives, texts=texts)


Stream = Iterator[TokenizedExample]


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The micro-batches of a run, of each the shard of one process.

    Examples are read through a buffer. Each buffer is sorted by length and cut into blocks of a batch's size, and the
    blocks are shuffled: rows of one batch have similar lengths, so little padding is computed. At the end of the data
    the stream starts again in another order.

    Args:
        recipe: The run's choices.
        sources: The examples; of several sources also how often each is chosen, and its rows.
        tokenize: The GEM's text tokenizer.
        end_id: The end-of-text token, which ends rows if the recipe says so.
        teacher: Gives the vectors to learn.
        rank: Number of this process.
        world: Number of processes.

    Attributes:
        start_step: The first step to give; batches of earlier steps are drawn and dropped.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Source | Sequence[tuple[Source, DataSource]],
        tokenize: TextTokenizer,
        *,
        end_id: int | None,
        teacher: Teacher | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe, self.tokenize, self.teacher = recipe, tokenize, teacher
        chosen = [(sources, DataSource(sources.name))] if isinstance(sources, Source) else sources
        self.sources, self.choices = [source for source, _ in chosen], [choice for _, choice in chosen]
        self.end_ids = (end_id,) if recipe.append_end and end_id is not None else ()
        self.bos_ids = tuple(tokenize.bos_ids)
        self.rank, self.world = rank, world
        self.start_step = 0
        contrastive = recipe.contrastive_batch_size
        sizes = [recipe.batch_size, contrastive, *(choice.batch_size for choice in self.choices)]
        smallest = min(size for size in sizes if size is not None)
        if world > smallest:
            raise ValueError(
                f"a batch of {smallest} rows cannot be shared by {world} processes: start fewer, or set a larger"
                " batch_size and contrastive_batch_size (they are those of all processes together)"
            )

    def sample(self, num_texts: int) -> Iterator[tuple[list[View], np.ndarray]]:
        """Draw texts as the steps do, and give them in blocks with the teacher's vectors [N, P]."""
        streams = [self._examples(source) for source in self.sources]
        rng = Random(f"{self.recipe.seed} sample")
        while num_texts > 0:
            stream, size = self._choose(streams, rng)
            examples = [next(stream) for _ in range(size or self.recipe.batch_size)]
            views = [view for e in examples for view in self._texts(e)]
            yield views, np.concatenate(self._teach(examples))
            num_texts -= len(views)

    def skipped_rows(self) -> dict[str, Any]:
        """Return how many malformed rows were left out so far, and the first of them; nothing if there was none."""
        bad = [source for source in self.sources if source.skipped]
        return {"skipped_rows": sum(s.skipped for s in bad), "first_skipped": bad[0].first_bad} if bad else {}

    def __iter__(self) -> Iterator[dict[str, MicroBatch]]:
        streams = [self._examples(source) for source in self.sources]
        for step in range(self.recipe.max_steps):
            stream, size = self._choose(streams, Random(f"{self.recipe.seed} source {step}"))
            size = size or self._rows_needed(step)
            micro = [[next(stream) for _ in range(size)] for _ in range(self.recipe.gradient_accumulation_steps)]
            if step >= self.start_step:
                yield from self._step(step, micro)

    def _choose(self, streams: Sequence[Stream], rng: Random) -> tuple[Stream, int | None]:
        """A source's stream by weight, and the rows of its batches if it has a number of its own."""
        [index] = rng.choices(range(len(streams)), [choice.weight for choice in self.choices])
        return streams[index], self.choices[index].batch_size

    def _rows_needed(self, step: int) -> int:
        alpha = self.recipe.schedule.alpha(step)
        contrastive = self.recipe.contrastive_batch_size
        if alpha == 0.0 or contrastive is None:
            return self.recipe.batch_size
        return contrastive if alpha == 1.0 else max(contrastive, self.recipe.batch_size)

    def held_out(self) -> Iterator[tuple[MicroBatch, dict[str, int]]]:
        """Give every example once, in blocks of a batch; a last single one is left out.

        Yields:
            The batch, for both losses if the run has both, and each loss's weight in a mean: its targets or pairs.
        """
        alphas = {self.recipe.schedule.alpha(step) for step in (0, self.recipe.max_steps - 1)}
        alpha = alphas.pop() if alphas in ({0.0}, {1.0}) else 0.5
        pools = itertools.chain.from_iterable(map(self._pools, self.sources))
        blocks = (p[at : at + self.recipe.batch_size] for p in pools for at in range(0, len(p), self.recipe.batch_size))
        for number, block in enumerate(blocks):
            if len(block) >= max(2, self.world):
                made = replace(self._micro_batch(alpha, block, f"held out {number}"), targets=None)
                counts = {"ntp": self._target_count(made.rows)} if made.rows else {}
                counts |= {"contrastive": len(made.views)} if made.views else {}
                whole = replace(made, step_targets=counts.get("ntp", 1))
                yield shard_batch(whole, self.rank, self.world), counts

    def _step(self, step: int, micro: list[list[TokenizedExample]]) -> Iterator[dict[str, MicroBatch]]:
        alpha = self.recipe.schedule.alpha(step)
        made = [self._micro_batch(alpha, examples, f"{step} {index}") for index, examples in enumerate(micro)]
        targets = sum(self._target_count(batch.rows) for batch in made)
        for batch in made:
            whole = replace(batch, step_targets=targets, micro_batches=len(made))
            yield {"batch": shard_batch(whole, self.rank, self.world)}

    def _target_count(self, rows: list[Row]) -> int:
        return sum(target_count(row, frozen_base=self.recipe.frozen_base) for row in rows)

    def _micro_batch(self, alpha: float, examples: list[TokenizedExample], name: str) -> MicroBatch:
        """Rows, views, the teacher's vectors, the texts' keys and scores of a micro-batch, drawn by its name."""
        rng = Random(f"{self.recipe.seed} {name}")
        with_rows = alpha < 1.0 or self.recipe.contrastive_batch_size is None
        rows = [self._row(e, rng) for e in examples[: self.recipe.batch_size]] if with_rows else []
        chosen = self._select_contrastive(examples, rows) if alpha > 0.0 else []
        chosen = self._draw_negatives(chosen, Random(f"{self.recipe.seed} negatives {name}"))
        if self.teacher is not None and len({bool(e.second) for e in chosen}) > 1:
            chosen = [single for e in chosen for single in self._singles(e)]
        chosen, keys = self._fill_up(chosen)
        views = [self._texts(e) if self.teacher is not None else self._views(e, rng) for e in chosen]
        vectors = self._teach(chosen) if self.teacher is not None and chosen else None
        scores = [e.score for e in chosen if e.score is not None]
        if scores and len(scores) < len(chosen):
            raise ValueError(
                "a batch holds pairs with scores and other rows: keep them in files of their own, and give these as a"
                " list (data)"
            )
        rows = rows if alpha < 1.0 else []
        return MicroBatch(alpha, rows, views, targets=vectors, keys=keys, scores=scores or None)

    def _draw_negatives(self, examples: list[TokenizedExample], rng: Random) -> list[TokenizedExample]:
        """The examples with ``num_negatives`` of the negatives that each has."""
        wanted = self.recipe.num_negatives
        drawn = [rng.sample(range(len(e.negatives)), min(wanted, len(e.negatives))) for e in examples]
        return [e.with_negatives(sorted(i)) if e.negatives else e for e, i in zip(examples, drawn, strict=True)]

    def _fill_up(self, examples: list[TokenizedExample]) -> tuple[list[TokenizedExample], list[tuple[int, ...]] | None]:
        """Give all examples equally many negatives, their positives where there are too few; and the texts' keys."""
        width = max((len(e.negatives) for e in examples), default=0)
        numbers: dict[object, int] = {}
        filled, keys = [], []
        for at, example in enumerate(examples):
            first = example.ids[len(self.bos_ids) :]
            second, lacking = example.second or first, width - len(example.negatives)
            named = [("id", example.id) if example.id is not None else ("row", at), first, second, *example.negatives]
            keys.append((*(numbers.setdefault(key, len(numbers)) for key in named), *(FILLER,) * lacking))
            texts = example.texts + example.texts[1:2] * lacking
            filled.append(replace(example, negatives=(*example.negatives, *(second,) * lacking), texts=texts))
        seen = [key for row in keys for key in {*row}]
        return filled, keys if width or len(seen) > len(set(seen)) else None

    def _singles(self, example: TokenizedExample) -> list[TokenizedExample]:
        """The texts of an example as examples of their own, for a batch that mixes texts and pairs."""
        others = [(*self.bos_ids, *text) for text in (example.second, *example.negatives) if text]
        parts = zip((example.ids, *others), example.texts, strict=True)
        return [TokenizedExample(ids, texts=(text,)) for ids, text in parts]

    def _texts(self, example: TokenizedExample) -> tuple[View, ...]:
        """The text of an example, or the texts of a pair, each with BOS and template."""
        texts = (example.ids[len(self.bos_ids) :], *((example.second,) if example.second else ()), *example.negatives)
        return tuple(self.add_template(full_view(text)) for text in texts)

    def _teach(self, examples: list[TokenizedExample]) -> list[np.ndarray]:
        """The teacher's vectors [texts, P] of each example."""
        assert self.teacher is not None
        vectors_NP = self.teacher.vectors([text for e in examples for text in e.texts])
        ends = np.cumsum([len(e.texts) for e in examples])
        return np.split(vectors_NP, ends[:-1])

    def _views(self, example: TokenizedExample, rng: Random) -> tuple[View, ...]:
        """Two views of a text or of a pair and its negatives, each with BOS and template."""
        text = example.ids[len(self.bos_ids) :]
        if example.score is not None:
            first, second = full_view(text), full_view(example.second)
        elif example.kind == "positive":
            first, second = self.recipe.views.of_pair(text, example.second, rng)
        else:
            first, second = self.recipe.views.of_text(text, rng)
        return tuple(self.add_template(view) for view in (first, second, *map(full_view, example.negatives)))

    def add_template(self, view: View) -> View:
        """Return a view as it runs, with BOS and template. Of these nothing is dropped or hidden."""
        prefix, suffix = self.bos_ids + tuple(self.tokenize.prefix_ids), tuple(self.tokenize.suffix_ids)
        seen = (True,) * len(prefix) + view.seen + (True,) * len(suffix)
        return View(prefix + view.ids + suffix, seen, view.recurs)

    def _select_contrastive(self, examples: list[TokenizedExample], rows: list[Row]) -> list[TokenizedExample]:
        """The examples to contrast: a batch of their own, or (as in the paper) the special rows of the same batch."""
        if self.recipe.contrastive_batch_size is not None:
            return examples[: self.recipe.contrastive_batch_size]
        special = [e for e, row in zip(examples, rows, strict=True) if row.has_special_tokens]
        return special if len(special) >= 2 else examples[:2]  # a lone row has no negatives, and nothing to learn

    def _chat_row(self, example: TokenizedExample, chat: ChatTokens, rng: Random) -> Row:
        """A row of a conversation."""
        if rng.random() < self.recipe.p:
            return chat.raw_row()
        room = self.recipe.max_length - len(self.bos_ids)
        texts = [text[:room] for text in (example.ids[len(self.bos_ids) :], example.second) if text]
        if texts and rng.random() < self.recipe.reconstruction:
            return chat.reconstruction_row(rng.choice(texts), bos_ids=self.bos_ids, end_ids=self.end_ids)
        return chat.split_row(rng)

    def _row(self, example: TokenizedExample, rng: Random) -> Row:
        if example.chat is not None:
            return self._chat_row(example, example.chat, rng)
        if rng.random() < self.recipe.p:
            return raw_row(example.ids if example.kind in ("positive", "scored") else (*example.ids, *example.second))
        if example.kind == "summary":
            return summary_row(example.ids, (*example.second, *self.end_ids))
        if example.kind == "soft_prompt":
            return soft_prompt_row(example.ids, (*example.second, *self.end_ids))
        if rng.random() < self.recipe.reconstruction:
            return reconstruction_row(example.ids[len(self.bos_ids) :], bos_ids=self.bos_ids, end_ids=self.end_ids)
        return split_row(example.ids, len(self.bos_ids) + random_split(len(example.ids) - len(self.bos_ids), rng))

    def _examples(self, source: Source) -> Iterator[TokenizedExample]:
        block = self.recipe.batch_size
        epoch = 0
        while True:
            seen = 0
            for number, pool in enumerate(self._pools(source)):
                seen += len(pool)
                rng = Random(f"{self.recipe.seed} epoch {epoch} pool {number}")
                rng.shuffle(pool)  # texts of equal length keep a random order in the sort
                pool.sort(key=lambda e: e.length)
                blocks = [pool[at : at + block] for at in range(0, len(pool), block)]
                rng.shuffle(blocks)
                for some in blocks:
                    yield from some
            if seen < max(2, self.recipe.batch_size, self.recipe.contrastive_batch_size or 0):
                bad = f" ({source.skipped:,} bad rows skipped, the first: {source.first_bad})" if source.skipped else ""
                raise ValueError(
                    f"{source.name} holds {seen} texts of at least {self.recipe.min_length} tokens{bad}, too few for"
                    f" its batches: give more text, or a smaller batch_size, contrastive_batch_size or min_length"
                )
            epoch += 1

    def _pools(self, source: Source) -> Iterator[list[TokenizedExample]]:
        pool: list[TokenizedExample] = []
        waiting: list[Example] = []
        for example in source:
            waiting.append(example)
            if len(waiting) == 1024:
                pool += self._tokens(waiting, source)
                waiting = []
                if len(pool) >= self.recipe.shuffle_buffer:
                    yield pool
                    pool = []
        pool += self._tokens(waiting, source)
        if pool:
            yield pool

    def _tokens(self, examples: list[Example], source: Source) -> list[TokenizedExample]:
        limit = self.recipe.max_length
        tokenize = self.tokenize.tokenize_plain
        first = tokenize([e.text for e in examples], max_tokens=limit - len(self.bos_ids))
        second = tokenize([e.second or "" for e in examples], max_tokens=limit)
        others = iter(tokenize([text for e in examples for text in e.negatives], max_tokens=limit))
        made = []
        for example, ids, more in zip(examples, first, second, strict=True):
            known = [(text, tuple(next(others))) for text in example.negatives]
            negatives = tuple(ids for _, ids in known if ids)
            chat = None
            if example.conversation is not None:
                template = self._chat_template
                try:
                    chat = example.conversation.tokenize(template, max_tokens=limit)
                except ValueError as error:
                    source.skip(example.row, error)
                    continue
            is_long = len(ids if chat is None else chat.ids) >= self.recipe.min_length
            is_learned = chat is None or bool(chat.targets)  # a long question may leave no room for its answer
            if is_long and is_learned and (example.second is None or more):
                pair = (example.second, *(text for text, ids in known if ids)) if example.second else ()
                texts = (example.text, *pair) if self.teacher else ()
                anchor = (*self.bos_ids, *ids)
                known_of = negatives, example.id, example.score, chat
                made.append(TokenizedExample(anchor, tuple(more), example.kind, texts, *known_of))
        return made

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenize.tokenizer)
