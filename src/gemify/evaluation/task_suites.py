"""The tasks of the suites, and each task's type (``tasks.yaml``): mteb's names and types throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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
