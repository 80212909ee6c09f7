"""Questions with the passages that answer them, in SQuAD form: corpus.jsonl and queries.jsonl, plain or .gz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemify.io.rows import find_row_file, missing_column, read_values


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    passage: str


def read_questions(directory: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[Question]]:
    """Passages and questions of a directory in SQuAD form: corpus and queries, .jsonl or .jsonl.gz.

    Of the questions, ``limit`` are taken evenly over the file. ValueError names a file or row that does not fit.
    """
    passages = _rows(directory, "corpus", ("_id", "text"))
    found = _rows(directory, "queries", ("text", "answers", "passage"))
    if odd := [q for q in found if not isinstance(q["answers"], list)]:
        raise ValueError(f"{directory}: answers must be a list of texts, got {str(odd[0]['answers'])[:80]}")
    known = {str(p["_id"]) for p in passages}
    questions = [Question(str(q["text"]), tuple(map(str, q["answers"])), str(q["passage"])) for q in found]
    if lost := [q.passage for q in questions if q.passage not in known]:
        raise ValueError(f"{directory}: the queries name a passage {lost[0]!r} that the corpus has not")
    if limit is not None and limit < len(questions):
        questions = [questions[i * len(questions) // limit] for i in range(limit)]
    return passages, questions


def _rows(directory: Path, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    path = find_row_file(directory, name)
    if path is None:
        raise ValueError(f"{directory} has no {name}.jsonl (or .csv, .parquet, ...): give a directory in SQuAD form")
    found = []
    for where, values in read_values(path):
        if missing := [column for column in columns if column not in values]:
            raise ValueError(f"{where}: {missing_column(missing[0], values)}")
        found.append(values)
    return found
