"""Language benchmarks through lm-eval: its stock tasks from the hub, or its prompts over local files.

The prompts are lm-eval's, the rows the file's. Rows are checked, with the line in errors, before lm-eval gets them.

Local files (``--data``), relative to the data directory::

    lm/mmlu/mmlu.jsonl.gz                 subject, split (dev or test), question, choices[4], answer (A-D)
    lm/hellaswag/val.jsonl.gz             ctx, endings[4], gold
    lm/lambada/test.jsonl.gz              text (its last word is the target)
    lm/lm_eval/{arc_easy.test,arc_challenge.test,boolq.val,copa.val,openbookqa.test,piqa.val}.jsonl.gz
                                          query, choices, gold
    lm/lm_eval/{winogrande.val,winograd_wsc.val}.jsonl.gz                context_options, continuation, gold

MMLU is five-shot, scored on the likelihood of the choice's letter; its macro average over subjects is the
"macro_avg/acc_char" of Llama's model cards.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemify.evaluation.mteb_tasks import TASKS
from gemify.io.rows import load_rows
from gemify.io.tables import first_line

HELD_OUT = "held_out"
"""Held-out next-token loss: not a task of lm-eval's, see `gemify.evaluation.models`."""


@dataclass(frozen=True)
class LanguageTask:
    """One cell: a benchmark, or one subject of MMLU."""

    name: str
    group: str
    main: str
    config: dict[str, Any] | str
    """A task configuration for lm-eval, or the name of one of its stock tasks."""
    num_fewshot: int = 0


@dataclass(frozen=True)
class _Local:
    file: str
    columns: dict[str, Any]
    config: dict[str, Any]
    main: str
    stock: str


_TYPES = {"str": str, "list": list, "int": int}
_LOCAL: dict[str, _Local] = {
    name: _Local(**{**task, "columns": {column: _TYPES[kind] for column, kind in task["columns"].items()}})
    for name, task in TASKS["lm_eval"].items()
}
LANGUAGE_TASKS: tuple[str, ...] = (HELD_OUT, "mmlu", *_LOCAL)
_MMLU_FILE = "lm/mmlu/mmlu.jsonl.gz"
_SHOTS = 5


def local_file(name: str) -> str | None:
    """Path of a benchmark's file below the data directory; None if it has none."""
    return _MMLU_FILE if name == "mmlu" else _LOCAL[name].file if name in _LOCAL else None


def make_language_tasks(name: str, data: Path | None) -> list[LanguageTask]:
    """Make the cells of a benchmark: one, or for ``mmlu`` its 57 subjects.

    Args:
        name: One of `LANGUAGE_TASKS`, or with ``data`` None any task of lm-eval's.
        data: Directory of local files; None: lm-eval's own tasks, from the hub.

    Raises:
        ValueError: The name is unknown, or its file is missing.
    """
    if data is None:
        return _stock(name)
    if name == "mmlu":
        return _mmlu(data)
    if name not in _LOCAL:
        raise ValueError(f"unknown local language task {name!r}: choose from {', '.join(LANGUAGE_TASKS)}")
    local = _LOCAL[name]
    if not (data / local.file).is_file():
        raise ValueError(f"{name} needs {data / local.file}, which does not exist: check --data")

    def rows() -> list[dict[str, Any]]:
        read = load_rows(data / local.file, local.columns)
        return [_check_gold({column: row[column] for column in local.columns}, data / local.file) for row in read]

    metrics = ["acc", "acc_norm"] if local.main == "acc_norm" else ["acc"]
    config = {"output_type": "multiple_choice", **local.config, **_common(name, lambda: {"test": rows()}, metrics)}
    return [LanguageTask(name, name, local.main, config)]


def _check_gold(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check that the gold number names one of the choices: lm-eval would fail far from the file."""
    for column in ("choices", "endings", "context_options"):
        if column in row and not (0 <= row["gold"] < len(row[column]) and all(isinstance(c, str) for c in row[column])):
            raise ValueError(f"{path}: gold {row['gold']} names none of the {len(row[column])} {column}: {row}"[:300])
    return row


def _mmlu(data: Path) -> list[LanguageTask]:
    """57 subjects, lm-eval's own MMLU prompt over one local file."""
    path = data / _MMLU_FILE
    if not path.is_file():
        raise ValueError(f"mmlu needs {path}, which does not exist: check --data")
    kinds = {"subject": str, "split": str, "question": str, "choices": list, "answer": str}
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in load_rows(path, kinds):
        texts = all(isinstance(choice, str) for choice in row["choices"])
        if row["answer"] not in ("A", "B", "C", "D") or len(row["choices"]) != 4 or not texts:
            raise ValueError(f"{path}: {row['subject']} has a row without four choices and an answer A-D: mend it")
        chosen = {column: row[column] for column in kinds}
        subjects.setdefault(row["subject"], {}).setdefault(row["split"], []).append(chosen)
    for subject, splits in subjects.items():
        dev, test = (len(splits.get(split, [])) for split in ("dev", "test"))
        if dev < _SHOTS or not test:
            raise ValueError(
                f"{path}: {subject} has {dev} dev and {test} test rows, at least {_SHOTS} and 1 are needed"
            )
    return [_mmlu_subject(subject, splits) for subject, splits in sorted(subjects.items())]


def _mmlu_subject(subject: str, splits: dict[str, list[dict[str, Any]]]) -> LanguageTask:
    topic = " ".join(subject.split("_"))
    config = {
        **copy.deepcopy(TASKS["mmlu"]),
        "description": f"The following are multiple choice questions (with answers) about {topic}.\n\n",
        **_common(f"mmlu_{subject}", lambda: splits, ["acc"]),
    }
    return LanguageTask(f"mmlu_{subject}", "mmlu", "acc", config, num_fewshot=_SHOTS)


def _common(name: str, splits: Callable[[], dict[str, list[dict[str, Any]]]], metrics: list[str]) -> dict[str, Any]:
    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits().items()})

    return {
        "task": name,
        "custom_dataset": load,
        "test_split": "test",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": 1.0},
    }


def _stock(name: str) -> list[LanguageTask]:
    known = task_manager(stock=True)
    if name == "mmlu":
        subjects = sorted(t for t in known.all_subtasks if t.startswith("mmlu_") and t.count("_") >= 1)
        groups = set(known.all_groups) | set(known.all_tags)
        stock = [t for t in subjects if t not in groups and _is_plain_mmlu(known, t)]
        return [LanguageTask(t, "mmlu", "acc", t, num_fewshot=_SHOTS) for t in stock]
    stock_name = _LOCAL[name].stock if name in _LOCAL else name
    if stock_name not in known.all_subtasks:
        raise ValueError(
            f"unknown language task {name!r}: choose from {', '.join(LANGUAGE_TASKS)} or a task (not a group) of"
            " lm-eval's"
        )
    return [LanguageTask(name, name, _LOCAL[name].main if name in _LOCAL else "acc", stock_name)]


@functools.cache
def task_manager(*, stock: bool) -> Any:
    """lm-eval's index of tasks; its own thousands of files are read only where one of them is wanted."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=stock)


def _is_plain_mmlu(known: Any, task: str) -> bool:
    entry = known.task_index[task] if hasattr(known, "task_index") else {}
    path = str(entry.get("yaml_path", "") if isinstance(entry, dict) else getattr(entry, "yaml_path", ""))
    return "/mmlu/default/" in path.replace("\\", "/")


def make_harness(lm: Any, tokenizer: Any, *, batch_size: int = 16) -> Any:
    """lm-eval's ``HFLM`` around a loaded model."""
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=lm, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def run_language_task(harness: Any, task: LanguageTask, *, limit: int | None = None) -> dict[str, Any]:
    """Evaluate one cell: its metrics, and the main one for each document in order."""
    with _quiet():
        from lm_eval.evaluator import evaluate

        results = evaluate(lm=harness, task_dict=_load(task), limit=limit, bootstrap_iters=0, log_samples=True)
    assert results is not None
    (name,) = results["results"]
    metrics = {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if key.endswith(",none") and "stderr" not in key and isinstance(value, int | float)
    }
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return {
        "task": task.name,
        "group": task.group,
        "n": len(samples),
        "metrics": metrics,
        "main": task.main,
        "per_sample": [float(sample[task.main]) for sample in samples],
    }


def _load(task: LanguageTask) -> Any:
    """The task as lm-eval loads it; one of its stock tasks fetches its data here."""
    if isinstance(task.config, str):
        try:
            loaded = task_manager(stock=True).load([task.config])
        except OSError as error:
            raise ValueError(
                f"cannot load {task.name} from the hub ({first_line(error)}): connect, or give --data DIR"
            ) from error
    else:
        loaded = task_manager(stock=False).load([task.config])
    (made,) = loaded["tasks"].values()
    if task.main not in made.aggregation():
        raise ValueError(
            f"{task.name} is not scored by {task.main} but by {', '.join(made.aggregation())}: leave it out"
        )
    if task.num_fewshot:
        made.set_config(key="num_fewshot", value=task.num_fewshot)
    made.set_fewshot_seed(seed=1234)  # lm-eval's default
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs every default it takes and shows a bar for every step; errors come as exceptions."""
    names = ("lm_eval", "lm-eval", "datasets", "httpx")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
