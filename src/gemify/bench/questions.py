"""Questions with the passages that answer them, in SQuAD form: corpus.jsonl and queries.jsonl, plain or .gz."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemify.io.errors import first_line


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    passage: str


def read_questions(directory: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[Question]]:
    """Passages and questions of a directory in SQuAD form: corpus and queries, .jsonl or .jsonl.gz.

    Of the questions, ``limit`` are taken evenly over the file. ValueError names a file or row that does not fit.
    """
    passages = list(_rows(directory, "corpus", ("_id", "text")))
    found = list(_rows(directory, "queries", ("text", "answers", "passage")))
    if odd := [q for q in found if not isinstance(q["answers"], list)]:
        raise ValueError(f"{directory}: answers must be a list of texts, got {str(odd[0]['answers'])[:80]}")
    known = {str(p["_id"]) for p in passages}
    questions = [Question(str(q["text"]), tuple(map(str, q["answers"])), str(q["passage"])) for q in found]
    if lost := [q.passage for q in questions if q.passage not in known]:
        raise ValueError(f"{directory}: the queries name a passage {lost[0]!r} that the corpus has not")
    if limit is not None and limit < len(questions):
        questions = [questions[i * len(questions) // limit] for i in range(limit)]
    return passages, questions


def _rows(directory: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    path = next((p for suffix in (".jsonl", ".jsonl.gz") if (p := directory / f"{name}{suffix}").is_file()), None)
    if path is None:
        raise ValueError(f"{directory} has no {name}.jsonl or {name}.jsonl.gz: give a directory in SQuAD form")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                missing = [c for c in columns if c not in row]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} row {number}: no JSON object ({first_line(error)})") from error
            if missing:
                raise ValueError(f"{path} row {number}: no {missing[0]!r}")
            yield row
