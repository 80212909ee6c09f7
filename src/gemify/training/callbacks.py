"""Callbacks of a run: progress bar, metrics, the score on sentence pairs (STS), stopping on a signal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemify.io.atomic import atomic_file
from gemify.io.rows import load_rows
from gemify.io.signals import StopFlag
from gemify.io.vectors import normalize
from gemify.training.distributed import all_reduce_max

METRICS_FILE = "metrics.jsonl"


class Progress(TrainerCallback):
    """A progress bar with the losses, and one JSON line per step. First process only."""

    def __init__(self, directory: Path, *, show: bool) -> None:
        self.path = directory / METRICS_FILE
        self.show = show
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the outputs. After a resume ``metrics.jsonl`` keeps only the steps before the checkpoint."""
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", disable=not self.show)
        with atomic_file(self.path) as stage:
            stage.write_text("".join(_line(entry) for entry in state.log_history))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write the step's metrics."""
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        with self.path.open("a") as file:
            file.write(_line({**logs, "step": state.global_step}))
        shown = {k: f"{logs[k]:.3g}" for k in ("ntp", "contrastive", "learning_rate", "eval_sts") if k in logs}
        self.bar.set_postfix({"lr" if k == "learning_rate" else k: v for k, v in shown.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class StopOnSignal(TrainerCallback):
    """A signal in any of the run's processes ends the run after the current step, with a checkpoint.

    Attributes:
        stopped: Whether the processes have agreed to stop.
    """

    def __init__(self, flag: StopFlag) -> None:
        self.flag, self.stopped = flag, False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Agree with the other processes whether to stop here."""
        self.stopped = bool(all_reduce_max(int(self.flag.is_set), args.device))
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


def _line(entry: dict[str, Any]) -> str:
    entry = {k: v for k, v in entry.items() if k != "epoch"}  # the Trainer's, meaningless for a stream
    return (
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}) + "\n"
    )


class Encoder(Protocol):
    """Anything that embeds texts as sentence-transformers does."""

    def encode(self, inputs: list[str], *, batch_size: int = 32) -> Any:
        """Return vectors [N, D] of N texts."""
        ...


@dataclass(frozen=True)
class Pair:
    """Two sentences, and how similar people found them."""

    sentence1: str
    sentence2: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from rows with ``sentence1``, ``sentence2`` and ``score``; ValueError if there are fewer than two."""
    rows = load_rows(path, {"sentence1": str, "sentence2": str, "score": (int, float)})
    if len(rows) < 2:
        raise ValueError(f"{path} holds {len(rows)} pair: a correlation needs at least two")
    return [Pair(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


def spearman(encoder: Encoder, pairs: list[Pair], *, batch_size: int = 64) -> float:
    """Return 100 times Spearman's rho of cosine similarities and scores: MTEB's STS metric."""
    texts = [t for p in pairs for t in (p.sentence1, p.sentence2)]
    vectors = normalize(encoder.encode(texts, batch_size=batch_size), dtype=np.float64)
    cosine = (vectors[0::2] * vectors[1::2]).sum(axis=1)
    return float(100.0 * spearmanr(cosine, [p.score for p in pairs]).statistic)
