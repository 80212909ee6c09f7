"""Embedding tasks: any of mteb's by name, from the hub or from local files, and a few that are local only.

A local task is mteb's own task object whose data come from files; sampling, metrics and result format stay mteb's.
Local files (``--data``), relative to the data directory::

    mteb/sts/{STSBenchmark.test,STSBenchmark.dev,STS12.test,STS13.test,STS14.test}.jsonl.gz   sentence1 sentence2 score
    mteb/{banking77,clinc150}/{train,test}.jsonl.gz                     text label
    mteb/mrpc/test.jsonl.gz                                             sent1 sent2 label
    mteb/wikiqa_rerank/test.jsonl.gz                                    query positive[] negative[]
    mteb/stc2/{biomedical_titles,searchsnippets,stackoverflow_titles}.jsonl.gz       text label
    mteb/nfcorpus/{corpus,queries}.jsonl.gz, qrels.test.tsv             BEIR

``tasks.yaml`` lists the tasks of the suites, each task's type and the local tasks: mteb's names and types throughout.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemify.io.rows import load_lines, load_rows
from gemify.io.tables import first_line

TASKS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
"""The sections of ``tasks.yaml``."""
TYPES: tuple[str, ...] = tuple(TASKS["types"])
"""Types of mteb's English tasks, in the order they are shown."""
TASK_TYPES: dict[str, str] = {task: kind for kind, tasks in TASKS["types"].items() for task in tasks}
"""Types of the tasks gemify knows without asking mteb."""
DEVELOPMENT_TASKS: frozenset[str] = frozenset(TASKS["development"])
"""Splits that settings are chosen on: shown, but in no mean."""
GEM16: tuple[str, ...] = tuple(TASKS["GEM16"])
"""The paper's MTEB subset: its Appendix A says 15 tasks and lists these 16."""
LLM2VEC15: tuple[str, ...] = tuple(task for task in GEM16 if task != "ClimateFEVER")
"""The 15 tasks of LLM2Vec (BehnamGhader et al. 2024), which the paper follows."""
NINE: tuple[str, ...] = tuple(TASKS["NINE"])
"""Nine small tasks of GEM16 for which means of many peers are published, see `report.comparison.NINE_MEANS`."""
SUITES: dict[str, tuple[str, ...]] = {"GEM16": GEM16, "LLM2VEC15": LLM2VEC15, "NINE": NINE}
"""Named suites. Their means are of all their tasks or are not given."""


def task_type(task: str) -> str:
    """The type of a task: from `TASK_TYPES`, else from mteb where it is installed, else ``Other``."""
    if task in TASK_TYPES:
        return TASK_TYPES[task]
    try:
        import mteb

        return str(mteb.get_task(task).metadata.type)
    except (ImportError, KeyError):
        return "Other"


NUMBER = (int, float)


@dataclass(frozen=True)
class LocalTask:
    """How a task is read from files; for one that mteb does not have, also its type, instruction and main score."""

    files: tuple[str, ...]
    read: Callable[[list[Path]], Any]
    """The task's ``dataset`` from its files, in mteb's layout."""
    type: Any = ""
    """mteb's task type, for tasks that are not mteb's own."""
    instruction: str = ""
    main_score: str = ""


def make_task(name: str, data: Path | None, *, limit: int | None = None) -> Any:
    """Make an mteb task that loads its data when it is evaluated.

    Args:
        name: A name mteb knows, or one of `LOCAL_TASKS`.
        data: Directory of local data; None: the hub.
        limit: Use about so many rows (queries, for retrieval). The score is then not comparable.

    Returns:
        An ``AbsTask`` of mteb.

    Raises:
        ValueError: The name is unknown, or a file is not there.
    """
    local = LOCAL_TASKS.get(name)
    if local is not None and data is not None:
        paths = [data / file for file in local.files]
        if missing := [p for p in paths if not p.is_file()]:
            raise ValueError(f"{name} needs {missing[0]}, which does not exist: check --data")
        task = _custom_task(name, local) if local.type else _mteb_task(name)
        load: Callable[[], Any] = lambda: local.read(paths)  # noqa: E731
    elif local is not None and local.type:
        raise ValueError(f"{name} is read from local files only: give --data DIR")
    elif data is not None:
        raise ValueError(
            f"{name} is not among the local tasks ({', '.join(LOCAL_TASKS)}): leave out --data to use the hub"
        )
    else:
        task = _mteb_task(name)
        load = _hub_loader(task)

    def load_data(**_: Any) -> None:
        if not task.data_loaded:
            task.dataset = load()
            if limit is not None:
                task.dataset = _subset(task, limit)
            task.data_loaded = True

    task.load_data = load_data
    return task


def _mteb_task(name: str) -> Any:
    import mteb

    try:
        return mteb.get_task(name, languages=["eng"], exclusive_language_filter=True)
    except KeyError as error:
        raise ValueError(f"unknown task: {str(error.args[0]).removeprefix('KeyError: ')}") from error


def _hub_loader(task: Any) -> Callable[[], Any]:
    original = task.load_data

    def load() -> Any:
        try:
            original()
            if hasattr(task, "convert_v1_dataset_format_to_v2"):
                task.convert_v1_dataset_format_to_v2(num_proc=None)
        except (ConnectionError, OSError) as error:
            raise ValueError(
                f"cannot load {task.metadata.name} from the hub ({first_line(error)}): connect, or give --data DIR"
            ) from error
        task.data_loaded = False
        return task.dataset

    return load


def _custom_task(name: str, local: LocalTask) -> Any:
    """A task of our own on one of mteb's abstract task classes."""
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.clustering import AbsTaskClustering
    from mteb.abstasks.pair_classification import AbsTaskPairClassification
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    parent = {
        "STS": AbsTaskSTS,
        "Classification": AbsTaskClassification,
        "Clustering": AbsTaskClustering,
        "PairClassification": AbsTaskPairClassification,
        "Reranking": AbsTaskRetrieval,
    }[local.type]
    prompt: Any = {"query": local.instruction} if local.type == "Reranking" else local.instruction
    metadata = TaskMetadata(
        name=name,
        description=f"{name}, read from local files.",
        reference=None,
        dataset={"path": local.files[0].removesuffix(".jsonl.gz"), "revision": "local"},
        type=local.type,
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=local.main_score,
        prompt=prompt,
    )
    settings: dict[str, Any] = {"metadata": metadata}
    if local.type == "Clustering":  # sets of 12,000 to 20,000 rows: mteb's own share of 4 % would leave too few
        settings |= {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": 4096}
    return type(name, (parent,), settings)()


# Files -> datasets


def _sts(paths: list[Path]) -> Any:
    from datasets import Dataset

    rows = load_rows(paths[0], {"sentence1": str, "sentence2": str, "score": NUMBER})
    columns = {name: [r[name] for r in rows] for name in ("sentence1", "sentence2")}
    return {"test": Dataset.from_dict({**columns, "score": [float(r["score"]) for r in rows]})}


def _labelled(path: Path) -> list[tuple[str, str]]:
    return [(row["text"], str(row["label"])) for row in load_rows(path, {"text": str, "label": (str, int)})]


def _classification(paths: list[Path]) -> Any:
    return _label_splits(_labelled(paths[0]), _labelled(paths[1]), paths)


def _held_out_classification(paths: list[Path]) -> Any:
    """A split of the training set, to choose settings on: every fourth row of each label is held out."""
    seen: Counter[str] = Counter()
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for text, label in _labelled(paths[0]):
        seen[label] += 1
        (test if seen[label] % 4 == 0 else train).append((text, label))
    return _label_splits(train, test, paths)


def _label_splits(train: list[tuple[str, str]], test: list[tuple[str, str]], paths: list[Path]) -> Any:
    from datasets import Dataset, DatasetDict

    number = {label: at for at, label in enumerate(sorted({label for _, label in train}))}
    if unknown := {label for _, label in test} - set(number):
        raise ValueError(f"{paths[1]}: label {sorted(unknown)[0]!r} does not occur in {paths[0]}")
    made = {}
    for name, rows in (("train", train), ("test", test)):
        columns = {"text": [text for text, _ in rows], "label": [number[label] for _, label in rows]}
        made[name] = Dataset.from_dict(columns)
    return DatasetDict(made)


def _pairs(paths: list[Path]) -> Any:
    from datasets import Dataset

    rows = load_rows(paths[0], {"sent1": str, "sent2": str, "label": int})
    columns = {"sentence1": "sent1", "sentence2": "sent2", "labels": "label"}
    return {"test": Dataset.from_dict({name: [r[old] for r in rows] for name, old in columns.items()})}


def _clustering(paths: list[Path]) -> Any:
    from datasets import Dataset

    rows = _labelled(paths[0])
    return {
        "test": Dataset.from_dict({"sentences": [text for text, _ in rows], "labels": [label for _, label in rows]})
    }


def _reranking(paths: list[Path]) -> Any:
    rows = load_rows(paths[0], {"query": str, "positive": list, "negative": list})
    queries, corpus = [], []
    relevant: dict[str, dict[str, int]] = {}
    ranked: dict[str, list[str]] = {}
    for at, row in enumerate(rows):
        query = f"q{at}"
        queries.append({"id": query, "text": row["query"]})
        relevant[query], ranked[query] = {}, []
        for kind, worth in (("positive", 1), ("negative", 0)):
            if not all(isinstance(text, str) for text in row[kind]):
                raise ValueError(f"{paths[0]} row {at + 1}: {kind!r} must hold texts only: mend or remove the row")
            for number, text in enumerate(row[kind]):
                document = f"{query}-{kind}-{number}"
                corpus.append({"id": document, "title": "", "text": text})
                relevant[query][document] = worth
                ranked[query].append(document)
    return _retrieval_data(queries, corpus, relevant, ranked)


def _beir(paths: list[Path]) -> Any:
    corpus = load_rows(paths[0], {"_id": str, "title": str, "text": str})
    queries = load_rows(paths[1], {"_id": str, "text": str})
    known = {row["_id"] for row in corpus}
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for number, line in load_lines(paths[2]):
        parts = line.split("\t")
        if parts[0] == "query-id":
            continue
        if len(parts) != 3 or not parts[2].lstrip("-").isdigit():
            raise ValueError(f"{paths[2]} row {number}: expected query-id, corpus-id and score, got {line[:60]!r}")
        if parts[1] in known:
            relevant[parts[0]][parts[1]] = int(parts[2])
    if not any(row["_id"] in relevant for row in queries):
        raise ValueError(f"{paths[2]} names no query of {paths[1]} with a document of {paths[0]}: check the files")
    return _retrieval_data(
        [{"id": q["_id"], "text": q["text"]} for q in queries if q["_id"] in relevant],
        [{"id": d["_id"], "title": d["title"], "text": d["text"]} for d in corpus],
        dict(relevant),
        None,
    )


def _retrieval_data(queries: list[Any], corpus: list[Any], relevant: Any, ranked: Any) -> Any:
    from datasets import Dataset

    split = {
        "queries": Dataset.from_list(queries),
        "corpus": Dataset.from_list(corpus),
        "relevant_docs": relevant,
        "top_ranked": ranked,
    }
    return {"default": {"test": split}}


# Subsets


def _subset(task: Any, limit: int) -> Any:
    """The first rows of a shuffled copy of every evaluated split; training rows and distractors are cut to match."""

    def rows(data: Any, count: int) -> Any:
        return data.shuffle(seed=0).select(range(min(count, len(data))))

    def splits(data: Any, *, labels: str | None) -> Any:
        made = {}
        for name, part in data.items():
            if isinstance(part, dict) and "queries" in part:
                made[name] = _subset_retrieval(part, limit)
            elif labels is not None and name == getattr(task, "train_split", None):
                made[name] = _some_of_each(part, labels, task.samples_per_label * 2)
            elif labels is not None:
                made[name] = _many_labels(part.shuffle(seed=0), labels, limit)
            else:
                made[name] = rows(part, limit)
        return made

    label = task.label_column_name if task.metadata.type == "Classification" else None
    if all(isinstance(part, dict) for part in task.dataset.values()):
        return {subset: splits(part, labels=label) for subset, part in task.dataset.items()}
    return type(task.dataset)(splits(task.dataset, labels=label))


def _subset_retrieval(part: Any, limit: int) -> Any:
    queries = part["queries"].select(range(min(limit, len(part["queries"]))))
    relevant = {q: part["relevant_docs"][q] for q in queries["id"] if q in part["relevant_docs"]}
    wanted = {d for documents in relevant.values() for d in documents}
    ranked = part.get("top_ranked")
    if ranked:
        ranked = {q: ranked[q] for q in relevant if q in ranked}
        wanted |= {d for documents in ranked.values() for d in documents}
    others = random.Random(0).sample(range(len(part["corpus"])), min(10 * limit, len(part["corpus"])))
    keep = sorted({at for at, d in enumerate(part["corpus"]["id"]) if d in wanted} | (set() if ranked else set(others)))
    return {"queries": queries, "corpus": part["corpus"].select(keep), "relevant_docs": relevant, "top_ranked": ranked}


def _ranks(values: Iterable[Any]) -> list[int]:
    """How many equal values stand before each."""
    seen: Counter[Any] = Counter()
    ranks = []
    for value in values:
        ranks.append(seen[value])
        seen[value] += 1
    return ranks


def _some_of_each(data: Any, label: str, count: int) -> Any:
    return data.select([at for at, rank in enumerate(_ranks(data[label])) if rank < count])


def _many_labels(data: Any, label: str, count: int) -> Any:
    """Rows of as many labels as possible, three at least: mteb takes two labels for a binary task."""
    ranks = _ranks(data[label])
    return data.select(sorted(range(len(ranks)), key=ranks.__getitem__)[: max(3, count)])


_READERS: dict[str, Callable[[list[Path]], Any]] = {
    "sts": _sts,
    "classification": _classification,
    "held_out_classification": _held_out_classification,
    "pairs": _pairs,
    "clustering": _clustering,
    "reranking": _reranking,
    "beir": _beir,
}
LOCAL_TASKS: dict[str, LocalTask] = {
    name: LocalTask(**{**task, "files": tuple(task["files"]), "read": _READERS[task["read"]]})
    for name, task in TASKS["mteb"].items()
}
"""Tasks that can be read from local files. Those with a ``type`` are not mteb's own."""
