"""The base model writes the second view of a text itself: paraphrases, questions and search words for contrast.

A text with some tokens deleted is a poor second view: telling it from other texts is soon too easy to teach anything.
A model that writes can do better, from unlabelled text alone. Each task below asks the base for one short piece of text
about a given one; the two become a pair (``anchor``, ``positive``) for `gemify train`. Departs from GEM, Section 3.3,
which drops tokens; docs/log/ has the figures of both.

    paraphrase  the same in other words               sentence and sentence
    question    a question that the text answers      query and passage
    keywords    what one would type to find it        query and passage
"""

from __future__ import annotations

import json
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
from gemify.model.batching import length_groups
from gemify.model.forward import left_pad, text_pass
from gemify.model.kv_cache import select
from gemify.training.data import Source

_BLOCK = 1024  # texts written about between two saves
_HERE = "\N{OBJECT REPLACEMENT CHARACTER}"  # where the text stands in a chat template

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
    """One thing to ask for. ``chat``: the request to a chat model (none: shown by examples, as to a base model)."""

    name: str
    label: str
    chat: str | None
    shortest: float
    """Shortest and longest piece of writing to keep, in characters as a share of the text's."""
    longest: float
    most_tokens: int

    def limit(self, tokens: int) -> int:
        """Most tokens to write about a text of so many."""
        return min(self.most_tokens, round(tokens * self.longest) + 4)


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
    """All that decides what is written: a run that was stopped goes on only with the same."""

    base: str
    data: str
    tasks: tuple[str, ...] = ("paraphrase",)
    count: int = 10_000
    """Texts to read; each task writes about each of them."""
    skip: int = 0
    """Texts to leave out at the beginning of the data."""
    min_length: int = 8
    max_length: int = 64
    """Texts with fewer or more tokens are left out."""
    text_column: str = "text"

    def __post_init__(self) -> None:
        if unknown := [t for t in self.tasks if t not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r}: choose from {', '.join(TASKS)}")
        if not self.tasks:
            raise ValueError(f"no task given: choose from {', '.join(TASKS)}")
        for name, least in (("count", 1), ("skip", 0), ("min_length", 1), ("max_length", self.min_length)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class PairGenerator:
    """Asks a language model for one task about many texts. The part of the request before the text runs once."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
        self.lm, self.tokenizer, self.task = lm, tokenizer, task
        self.by_chat = bool(task.chat and tokenizer.chat_template)
        before, after = self._request()
        # A space before the text belongs to its first word's token.
        self._lead = " " if before.endswith(" ") else ""
        self.before_ids = self._ids(before.removesuffix(" "))
        self.after_ids = self._ids(after)
        ends = lm.generation_config.eos_token_id
        self.end_ids: list[int] = [*ends] if isinstance(ends, list) else [] if ends is None else [ends]
        if not self.by_chat:  # shown by examples: what is asked for ends with its line
            tokens = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            self.end_ids += [i for i, token in enumerate(tokens) if "\n" in token]

    def _request(self) -> tuple[str, str]:
        if self.by_chat:
            assert self.task.chat is not None
            messages = [{"role": "user", "content": self.task.chat.format(_HERE)}]
            asked: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, after = asked.split(_HERE)
            return before, after
        shots = "".join(f"Text: {text}\n{self.task.label}: {said[self.task.name]}\n\n" for text, said in _SHOTS)
        return f"{shots}Text: ", f"\n{self.task.label}:"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], *, max_tokens: int = 16_384) -> Iterator[tuple[int, str, bool]]:
        """(place in ``texts``, what was written, whether it came to its end), in order of length."""
        rows = [self._ids(self._lead + t) + self.after_ids for t in texts] if texts else []
        device = self.lm.device
        head_1T, mask_1T = left_pad([self.before_ids])
        head = text_pass(self.lm, head_1T.to(device), mask_1T.to(device)).cache
        limits = [self.task.limit(len(r) - len(self.after_ids)) for r in rows]
        lengths = [len(self.before_ids) + len(r) + limits[i] for i, r in enumerate(rows)]
        # Writing a token costs reading all weights: large groups, though they hold more padding.
        for group in length_groups(lengths, max_tokens=max_tokens, pass_overhead_tokens=512):
            ids_BT, mask_BT = left_pad([rows[i] for i in group])
            ids_BT = torch.cat([head_1T.expand(len(group), -1), ids_BT], dim=1).to(device)
            mask_BT = torch.cat([mask_1T.expand(len(group), -1), mask_BT], dim=1).to(device)
            written_BT = self.lm.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT.long(),
                past_key_values=select(head, [0] * len(group)),
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
    """Whether a piece of writing can teach anything: whole, not the text again, of fit length, and about the text."""
    text = text.strip()
    if not ended or not written or written == text or "\n" in written:
        return False
    if not task.shortest * len(text) <= len(written) <= task.longest * len(text):
        return False
    return not _words(text).isdisjoint(_words(written))


def _words(text: str) -> set[str]:
    """Words of some weight: of four letters or more, in lower case."""
    return set(re.findall(r"\w{4,}", text.lower()))


def write_pairs(
    order: PairConfig,
    output: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    precision: str = "auto",
    show_progress_bar: bool = True,
) -> dict[str, int]:
    """Write ``output`` (JSON lines: anchor, positive, task) and return how many pairs of each task it holds.

    Until all is written the rows are in ``output.part``, saved every 1,024 texts; ``resume`` goes on from there.
    """
    part = output.with_name(output.name + ".part")
    if output.suffix != ".jsonl":
        raise ValueError(f"cannot write pairs to {output}: give a name that ends in .jsonl")
    if output.exists():
        raise ValueError(f"{output} exists: choose another name")
    source = Source(order.data, order.text_column)
    done = _done(part, order, resume=resume)
    bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and device != "cpu")
    lm, tokenizer = load_base(order.base, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    writers = [PairGenerator(lm, tokenizer, TASKS[name]) for name in order.tasks]
    texts = islice(_texts(source, tokenizer, order), order.skip, order.skip + order.count)
    if next(islice(texts, done - 1, None) if done else iter([""]), None) is None:
        raise ValueError(f"{order.data} holds fewer texts than {part} has: it is not the data of that run")
    if not part.exists():  # only now: a base or data that cannot be read leaves nothing behind
        _append(part, [{"order": asdict(order)}])
    with tqdm(
        total=order.count * len(writers), initial=done * len(writers), unit="piece", disable=not show_progress_bar
    ) as bar:
        while block := list(islice(texts, _BLOCK)):
            rows = []
            for writer in writers:
                for at, written, ended in writer(block):
                    if passes_filter(writer.task, block[at], written, ended):
                        rows.append({"anchor": block[at], "positive": written, "task": writer.task.name})
                    bar.update()
            done += len(block)
            _append(part, [*rows, {"done": done}])
    if not done:
        part.unlink()
        raise ValueError(
            f"{order.data} holds no text of {order.min_length} to {order.max_length} tokens after the first {order.skip}"
        )
    return _finish(part, output, order)


def _texts(source: Source, tokenizer: PreTrainedTokenizerBase, order: PairConfig) -> Iterator[str]:
    for example in source:
        text = example.text.strip()
        if order.min_length <= len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= order.max_length:
            yield text


def _done(part: Path, order: PairConfig, *, resume: bool) -> int:
    """How many texts an earlier run is done with; rows of an unfinished block are cut off."""
    if not part.exists():
        return 0
    if not resume:
        raise ValueError(f"{part} exists: add --resume to go on with it, or choose another --output")
    lines = part.read_bytes().split(b"\n")
    before = json.loads(lines[0])["order"]
    now = json.loads(json.dumps(asdict(order)))
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


def _finish(part: Path, output: Path, order: PairConfig) -> dict[str, int]:
    counts = dict.fromkeys(order.tasks, 0)
    with atomic_file(output) as stage, stage.open("w", encoding="utf-8") as file:
        for line in part.read_text(encoding="utf-8").split("\n"):  # not splitlines: a text may hold U+2028
            if line.startswith('{"anchor"'):
                counts[json.loads(line)["task"]] += 1
                file.write(line + "\n")
    part.unlink()
    return counts
