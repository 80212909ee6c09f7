"""The tasks of the suites, and each task's type: mteb's names and types throughout."""

from __future__ import annotations

TYPES = ("STS", "Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "Summarization")
"""Types of mteb's English tasks, in the order they are shown."""

TASK_TYPES: dict[str, str] = {
    task: kind
    for kind, tasks in {
        "Retrieval": ("ArguAna", "ClimateFEVER", "NFCorpus", "SciFact"),
        "Reranking": ("StackOverflowDupQuestions", "SciDocsRR", "WikiQAReranking"),
        "Clustering": (
            "BiorxivClusteringS2S",
            "MedrxivClusteringS2S",
            "TwentyNewsgroupsClustering",
            "STC2Biomedical",
            "STC2SearchSnippets",
            "STC2StackOverflow",
        ),
        "PairClassification": ("SprintDuplicateQuestions", "MRPC"),
        "Classification": (
            "Banking77Classification",
            "Banking77Dev",
            "CLINC150",
            "EmotionClassification",
            "MassiveIntentClassification",
        ),
        "STS": ("STS12", "STS13", "STS14", "STS17", "SICK-R", "STSBenchmark", "STSBenchmarkDev"),
        "Summarization": ("SummEval",),
    }.items()
    for task in tasks
}
"""Types of the tasks gemify knows without asking mteb."""

DEVELOPMENT_TASKS = frozenset({"STSBenchmarkDev", "Banking77Dev"})
"""Splits that settings are chosen on: shown, but in no mean."""

GEM16 = (
    "ArguAna",
    "ClimateFEVER",
    "NFCorpus",
    "SciFact",
    "StackOverflowDupQuestions",
    "SciDocsRR",
    "BiorxivClusteringS2S",
    "MedrxivClusteringS2S",
    "TwentyNewsgroupsClustering",
    "SprintDuplicateQuestions",
    "Banking77Classification",
    "EmotionClassification",
    "MassiveIntentClassification",
    "STS17",
    "SICK-R",
    "STSBenchmark",
)
"""The paper's MTEB subset: its Appendix A says 15 tasks and lists these 16."""

LLM2VEC15 = tuple(task for task in GEM16 if task != "ClimateFEVER")
"""The 15 tasks of LLM2Vec (BehnamGhader et al. 2024), which the paper follows."""

NINE = (
    "ArguAna",
    "NFCorpus",
    "SciFact",
    "Banking77Classification",
    "EmotionClassification",
    "MassiveIntentClassification",
    "STS17",
    "SICK-R",
    "STSBenchmark",
)
"""Nine small tasks of GEM16 for which means of many peers are published, see `report.published.NINE_MEANS`."""

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
