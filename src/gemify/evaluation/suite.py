"""`evaluate`: measure a model on both sides, cell by cell, with its base and any baselines.

A cell is one model on one task. Finished cells are kept in the output directory and never run again; a cell that fails
leaves the others alone.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from tqdm.auto import tqdm

from gemify.evaluation.baselines import BASELINES, Baseline
from gemify.evaluation.cost import estimate_language_tokens, estimate_vector_tokens, measure_encoding_cost
from gemify.evaluation.lm_eval_prefix_cache import share_prefixes
from gemify.evaluation.lm_eval_tasks import (
    HELD_OUT,
    LANGUAGE_TASKS,
    LanguageTask,
    make_harness,
    make_language_tasks,
    run_language_task,
)
from gemify.evaluation.models import (
    EvalModels,
    EvalSettings,
    compare_logits,
    compute_text_losses,
    encoder_entry,
    load_encoder,
    numerics_signature,
)
from gemify.evaluation.mteb_runner import is_finished, run_task
from gemify.evaluation.mteb_tasks import GEM16, LLM2VEC15, LOCAL_TASKS, make_task
from gemify.evaluation.recovery import attack_vectors, measure_recovery, select_texts_by_length
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.io.rows import load_lines
from gemify.io.tables import first_line
from gemify.model.quantization import parse_quantization

logger = logging.getLogger(__name__)

SUITES = ("quick", "gem16", "llm2vec15", "mteb", "lm", "all")
_LANGUAGE = (HELD_OUT, "mmlu", "hellaswag", "lambada", "arc_easy", "arc_challenge", "piqa", "winogrande")
_HELD_OUT_TEXTS = 500
_COST_TEXTS = 256


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    vectors: tuple[str, ...] = ()
    """Embedding tasks, by mteb's names or ours (`LOCAL_TASKS`)."""
    language: tuple[str, ...] = ()
    """Language benchmarks (`LANGUAGE_TASKS`, or any of lm-eval's from the hub)."""
    recovery: int = 0
    """Texts to recover from their special tokens (GEM, Appendix B)."""
    cost: bool = False
    attack: bool = False
    """Also guess texts from their vectors alone."""
    prompts: int = 0
    """Prompts on which the logits of GEM and base are compared bit for bit."""
    language_limit: int | None = None
    """First rows of each language benchmark; its cells are named so, and never taken for the whole."""

    @staticmethod
    def of(suite: str, *, data: Path | None, tasks: Sequence[str] = ()) -> Plan:
        """The plan of a named suite.

        Args:
            suite: One of `SUITES`.
            data: Directory of local data: all embedding tasks are then those that it holds; None: mteb's English ones.
            tasks: Names of tasks that replace the suite's.

        Raises:
            ValueError: The suite is unknown.
        """
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
        if tasks:
            language = tuple(t for t in tasks if t in LANGUAGE_TASKS)
            return Plan(tuple(t for t in tasks if t not in language), language)
        if suite == "quick":
            vectors = ("STSBenchmark", "Banking77Classification")
            language = (HELD_OUT, "hellaswag", "lambada", "arc_easy")
            return Plan(vectors, language, recovery=50, cost=True, prompts=20, language_limit=100)
        if suite in ("gem16", "llm2vec15"):
            return Plan(GEM16 if suite == "gem16" else LLM2VEC15)
        if suite == "lm":
            return Plan((), _LANGUAGE, prompts=200)
        everything = tuple(LOCAL_TASKS) if data is not None else _english_mteb()
        if suite == "mteb":
            return Plan(everything)
        return Plan(everything, _LANGUAGE, recovery=200, cost=True, attack=True, prompts=200)


@dataclass(frozen=True)
class _Cell:
    """One model on one task."""

    title: str
    tokens: float
    """About how many tokens it takes: for the estimate and the progress bar only."""
    done: Callable[[], bool]
    run: Callable[[], Any]


def evaluate(
    model: str | None,
    *,
    plan: Plan,
    output: Path,
    data: Path | None = None,
    baselines: Sequence[str] = (),
    encoders: Sequence[str] = (),
    base: str | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    device: str | None = None,
    instructions: bool = False,
    batch_size: int = 64,
    show_progress_bar: bool = True,
    on_estimate: Callable[[int, int, float], None] | None = None,
) -> list[ModelEntry]:
    """Measure what is not yet measured of a GEM, its base, baselines and other encoders.

    Args:
        model: A GEM's directory or repo id; None: only baselines of ``base`` and other encoders.
        plan: What is measured.
        output: Directory of the results. What it holds is not measured again.
        data: Directory of local data (see `mteb_tasks`, `lm_eval_tasks`); None: the hub.
        baselines: Names from `BASELINES`: embeddings of the base model by other methods.
        encoders: Sentence-transformers models, as ``st:PATH`` or ``st:NAME``.
        base: The base model, where it is not the one that the GEM names.
        limit: Rows of every task: a subset run, marked so everywhere.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        quantize: ``int8``, ``int4`` or ``nf4`` weights of the GEM and its base, in bfloat16.
        device: Of the models; None: the best there is.
        instructions: Put each embedding task's instruction before its texts.
        batch_size: Most texts of a batch.
        show_progress_bar: Show a bar on stderr.
        on_estimate: Called before the start with the cells to run, all cells, and about how many seconds it will take.

    Returns:
        The models that were measured, the GEM first.

    Raises:
        ValueError: Names are unknown or files missing, before anything runs; or, at the end, how many cells failed and
            why the first did. What is finished is kept: the same call goes on from there.
    """
    data = _data_root(data)
    settings = EvalSettings(dtype, instructions, limit, parse_quantization(quantize))
    if unknown := [b for b in baselines if b not in get_args(Baseline)]:
        raise ValueError(f"unknown baseline {unknown[0]!r}: choose from {', '.join(BASELINES)}")
    store = ResultStore(output)
    for name in plan.vectors:
        make_task(name, data)  # names and files are checked before anything is computed
    models = None
    if model is not None or base is not None or baselines or not encoders:
        models = EvalModels(model, base=base, settings=settings, device=device)
    planner = _Planner(plan, store, data, settings, batch_size, device)
    if models is not None:
        planner.add_models(models, baselines)  # type: ignore[arg-type]
    for spec in encoders:
        planner.add_encoder(spec)
    if not planner.cells:
        raise ValueError("nothing to measure: the suite has no task for these models (--base alone needs --baselines)")
    if data is not None and planner.reads_texts:
        planner.text_file()
    for entry in planner.entries:
        store.register(entry)
    _run(planner.cells, speed=lambda: _speed(models), bar=show_progress_bar, on_estimate=on_estimate)
    return planner.entries


@dataclass
class _Planner:
    """Lists the cells of an evaluation, and measures them."""

    plan: Plan
    store: ResultStore
    data: Path | None
    settings: EvalSettings
    batch_size: int
    device: str | None
    cells: list[_Cell] = field(default_factory=list)
    entries: list[ModelEntry] = field(default_factory=list)
    reads_texts: bool = False
    """Whether a cell reads held-out text."""

    def __post_init__(self) -> None:
        names = [name for name in self.plan.language if name != HELD_OUT]
        self._tasks = [(name, task) for name in names for task in make_language_tasks(name, self.data)]

    def add_models(self, models: EvalModels, baselines: Sequence[Baseline]) -> None:
        """Add the cells of a GEM and its base as a language model, and of baselines on that base."""
        if models.model is not None:
            self._add_gem(models)
        elif self.plan.language:
            self._add_base(models)
        for method in baselines:
            entry = models.baseline_entry(method)
            self.entries.append(entry)
            self._add_vectors(entry, functools.partial(models.baseline, method))

    def _add_gem(self, models: EvalModels) -> None:
        entry = models.gem_entry()
        self.entries.append(entry)
        assert models.config is not None
        self._add_vectors(entry, lambda: models.gem)
        with_specials = models.config.embeds_from_cache
        if self.plan.recovery and with_specials:
            for k in sorted({1, models.config.k}):
                task = "special_tokens" if k == models.config.k else f"special_tokens_first{k}"
                self._add("recovery", entry, task, 4000.0, functools.partial(self._recovery, models, k))
        if self.plan.attack:
            self._add("recovery", entry, "vector", 60_000.0, lambda: self._attack(models))
        if self.plan.cost:
            self._add("cost", entry, "encode", 15_000.0, lambda: self._cost(models))
        if self.plan.language:
            self._add_language(entry, lambda: (models.gem.lm, models.gem.tokenizer))
            self._add_base(models)
        if self.plan.prompts:
            self._add("gate", entry, "logits", 2 * 30.0 * self.plan.prompts, lambda: self._gate(models))

    def _add_base(self, models: EvalModels) -> None:
        entry = models.base_entry()
        self.entries.append(entry)
        self._add_language(entry, lambda: models.base)

    def add_encoder(self, spec: str) -> None:
        """Add the cells of a sentence-transformers model, loaded when the first one runs."""
        entry, path = encoder_entry(spec, self.settings)
        self.entries.append(entry)
        self._add_vectors(entry, functools.cache(lambda: load_encoder(path, self.settings, self.device)))

    def _add_vectors(self, entry: ModelEntry, load: Callable[[], Any]) -> None:
        for name in self.plan.vectors:

            def run(name: str = name) -> None:
                run_task(
                    load(),
                    make_task(name, self.data, limit=self.settings.limit),
                    entry,
                    self.store,
                    instructions=self.settings.instructions,
                    batch_size=self.batch_size,
                )

            tokens = estimate_vector_tokens(name, self.data, limit=self.settings.limit)
            done = functools.partial(is_finished, self.store, entry, name)
            self.cells.append(_Cell(f"{entry.facts['label']}: {name}", tokens, done, run))

    def _add_language(self, entry: ModelEntry, load: Callable[[], tuple[Any, Any]]) -> None:
        limit = self.settings.limit
        if HELD_OUT in self.plan.language:
            self._add("language", entry, HELD_OUT, 15_000.0, lambda: self._held_out(*load()))
        harness = functools.cache(lambda: share_prefixes(make_harness(*load())))

        def run(task: LanguageTask, rows: int | None) -> dict[str, Any]:
            return run_language_task(harness(), task, limit=rows)

        for name, task in self._tasks:
            rows = limit
            cut = self.plan.language_limit
            if cut is not None and limit is None:
                rows = cut
                task = replace(task, name=f"{task.name}_first{cut}", group=f"{task.group}, first {cut}")
            tokens = estimate_language_tokens(name, self.data, limit=rows) / sum(n == name for n, _ in self._tasks)
            self._add("language", entry, task.name, tokens, functools.partial(run, task, rows))

    def _add(self, kind: Any, entry: ModelEntry, task: str, tokens: float, run: Callable[[], Any]) -> None:
        numerics = {"arithmetic": numerics_signature(self.device)} if kind == "language" else {}

        def measure() -> None:
            start = time.perf_counter()
            value = {**run(), **numerics}
            self.store.write(kind, entry, task, {**value, "seconds": round(time.perf_counter() - start, 2)})

        def done() -> bool:  # with other numerics a difference of 0 would be lost: run such a cell again
            if not self.store.path(kind, entry, task).is_file():
                return False
            cell = self.store.read(kind, entry, task) if numerics else None
            return cell is None or {**cell, **numerics} == cell

        self.reads_texts |= kind != "language" or task == HELD_OUT
        title = f"{entry.facts['label']}: {task}"
        self.cells.append(_Cell(title, tokens, done, measure))

    # What the cells do

    def _held_out(self, lm: Any, tokenizer: Any) -> dict[str, Any]:
        texts = self.texts[-(self.settings.limit or _HELD_OUT_TEXTS) :]
        losses = compute_text_losses(lm, tokenizer, texts)
        return {
            "task": HELD_OUT,
            "group": HELD_OUT,
            "n": len(losses),
            "metrics": {"loss": sum(s for s, _ in losses) / max(1, sum(n for _, n in losses))},
            "main": "loss",
            "per_sample": [s / max(1, n) for s, n in losses],
        }

    def _recovery(self, models: EvalModels, k: int) -> dict[str, Any]:
        count = min(self.plan.recovery, self.settings.limit or self.plan.recovery)
        return measure_recovery(models.gem, select_texts_by_length(models.gem, self.texts, count), k=k)

    def _attack(self, models: EvalModels) -> dict[str, Any]:
        count = self.settings.limit or 100
        known = self.texts[: min(20 * count, len(self.texts) - count)]
        return attack_vectors(models.gem, known, self.texts[-count:])

    def _cost(self, models: EvalModels) -> dict[str, Any]:
        texts = self.texts[-min(_COST_TEXTS, 4 * (self.settings.limit or _COST_TEXTS)) :]
        assert models.model is not None
        return measure_encoding_cost(
            models.model,
            texts,
            base=models.base_given,
            dtype=self.settings.torch_dtype,
            device=self.device,
            quantize=self.settings.quantize,
        )

    def _gate(self, models: EvalModels) -> dict[str, Any]:
        count = min(self.plan.prompts, self.settings.limit or self.plan.prompts)
        return compare_logits(models.base[0], models.gem.lm, models.gem.tokenizer, self.texts[-count:])

    def text_file(self) -> Path:
        """The first local text file; ValueError if there is none."""
        assert self.data is not None
        files = sorted((self.data / "text").glob("*.txt*"))
        if not files:
            raise ValueError(f"held-out text is read from {self.data / 'text'}/*.txt.gz, which has none")
        return files[0]

    @functools.cached_property
    def texts(self) -> list[str]:
        """Sentences no training should have seen: the end of the local text file, or of STSBenchmark from the hub."""
        if self.data is not None:
            return [text for _, text in load_lines(self.text_file())][-5000:]
        task = make_task("STSBenchmark", None)
        task.load_data()
        return list(task.dataset["test"]["sentence1"])


def _run(
    cells: Sequence[_Cell],
    *,
    speed: Callable[[], float],
    bar: bool,
    on_estimate: Callable[[int, int, float], None] | None,
) -> None:
    pending = [cell for cell in cells if not cell.done()]
    if on_estimate is not None:
        total = sum(cell.tokens for cell in pending)
        on_estimate(len(pending), len(cells), total / speed() if pending else 0.0)
    failures: list[str] = []
    with tqdm(
        total=round(sum(cell.tokens for cell in pending) / 1000),
        disable=not bar,
        unit="k",
        bar_format="{l_bar}{bar}| {elapsed} gone, about {remaining} left",
    ) as progress:
        for cell in pending:
            progress.set_description(cell.title)
            try:
                cell.run()
            except (ValueError, OSError, RuntimeError) as error:  # out of memory, a full disk: the rest may still go
                failures.append(f"{cell.title}: {first_line(error)}")
                logger.warning("%s", failures[-1])
            progress.update(round(cell.tokens / 1000))
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(cells)} cells failed, the rest is kept and the same command goes on from there;"
            f" the first: {failures[0]}"
        )


def _speed(models: EvalModels | None) -> float:
    """Tokens a second of a short probe with the GEM; a guess where there is none."""
    if models is None or models.model is None:
        return 1000.0
    models.gem.encode(["A short text, to wake the machine."])
    models.gem.encode(
        [f"The {n}th of sixty-four texts of middling length, for a guess at the speed." for n in range(64)]
    )
    report = models.gem.meter.report()
    return max(1.0, float(report["tokens_per_second"]))


def _data_root(data: Path | None) -> Path | None:
    """The directory that holds ``mteb/`` and ``lm/``; one of these two themselves is understood too."""
    if data is None:
        return None
    if not data.is_dir():
        raise ValueError(f"no such data directory: {data}")
    if not (data / "mteb").is_dir() and not (data / "lm").is_dir() and data.resolve().name in ("mteb", "lm", "text"):
        return data.resolve().parent
    return data


def _english_mteb() -> tuple[str, ...]:
    import mteb

    return tuple(task.metadata.name for task in mteb.get_benchmark("MTEB(eng, v1)").tasks)
