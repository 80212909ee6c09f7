"""Contrastive pairs that a language model writes: paraphrases, questions and search words of plain texts.

A text with some tokens deleted is a poor second view: it is soon too easy to tell from other texts. A model that writes
can do better, from unlabelled text alone. Each task below asks the base for one short text about a given one; the two
become a pair (``anchor``, ``positive``) for `gemify train`. Departs from GEM, Section 3.3,
which drops tokens; docs/log/ has the figures of both.

    paraphrase  the same in other words               sentence and sentence
    question    a question that the text answers      query and passage
    keywords    what one would type to find it        query and passage
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemify.io.atomic import atomic_file, sync
from gemify.model.base import load_base
from gemify.model.forward import left_pad, length_groups, text_pass
from gemify.model.kv_cache import cache_argument, select
from gemify.training.examples import Source

logger = logging.getLogger(__name__)

_BLOCK = 1024  # texts between two saves
_PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the text in a chat template

_SHOTS = (
    (
        "The company was founded in 1984 by two engineers who wanted to build cheaper radios.",
        {
            "paraphrase": "Two engineers, hoping to make radios less expensive, started the firm in 1984.",
            "question": "who founded the company and why?",
            "keywords": "history of cheap radio company",
        },
    ),
    (
        "Penguins keep their eggs warm by balancing them on their feet under a fold of skin.",
        {
            "paraphrase": "To stop an egg from getting cold, a penguin holds it on its feet, covered by skin.",
            "question": "how do penguins keep their eggs warm?",
            "keywords": "penguin egg incubation",
        },
    ),
)


@dataclass(frozen=True)
class Task:
    """One kind of text to ask for."""

    name: str
    label: str
    """What stands before the answer in the examples."""
    chat: str | None
    """The request to a chat model. None: shown by examples, as to a base model."""
    min_ratio: float
    """Shortest answer to keep, in characters of the text's."""
    max_ratio: float
    """Longest answer to keep, in characters of the text's."""
    max_new_tokens: int

    def limit(self, tokens: int) -> int:
        """Return the most tokens to write about a text of ``tokens`` tokens."""
        return min(self.max_new_tokens, round(tokens * self.max_ratio) + 4)


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("paraphrase", "In other words", "Paraphrase: {}", 0.4, 1.2, 128),
        Task("question", "Question", None, 0.05, 0.9, 24),
        Task("keywords", "Search words", None, 0.02, 0.6, 12),
    )
}


@dataclass(frozen=True)
class PairConfig:
    """Everything that decides which pairs are written. A stopped run resumes only with the same values."""

    base: str
    """The model that writes: a directory, a repo id, a GGUF file or ``starter``."""
    data: str
    """A file of rows or a Hugging Face data set (`gemify.training.examples.Source`)."""
    tasks: tuple[str, ...] = ("paraphrase",)
    count: int = 10_000
    """Texts to read; each task writes about each of them."""
    skip: int = 0
    """Texts to leave out at the beginning of the data."""
    min_length: int = 8
    max_length: int = 64
    """Texts with fewer or more tokens are left out."""
    text_column: str = "text"
    skip_bad: bool = False
    """Leave malformed rows out."""

    def __post_init__(self) -> None:
        if unknown := [t for t in self.tasks if t not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r}: choose from {', '.join(TASKS)}")
        if not self.tasks:
            raise ValueError(f"no task given: choose from {', '.join(TASKS)}")
        for name, least in (("count", 1), ("skip", 0), ("min_length", 1), ("max_length", self.min_length)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class PairGenerator:
    """Asks a language model for one task about many texts. The request's part before the text runs once."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
        self.lm, self.tokenizer, self.task = lm, tokenizer, task
        self.by_chat = bool(task.chat and tokenizer.chat_template)
        prefix, suffix = self._request()
        # A space before the text belongs to its first word's token.
        self._lead = " " if prefix.endswith(" ") else ""
        self.prefix_ids = self._ids(prefix.removesuffix(" "))
        self.suffix_ids = self._ids(suffix)
        ends = lm.generation_config.eos_token_id
        self.end_ids: list[int] = [*ends] if isinstance(ends, list) else [] if ends is None else [ends]
        if not self.by_chat:  # shown by examples: what is asked for ends with its line
            tokens = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            self.end_ids += [i for i, token in enumerate(tokens) if "\n" in token]

    def _request(self) -> tuple[str, str]:
        if self.by_chat:
            assert self.task.chat is not None
            messages = [{"role": "user", "content": self.task.chat.format(_PLACEHOLDER)}]
            asked: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prefix, suffix = asked.split(_PLACEHOLDER)
            return prefix, suffix
        shots = "".join(f"Text: {text}\n{self.task.label}: {said[self.task.name]}\n\n" for text, said in _SHOTS)
        return f"{shots}Text: ", f"\n{self.task.label}:"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], *, max_tokens: int = 16_384) -> Iterator[tuple[int, str, bool]]:
        """Write about each text, in order of length.

        Args:
            texts: The texts.
            max_tokens: Most tokens of a batch, padding included.

        Yields:
            The text's index, what was written, and whether it came to its end.
        """
        rows = [self._ids(self._lead + t) + self.suffix_ids for t in texts] if texts else []
        device = self.lm.device
        prefix_1T, mask_1T = left_pad([self.prefix_ids])
        cache = text_pass(self.lm, prefix_1T.to(device), mask_1T.to(device)).cache
        limits = [self.task.limit(len(r) - len(self.suffix_ids)) for r in rows]
        lengths = [len(self.prefix_ids) + len(r) + limits[i] for i, r in enumerate(rows)]
        # Writing a token costs reading all weights: large groups, though they hold more padding.
        for group in length_groups(lengths, max_tokens=max_tokens, pass_overhead_tokens=512):
            ids_BT, mask_BT = left_pad([rows[i] for i in group])
            ids_BT = torch.cat([prefix_1T.expand(len(group), -1), ids_BT], dim=1).to(device)
            mask_BT = torch.cat([mask_1T.expand(len(group), -1), mask_BT], dim=1).to(device)
            written_BT = self.lm.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT.long(),
                **cache_argument(select(cache, [0] * len(group))),
                max_new_tokens=max(limits[i] for i in group),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                eos_token_id=self.end_ids,
            )[:, ids_BT.shape[1] :]
            for i, row in zip(group, written_BT.tolist(), strict=True):
                yield i, *self._read(row)

    def _read(self, row: list[int]) -> tuple[str, bool]:
        ended = not set(self.end_ids).isdisjoint(row)
        text = str(self.tokenizer.decode(row, skip_special_tokens=True))
        return (text if self.by_chat else text.split("\n")[0]).strip(), ended


def passes_filter(task: Task, text: str, written: str, ended: bool) -> bool:
    """Return whether an answer makes a useful pair: complete, not the text itself, of fitting length, about the text.

    Args:
        task: What was asked for.
        text: The text.
        written: The answer.
        ended: Whether the answer came to its end.
    """
    text = text.strip()
    if not ended or not written or written == text or "\n" in written:
        return False
    if not task.min_ratio * len(text) <= len(written) <= task.max_ratio * len(text):
        return False
    return not _words(text).isdisjoint(_words(written))


def _words(text: str) -> set[str]:
    """Words of some weight: of four letters or more, in lower case."""
    return set(re.findall(r"\w{4,}", text.lower()))


def write_pairs(
    config: PairConfig,
    output: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    precision: str = "auto",
    show_progress_bar: bool = True,
) -> dict[str, int]:
    """Write pairs for contrast to a file of JSON lines (anchor, positive, task).

    Until all is written the rows are in ``OUTPUT.part``, saved every 1,024 texts.

    Args:
        config: What to write.
        output: The .jsonl file.
        resume: Go on from ``OUTPUT.part``.
        device: Where the model runs. None: the accelerator if there is one.
        precision: ``auto``, ``fp32`` or ``bf16``.
        show_progress_bar: Show a progress bar on stderr.

    Returns:
        How many pairs of each task the file holds.

    Raises:
        ValueError: The file exists, the data is too short, or the run to resume had other values.
    """
    part = output.with_name(output.name + ".part")
    if output.suffix != ".jsonl":
        raise ValueError(f"cannot write pairs to {output}: give a name that ends in .jsonl")
    if output.exists():
        raise ValueError(f"{output} exists: choose another name")
    source = Source(config.data, config.text_column, skip_bad=config.skip_bad)
    done = _done(part, config, resume=resume)
    bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and device != "cpu")
    lm, tokenizer = load_base(config.base, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    generators = [PairGenerator(lm, tokenizer, TASKS[name]) for name in config.tasks]
    texts = islice(_texts(source, tokenizer, config), config.skip, config.skip + config.count)
    if next(islice(texts, done - 1, None) if done else iter([""]), None) is None:
        raise ValueError(f"{config.data} holds fewer texts than {part} has: it is not the data of that run")
    if not part.exists():  # only now: a base or data that cannot be read leaves nothing behind
        _append(part, [{"order": asdict(config)}])
    with tqdm(
        total=config.count * len(generators),
        initial=done * len(generators),
        unit="piece",
        disable=not show_progress_bar,
    ) as bar:
        while block := list(islice(texts, _BLOCK)):
            rows = []
            for generator in generators:
                for at, written, ended in generator(block):
                    if passes_filter(generator.task, block[at], written, ended):
                        rows.append({"anchor": block[at], "positive": written, "task": generator.task.name})
                    bar.update()
            done += len(block)
            _append(part, [*rows, {"done": done}])
    if not done:
        part.unlink()
        raise ValueError(
            f"{config.data} holds no text of {config.min_length} to {config.max_length} tokens after the first"
            f" {config.skip}"
        )
    return _finish(part, output, config, source)


def _texts(source: Source, tokenizer: PreTrainedTokenizerBase, config: PairConfig) -> Iterator[str]:
    for example in source:
        text = example.text.strip()
        if config.min_length <= len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= config.max_length:
            yield text


def _done(part: Path, config: PairConfig, *, resume: bool) -> int:
    """How many texts an earlier run has finished; rows of an unfinished block are dropped."""
    if not part.exists():
        return 0
    if not resume:
        raise ValueError(f"{part} exists: add --resume to go on with it, or choose another --output")
    lines = part.read_bytes().split(b"\n")
    before = {"skip_bad": False, **json.loads(lines[0])["order"]}
    now = json.loads(json.dumps(asdict(config)))
    if changed := [name for name in now if now[name] != before.get(name)]:
        raise ValueError(
            f"cannot resume with other settings: {changed[0]} was {before.get(changed[0])!r}, is {now[changed[0]]!r}"
        )
    last = max((n for n, line in enumerate(lines) if line.startswith(b'{"done"')), default=0)
    with part.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[: last + 1]))
    return int(json.loads(lines[last]).get("done", 0))


def _append(part: Path, rows: list[dict[str, Any]]) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    sync(part)


def _finish(part: Path, output: Path, config: PairConfig, source: Source) -> dict[str, int]:
    if source.skipped:
        logger.warning("skipped %s malformed rows, the first: %s", f"{source.skipped:,}", source.first_bad)
    counts = dict.fromkeys(config.tasks, 0)
    with atomic_file(output) as stage, stage.open("w", encoding="utf-8") as file:
        for line in part.read_text(encoding="utf-8").split("\n"):  # not splitlines: a text may hold U+2028
            if line.startswith('{"anchor"'):
                counts[json.loads(line)["task"]] += 1
                file.write(line + "\n")
    part.unlink()
    return counts
