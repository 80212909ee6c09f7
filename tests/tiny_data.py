"""A tiny evaluation data directory with every file that gemify reads, and toy encoders to run over it.

Texts are about topics: words of one topic never occur in another, so what is alike is known without any model.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

TOPICS = {
    "cooking": ["soup", "pan", "onion", "boil", "bake", "oven", "flour", "butter"],
    "sailing": ["mast", "anchor", "harbour", "sail", "tide", "deck", "rope", "keel"],
    "banking": ["loan", "cheque", "teller", "vault", "coin", "ledger", "debt", "branch"],
    "gardens": ["rose", "spade", "seed", "hedge", "compost", "lawn", "petal", "trowel"],
}
NAMES = list(TOPICS)


def text(topic: str, number: int, words: int = 5) -> str:
    """A text of a topic; those of the same number and topic are the same."""
    own = TOPICS[topic]
    return " ".join(own[(number * 3 + at * (number % 5 + 1)) % len(own)] for at in range(words)) + f" {number}"


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read_rows(path: Path) -> list[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sts(count: int = 30, start: int = 0) -> list[dict[str, Any]]:
    """Pairs with 0 to 5 words in common, and scores that follow that only roughly."""
    rows = []
    for at in range(start, start + count):
        words = TOPICS[NAMES[at % 4]]
        same, other = at % 6, TOPICS[NAMES[(at + 1) % 4]]
        rows.append(
            {
                "sentence1": " ".join(words[:5]) + f" {at}",
                "sentence2": " ".join([*words[:same], *other[: 5 - same]]) + f" {at * 7}",
                "score": float(np.clip(same + (at * 13 % 7 - 3) * 0.4, 0, 5)),
            }
        )
    return rows


def labelled(each: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": text(name, n), "label": name} for n in range(start, start + each) for name in NAMES]


def write(directory: Path) -> Path:
    """All of it: ``mteb``, ``lm`` and ``text``."""
    mteb, lm = directory / "mteb", directory / "lm"
    for at, name in enumerate(("STSBenchmark.test", "STSBenchmark.dev", "STS12.test", "STS13.test", "STS14.test")):
        write_rows(mteb / f"sts/{name}.jsonl.gz", sts(start=at))
    for name in ("banking77", "clinc150"):
        write_rows(mteb / name / "train.jsonl.gz", labelled(12))
        write_rows(mteb / name / "test.jsonl.gz", labelled(4, start=20))
    pairs = [
        {"sent1": text(NAMES[n % 4], n), "sent2": text(NAMES[(n + n // 3) % 4], n + 1), "label": int(n // 3 % 4 == 0)}
        for n in range(24)
    ]
    write_rows(mteb / "mrpc/test.jsonl.gz", pairs)
    queries = [
        {
            "query": text(name, 50 + n, words=3),
            "positive": [text(name, n + 2)],
            "negative": [text(other, n + i) for i, other in enumerate(NAMES) if other != name],
        }
        for n, name in enumerate(NAMES * 2)
    ]
    write_rows(mteb / "wikiqa_rerank/test.jsonl.gz", queries)
    for name in ("biomedical_titles", "searchsnippets", "stackoverflow_titles"):
        rows = [{**row, "label": NAMES.index(row["label"]) + 1} for row in labelled(10)]
        write_rows(mteb / f"stc2/{name}.jsonl.gz", rows)
    documents = [
        {"_id": f"D-{name}-{n}", "title": text(name, n, words=2), "text": text(name, n + 9)}
        for name in NAMES
        for n in range(4)
    ]
    write_rows(mteb / "nfcorpus/corpus.jsonl.gz", documents)
    asked = [{"_id": f"Q-{name}", "text": text(name, 77, words=3)} for name in NAMES]
    write_rows(mteb / "nfcorpus/queries.jsonl.gz", [*asked, {"_id": "Q-lost", "text": text("cooking", 5)}])
    lines = [f"Q-{name}\tD-{name}-{n}\t1" for name in NAMES for n in range(4)]
    lines += [f"Q-{name}\tD-unknown-{n}\t2" for name in NAMES for n in range(5)] + ["Q-lost\tD-unknown-1\t1"]
    (mteb / "nfcorpus/qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    write_rows(
        lm / "hellaswag/val.jsonl.gz",
        [{"ctx": text(NAMES[n % 4], n), "endings": [text(t, n, 2) for t in NAMES], "gold": n % 4} for n in range(5)],
    )
    write_rows(lm / "lambada/test.jsonl.gz", [{"text": text(NAMES[n % 4], n)} for n in range(5)])
    solved = [
        {"query": f"Question: {text(NAMES[n % 4], n)}", "choices": [text(t, n, 1) for t in NAMES], "gold": n % 4}
        for n in range(4)
    ]
    write_rows(lm / "lm_eval/arc_easy.test.jsonl.gz", solved)
    (directory / "text").mkdir(parents=True)
    with gzip.open(directory / "text/texts.txt.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{text(NAMES[n % 4], n, 4 + n % 9)}\n" for n in range(60))
    return directory


class Trigrams:
    """Hashed bags of character trigrams, of length 1. Records what it was asked."""

    width = 256

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def one(self, text: str) -> np.ndarray:
        vector = np.zeros(self.width)
        padded = f"  {text} "
        for at in range(len(padded) - 2):
            vector[zlib.crc32(padded[at : at + 3].encode()) % self.width] += 1.0
        return vector / np.linalg.norm(vector)

    def encode(self, inputs: list[str], *, prompt: str | None = None, **_: Any) -> np.ndarray:
        self.asked += [(text, prompt) for text in inputs]
        return np.stack([self.one(text) for text in inputs]).astype(np.float32)

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.asked]


class Topics(Trigrams):
    """Knows the topic of a text and nothing else: one dimension a topic."""

    def one(self, text: str) -> np.ndarray:
        words = set(re.findall(r"[a-z]+", text))
        return np.array([float(bool(words & set(own))) for own in TOPICS.values()])
