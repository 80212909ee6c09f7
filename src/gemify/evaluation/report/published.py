"""Figures others published, as plain data: the GEM paper's tables and peers' scores.

Nothing here was measured by gemify. The paper is Zhang et al., "GEM: Empowering LLM for both Embedding Generation and
Language Understanding", arXiv 2506.04344v1; scores are percentages, task names and types are mteb's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """A row as printed. None: the paper gives no figure (or says "none" or "n/a")."""

    label: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PaperTable:
    """A table of arXiv 2506.04344v1, in percent."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    def value(self, label: str, column: str) -> float | None:
        """The figure in a row and a column; ValueError for names the table does not have."""
        labels = tuple(row.label for row in self.rows)
        if label not in labels or column not in self.columns:
            raise ValueError(
                f"table {self.number} has no {label!r}, {column!r}: its rows are {', '.join(labels)},"
                f" its columns {', '.join(self.columns)}"
            )
        return self.rows[labels.index(label)].values[self.columns.index(column)]


_SUBSET = ("MTEB subset", "MMLU")

TABLES: dict[str, PaperTable] = {
    "table1": PaperTable(
        1,
        "Mean by task type over MTEB's 56 English tasks, and MMLU",
        (
            "Clustering",
            "Reranking",
            "PairClassification",
            "STS",
            "Retrieval",
            "Summarization",
            "Classification",
            "MMLU",
        ),
        (
            PaperRow("Llama-3.2-1B, mean-pooled", (23.11, 33.90, 29.89, 33.32, 4.38, 23.50, 40.26, 31.70)),
            PaperRow("GEM Llama-3.2-1B", (40.59, 53.34, 64.88, 68.42, 30.10, 25.60, 58.78, 28.36)),
            PaperRow("Llama-3.2-3B", (25.31, 39.67, 35.57, 33.28, 8.16, 20.36, 35.99, 58.00)),
            PaperRow("GEM Llama-3.2-3B", (42.68, 63.41, 78.14, 74.91, 38.14, 24.73, 63.19, 54.30)),
            PaperRow("Llama-3-8B", (25.57, 42.80, 42.53, 40.50, 11.86, 24.37, 41.36, 66.70)),
            PaperRow("GEM Llama-3-8B", (41.58, 60.10, 77.95, 69.00, 34.08, 31.11, 66.30, 57.24)),
            PaperRow("Mistral-7B", (25.74, 43.12, 38.71, 36.41, 10.64, 23.84, 42.14, 44.40)),
            PaperRow("GEM Mistral-7B", (32.53, 55.56, 67.59, 67.95, 26.53, 29.36, 56.92, 36.20)),
            PaperRow("LLM2Vec (unsup.) Sheared-Llama-1.3B", (37.45, 47.70, 72.21, 71.61, 25.93, 31.23, 67.67, None)),
            PaperRow("LLM2Vec (unsup.) Llama-3-8B", (41.00, 53.09, 87.80, 83.58, 39.19, 30.94, 71.88, None)),
            PaperRow("LLM2Vec (unsup.) Mistral-7B", (40.63, 53.99, 80.94, 78.50, 38.05, 30.19, 74.07, None)),
            PaperRow("Echo Mistral-7B", (36.78, 51.07, 75.87, 73.60, 22.68, 29.56, 72.69, None)),
            PaperRow("GritLM-7B (supervised)", (50.60, 60.50, 87.20, 83.40, 57.40, 30.40, 79.50, 57.60)),
        ),
    ),
    "table2": PaperTable(
        2,
        "Share p of raw rows (Llama-3.2-1B, next-token prediction only)",
        _SUBSET,
        (
            PaperRow("0.0", (41.24, 26.08)),
            PaperRow("0.2", (41.10, 26.72)),
            PaperRow("0.4", (37.74, 27.01)),
            PaperRow("0.6", (45.98, 27.24)),
            PaperRow("0.8", (48.11, 27.72)),
            PaperRow("0.9", (44.71, 27.50)),
            PaperRow("0.95", (40.23, 28.58)),
            PaperRow("0.99", (27.74, 29.77)),
        ),
    ),
    "table3": PaperTable(
        3,
        "What each objective adds (Llama-3.2-1B)",
        _SUBSET,
        (
            PaperRow("vanilla", (18.29, 31.7)),
            PaperRow("+ mixed NTP", (48.11, 27.72)),
            PaperRow("+ contrastive", (54.35, 28.36)),
        ),
    ),
    "table4": PaperTable(
        4,
        "Number of special tokens (Llama-3.2-1B)",
        _SUBSET,
        (
            PaperRow("1", (54.35, 28.36)),
            PaperRow("2", (54.67, 28.48)),
            PaperRow("5", (55.88, 29.81)),
            PaperRow("10", (56.12, 28.78)),
        ),
    ),
    "table5": PaperTable(
        5,
        "Size of the Llama model, before and after",
        ("MTEB subset, vanilla", "MTEB subset, GEM", "MMLU, vanilla", "MMLU, GEM"),
        (
            PaperRow("1B", (18.29, 54.35, 31.7, 28.3)),
            PaperRow("3B", (21.60, 59.06, 58.0, 54.30)),
            PaperRow("8B", (26.67, 54.48, 66.7, 57.24)),
        ),
    ),
}
"""Tables 1 to 5 of arXiv 2506.04344v1, "table1" to "table5"."""

PAPER_ROWS = ("Llama-3.2-1B, mean-pooled", "GEM Llama-3.2-1B", "LLM2Vec (unsup.) Sheared-Llama-1.3B")
"""The rows of table 1 nearest in size to what is measured here."""

PEERS: dict[str, dict[str, float]] = {
    "LLM2Vec (unsup.) Sheared-LLaMA-1.3B": {
        "STSBenchmark": 73.4,
        "Banking77Classification": 79.0,
        "NFCorpus": 15.7,
    },
    "potion-base-8M": {"STSBenchmark": 75.4, "Banking77Classification": 72.6, "NFCorpus": 24.3},
    "all-MiniLM-L6-v2": {"STSBenchmark": 82.0, "Banking77Classification": 80.0, "NFCorpus": 31.6},
}
"""Peers' published MTEB scores, by task."""

NINE_MEANS: dict[str, float] = {
    "Mistral-7B, mean-pooled": 48.0,
    "M2V-glove (a lookup table)": 54.7,
    "LLM2Vec (unsup.) Sheared-LLaMA-1.3B": 57.1,
    "potion-base-8M": 58.3,
    "all-MiniLM-L6-v2": 64.6,
    "LLM2Vec (unsup.) Mistral-7B": 65.8,
    "bge-small": 69.2,
}
"""Means over `NINE` of peers' published MTEB scores."""
