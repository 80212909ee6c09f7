"""Examples -> micro-batches, as a function of the step number: a resumed run sees exactly what it would have seen.

Examples come from files read as a stream (any size), or from a Hugging Face data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from gemify.io.rows import COMPRESSIONS, has_row_suffix, read_values, require_text
from gemify.io.tables import first_line
from gemify.model.tokenization import TextTokenizer
from gemify.paper.tokens import Row, random_split, raw_row, reconstruction_row, soft_prompt_row, split_row, summary_row
from gemify.paper.views import View, full_view
from gemify.training.distributed import RankShard
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
    """Token ids of an example, and of its second text if it is a pair."""

    ids: tuple[int, ...]
    second: tuple[int, ...] = ()
    kind: str = "text"
    texts: tuple[str, ...] = ()
    """The texts themselves, if there is a teacher."""

    @property
    def length(self) -> int:
        """Tokens of both texts."""
        return len(self.ids) + len(self.second)


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

    def _step(self, step: int, micro: list[list[TokenizedExample]]) -> Iterator[dict[str, MicroBatch]]:
        alpha = self.recipe.schedule.alpha(step)
        with_rows = alpha < 1.0 or self.recipe.contrastive_batch_size is None
        made = []
        for index, examples in enumerate(micro):
            rng = Random(f"{self.recipe.seed} {step} {index}")
            rows = [self._row(e, rng) for e in examples[: self.recipe.batch_size]] if with_rows else []
            chosen = self._select_contrastive(examples, rows) if alpha > 0.0 else []
            if self.teacher is not None and len({len(e.texts) for e in chosen}) > 1:
                chosen = [single for e in chosen for single in self._singles(e)]
            views = [self._texts(e) if self.teacher is not None else self._views(e, rng) for e in chosen]
            made.append(
                (
                    rows if alpha < 1.0 else [],
                    views,
                    self._teach(chosen) if self.teacher is not None and chosen else None,
                )
            )
        targets = sum(target_count(r, frozen_base=self.recipe.frozen_base) for rows, *_ in made for r in rows)
        for rows, views, vectors in made:
            whole = MicroBatch(alpha, rows, views, step_targets=targets, micro_batches=len(made), targets=vectors)
            yield {"batch": shard_batch(whole, self.rank, self.world)}

    def _singles(self, example: TokenizedExample) -> list[TokenizedExample]:
        """The texts of an example as examples of their own, for a batch that mixes texts and pairs."""
        parts = [example.ids, *([(*self.bos_ids, *example.second)] if example.second else [])]
        return [TokenizedExample(ids, texts=(text,)) for ids, text in zip(parts, example.texts, strict=True)]

    def _texts(self, example: TokenizedExample) -> tuple[View, ...]:
        """The text of an example, or the two texts of a pair, each with BOS and template."""
        texts = [example.ids[len(self.bos_ids) :], *([example.second] if example.second else [])]
        return tuple(self.add_template(full_view(text)) for text in texts)

    def _teach(self, examples: list[TokenizedExample]) -> list[np.ndarray]:
        """The teacher's vectors [1 or 2, P] of each example."""
        assert self.teacher is not None
        vectors_NP = self.teacher.vectors([text for e in examples for text in e.texts])
        ends = np.cumsum([len(e.texts) for e in examples])
        return np.split(vectors_NP, ends[:-1])

    def _views(self, example: TokenizedExample, rng: Random) -> tuple[View, View]:
        """Two views of a text or of a pair, each with BOS and template."""
        text = example.ids[len(self.bos_ids) :]
        if example.kind == "positive":
            first, second = self.recipe.views.of_pair(text, example.second, rng)
        else:
            first, second = self.recipe.views.of_text(text, rng)
        return self.add_template(first), self.add_template(second)

    def add_template(self, view: View) -> View:
        """Return a view as it runs, with BOS and template. Of these nothing is dropped or hidden."""
        prefix, suffix = self.bos_ids + tuple(self.tokenize.prefix_ids), tuple(self.tokenize.suffix_ids)
        return View(prefix + view.ids + suffix, (True,) * len(prefix) + view.seen + (True,) * len(suffix))

    def _select_contrastive(self, examples: list[TokenizedExample], rows: list[Row]) -> list[TokenizedExample]:
        """The examples to contrast: a batch of their own, or (as in the paper) the special rows of the same batch."""
        if self.recipe.contrastive_batch_size is not None:
            return examples[: self.recipe.contrastive_batch_size]
        special = [e for e, row in zip(examples, rows, strict=True) if row.has_special_tokens]
        return special if len(special) >= 2 else examples[:2]  # a lone row has no negatives, and nothing to learn

    def _row(self, example: TokenizedExample, rng: Random) -> Row:
        if rng.random() < self.recipe.p:
            return raw_row(example.ids if example.kind == "positive" else (*example.ids, *example.second))
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
                raise ValueError(
                    f"{source.name} holds {seen} texts of at least {self.recipe.min_length} tokens, too few for"
                    f" its batches: give more text, or a smaller batch_size, contrastive_batch_size or min_length"
                )
            epoch += 1

    def _pools(self, source: Source) -> Iterator[list[TokenizedExample]]:
        pool: list[TokenizedExample] = []
        waiting: list[Example] = []
        for example in source:
            waiting.append(example)
            if len(waiting) == 1024:
                pool += self._tokens(waiting)
                waiting = []
                if len(pool) >= self.recipe.shuffle_buffer:
                    yield pool
                    pool = []
        pool += self._tokens(waiting)
        if pool:
            yield pool

    def _tokens(self, examples: list[Example]) -> list[TokenizedExample]:
        limit = self.recipe.max_length
        first = self.tokenize.tokenize_plain([e.text for e in examples], max_tokens=limit - len(self.bos_ids))
        second = self.tokenize.tokenize_plain([e.second or "" for e in examples], max_tokens=limit)
        made = []
        for example, ids, more in zip(examples, first, second, strict=True):
            if len(ids) >= self.recipe.min_length and (example.second is None or more):
                texts = (example.text, *([example.second] if example.second else [])) if self.teacher else ()
                made.append(TokenizedExample((*self.bos_ids, *ids), tuple(more), example.kind, texts))
        return made


_PAIRS = (
    ("summary", "context", "summary"),
    ("soft_prompt", "prompt", "answer"),
    ("positive", "anchor", "positive"),  # sentence-transformers' names
)


@dataclass(frozen=True)
class Example:
    """One training text, or a pair of texts."""

    text: str
    second: str | None = None
    """The pair's other text: what to write of ``text`` (summary, soft_prompt), or another view of it (positive)."""
    kind: str = "text"


@dataclass(frozen=True)
class Source:
    """A stream of examples that can be read any number of times, always in the same order.

    Rows hold a text in ``text_column``, or a pair: context and summary, prompt and answer, or anchor and positive.
    """

    name: str
    """A file of rows (`gemify.io.rows`: text, JSON, CSV, TSV, Parquet), or a Hugging Face data set: its name, or a
    directory laid out like one."""
    text_column: str = "text"
    split: str = "train"
    """The part of a data set to read."""
    keep_empty: bool = False
    """Whether a row without text is an example too (row i is then example i) or is skipped."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                "no training data: give --data FILE (.txt, .jsonl, .csv, .parquet) or a Hugging Face data set name"
            )
        path = Path(self.name)
        is_file_name = path.is_absolute() or self.name.count("/") > 1 or has_row_suffix(path)
        if not path.exists() and (is_file_name or path.suffix in COMPRESSIONS):
            raise ValueError(f"no such data file: {self.name}")
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{self.name} is empty: it holds no text to train on")

    def __iter__(self) -> Iterator[Example]:
        if not Path(self.name).is_file():
            rows = self._load_dataset()
        else:
            columns = [self.text_column, *(name for _, *names in _PAIRS for name in names)]
            rows = read_values(self.name, text_column=self.text_column, columns=columns)
        for where, row in rows:
            try:
                example = self._example(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if self.keep_empty or example.second is not None or example.text.strip():
                yield example

    def _load_dataset(self) -> Iterator[tuple[str, Any]]:
        from datasets import load_dataset

        try:
            rows: Iterable[Any] = load_dataset(self.name, split=self.split, streaming=True)
        except Exception as error:
            reason = first_line(error)
            raise ValueError(f"{self.name!r} is neither a file nor a data set that can be loaded: {reason}") from error
        return ((f"{self.name} row {n}", row) for n, row in enumerate(rows, start=1))

    def _example(self, row: dict[str, Any]) -> Example:
        if self.text_column not in row:
            for kind, first, second in _PAIRS:
                if first in row and second in row:
                    return Example(require_text(row, first), require_text(row, second), kind)
        return Example(require_text(row, self.text_column))
