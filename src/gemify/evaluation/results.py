"""Where an evaluation keeps what it measured: one small JSON file a cell, written when the cell is finished.

A directory may hold any number of models. What is there is never measured again, so an interrupted evaluation goes on
where it stopped, and a base model is measured once for all that was made of it. Layout::

    DIR/results/<org__name>/<revision>/<Task>.json     embedding tasks, in mteb's own format
    DIR/models/<org__name>/<revision>.json             what the model is (`ModelEntry.facts`)
    DIR/<kind>/<org__name>/<revision>/<task>.json      everything else; kinds: language, recovery, cost, gate
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemify.io.atomic import atomic_file

Kind = Literal["language", "recovery", "cost", "gate"]
KINDS: tuple[Kind, ...] = ("language", "recovery", "cost", "gate")


@dataclass(frozen=True)
class ModelEntry:
    """A model as it is measured: its weights and every setting that a figure depends on."""

    name: str
    """``org/model``, as mteb wants it: ``gem/run1``, ``starter/mean``, ``st/all-MiniLM-L6-v2``, ``starter/base``."""
    revision: str
    """Fingerprint of the weights, then the settings: ``1f3a9c02-float32``, with ``-instructions`` or ``-limit50``."""
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """label, kind (gem, baseline, encoder, base), tune, base, base_name, path, limit, instructions, dtype, ..."""

    def __post_init__(self) -> None:
        if self.name.count("/") != 1 or not re.fullmatch(r"[\w.\-]+", self.revision):
            raise ValueError(
                f"a model entry is named org/model with a plain revision, got {self.name!r} {self.revision!r}"
            )

    @property
    def key(self) -> tuple[str, str]:
        """Name and revision, which no two models share."""
        return self.name, self.revision

    @property
    def folder(self) -> Path:
        """Where its results lie below each kind's directory."""
        return Path(self.name.replace("/", "__")) / self.revision


@dataclass(frozen=True)
class ResultStore:
    """The results in a directory."""

    directory: Path

    def __post_init__(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"cannot keep results in {self.directory}: it is a file, give a directory")

    def path(self, kind: Kind, entry: ModelEntry, task: str) -> Path:
        """Where a cell is kept."""
        return self.directory / kind / entry.folder / f"{task}.json"

    def read(self, kind: Kind, entry: ModelEntry, task: str) -> dict[str, Any] | None:
        """A finished cell, or None; ValueError for a damaged file."""
        return read_json(path) if (path := self.path(kind, entry, task)).is_file() else None

    def write(self, kind: Kind, entry: ModelEntry, task: str, value: Mapping[str, Any]) -> None:
        """Write a finished cell."""
        _write_json(self.path(kind, entry, task), value)

    def register(self, entry: ModelEntry) -> None:
        """Write down what a model is, for the report."""
        _write_json(self._model_file(entry), {"name": entry.name, "revision": entry.revision, **entry.facts})

    def entries(self) -> list[ModelEntry]:
        """Every registered model, in order of name."""
        found = []
        for path in sorted((self.directory / "models").glob("*/*.json")):
            facts = read_json(path)
            found.append(ModelEntry(facts.pop("name"), facts.pop("revision"), facts))
        return found

    def cells(self, kind: Kind, entry: ModelEntry) -> dict[str, dict[str, Any]]:
        """All finished cells of a kind, by task."""
        folder = self.directory / kind / entry.folder
        return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}

    def scores(self, entry: ModelEntry) -> dict[str, dict[str, Any]]:
        """Embedding tasks by name: ``score`` (mteb's main score, times 100) and ``seconds``."""
        scores = {}
        for path in sorted((self.directory / "results" / entry.folder).glob("*.json")):
            if path.stem == "model_meta":
                continue
            result = read_json(path)
            rows = [row for split in result["scores"].values() for row in split]
            scores[path.stem] = {
                "score": 100.0 * sum(row["main_score"] for row in rows) / len(rows),
                "seconds": result.get("evaluation_time"),
            }
        return scores

    def _model_file(self, entry: ModelEntry) -> Path:
        return self.directory / "models" / f"{entry.folder}.json"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of ours; ValueError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete it and evaluate again") from error
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as stage:
        stage.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
