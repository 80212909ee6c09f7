"""`GemTrainer`: transformers' Trainer with GEM's rows, batches, losses and checkpoints. Every checkpoint is a GEM.

`gemify train` is this class with the arguments, schedule and files of a recipe (`gemify.training.trainer`).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerControl, TrainingArguments

from gemify.io.tables import parse_bytes
from gemify.model.base import enable_activation_checkpointing, max_positions
from gemify.model.encode import peak_memory_bytes
from gemify.model.forward import PASS_OVERHEAD_TOKENS
from gemify.model.gem import GemModel
from gemify.model.hub import require_public_base
from gemify.training.batches import Batches
from gemify.training.distributed import all_reduce_sum
from gemify.training.examples import Source
from gemify.training.fsdp import unshard_root
from gemify.training.gem_checkpoints import GemCheckpoints
from gemify.training.objective import Objective
from gemify.training.recipe import DataSource, Recipe
from gemify.training.teacher import Distillation

Rows = Iterable[Any]
"""Texts, pairs, conversations, or mappings with the columns of `gemify.training.examples`; read anew every epoch."""
Evaluator = Callable[[GemModel], float | Mapping[str, float]]

LOSSES = ("ntp", "contrastive", "distillation")
_COUNTS = ("tokens", "padding", "cached")
_LONG_PASS_OVERHEAD = 60.0
"""What a pass with its way back costs beside its tokens, in tokens: measured in bfloat16 on one CPU core."""
_GPU_PASS_OVERHEAD = 4096.0
"""The same on a GPU, where starting a pass's kernels takes as long as some thousands of tokens."""

_ROWS_AND_LOSSES = frozenset(
    """
    text_column skip_bad mix reconstruction append_end max_length min_length ntp_steps ramp_steps alpha_final
    contrastive_batch_size num_negatives contrastive_chunk_size matryoshka_dims view drop_rate drop_both group_tokens
    text_cache shuffle_buffer
    """.split()  # noqa: SIM905
)
"""What of a recipe neither the model nor the training arguments say."""


class GemTrainer(GemCheckpoints):
    """Trains a GEM on texts, pairs or conversations.

    The rows and losses are the recipe's. All else is as in transformers: arguments, optimizer, schedule, callbacks,
    ``report_to``, resuming, checkpoints, the Hub. Checkpoints are GEM directories. A resumed run has the batches and
    losses of an uninterrupted one.

    Args:
        model: The GEM, of any tuning scope.
        args: transformers' arguments. The batch is ``per_device_train_batch_size`` times the number of processes.
        train_dataset: A `datasets.Dataset`, or any collection of rows that can be read again: texts, tuples of anchor
            and positive, lists of messages, or mappings (`gemify.training.examples` lists their columns). A mapping of
            names to such data sets: each batch comes from one of them, chosen by its size.
        eval_dataset: Held-out rows. Their losses are ``eval_ntp``, ``eval_contrastive`` and, weighted as in the step
            before, ``eval_loss``.
        recipe: Entries of a `Recipe` that concern rows and losses, such as ``ntp_steps``, ``mix`` or ``max_length``.
        evaluator: A function of the model that returns a number (``eval_score``) or several by name. For
            sentence-transformers' evaluators: ``lambda gem: evaluator(SentenceTransformer(modules=[Gem(gem)]))``.
        compute_metrics: A function of an `EvalPrediction` of ``eval_dataset``: ``predictions`` are the texts' vectors
            [N, D], or of pairs those of anchors and of positives; ``label_ids`` number the rows.
        callbacks: transformers' callbacks.
        optimizers: An optimizer and a schedule of one's own.

    Raises:
        ValueError: The recipe names what the model or the arguments say, or contradicts them; the data cannot be
            read twice; an interval is an epoch; or a base that is a path would go to the hub.
    """

    control: TrainerControl

    def __init__(
        self,
        model: GemModel,
        args: TrainingArguments | None = None,
        train_dataset: Rows | Mapping[str, Rows] | None = None,
        eval_dataset: Rows | None = None,
        *,
        recipe: Mapping[str, Any] | None = None,
        evaluator: Evaluator | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if train_dataset is None:
            raise ValueError("GemTrainer needs a train_dataset: texts, pairs or conversations")
        arguments = copy.copy(args or TrainingArguments(output_dir="trainer_output"))
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(arguments, name) == "epoch":
                raise ValueError(f"{name} must be steps or no, got epoch: rows are one stream, set a number of steps")
        made = build_recipe(model, arguments, recipe or {}, num_rows=count_rows(train_dataset))
        arguments.max_steps = made.max_steps
        arguments.ignore_data_skip = True  # Batches starts at the right step by itself
        if made.gradient_checkpointing:
            enable_activation_checkpointing(model.lm)
            arguments.activation_checkpointing = False  # the Trainer would ask the objective for it
        if arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = True  # the temperature rests while alpha is 0
        batches = make_batches(model, made, open_rows(train_dataset, made), arguments)
        self.eval_rows = None if eval_dataset is None else open_rows(eval_dataset, made, name="eval_dataset")
        self._setup(
            model,
            made,
            batches,
            evaluator,
            model=make_objective(model, made),
            args=arguments,
            eval_dataset=None if eval_dataset is None and evaluator is None else [],
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _setup(
        self, gem: GemModel, recipe: Recipe, batches: Batches, evaluator: Evaluator | None, **options: Any
    ) -> None:
        if options["args"].push_to_hub:
            require_public_base(gem.config)
        if options["args"].n_gpu > 1:
            options["args"]._n_gpu = 1  # one process drives one device; several devices are for `accelerate launch`
        super().__init__(**options)
        self.gem, self.recipe, self.batches, self.evaluator = gem, recipe, batches, evaluator
        self._parts: dict[str, float] = {}
        self._loss_counts: dict[str, int] = {}
        self._since = time.perf_counter()

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as transformers' Trainer does; the model is in evaluation mode afterwards."""
        self.batches.start_step = 0  # a resume sets it, as does loading the best checkpoint of an earlier call
        try:
            return super().train(*args, **options)
        finally:
            self.gem.lm.eval()

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """Return the run's micro-batches."""
        # Not prepared by accelerate: a micro-batch is already this process's shard, and moves to the device itself.
        self._since = time.perf_counter()
        # A generator of its own: starting an iterator draws a seed, which would move the random state on a resume.
        return DataLoader(self.batches, batch_size=None, generator=torch.Generator())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted sum of the losses of a micro-batch.

        Raises:
            FloatingPointError: It is infinite or not a number.
        """
        losses = model(inputs["batch"])
        if not bool(torch.isfinite(losses.total)):
            raise FloatingPointError(
                f"the loss became {float(losses.total.detach())} at step {self.state.global_step + 1}: lower the"
                " learning rate or use --precision fp32; the last checkpoint is untouched"
            )
        share = 1.0 / self.recipe.gradient_accumulation_steps
        for name in LOSSES:
            part = getattr(losses, name)
            if part is not None:
                self._parts[name] = self._parts.get(name, 0.0) + float(part.detach()) * share
                self._loss_counts[name] = self._loss_counts.get(name, 0) + 1
        self._parts.update(alpha=inputs["batch"].alpha, scale=losses.scale)
        for name in _COUNTS if self.recipe.text_cache else _COUNTS[:2]:
            self._parts[name] = self._parts.get(name, 0) + getattr(losses.counts, name)
        return (losses.total, None) if return_outputs else losses.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with a step's losses one by one, its tokens, seconds and memory."""
        if "loss" in logs:
            parts, self._parts = self._reduce(self._parts), {}
            before, self._since = self._since, time.perf_counter()
            parts["seconds"] = round(self._since - before, 3)
            logs = {**logs, **parts, "peak_memory_mb": round(peak_memory_bytes() / 2**20, 1)}
        super().log(logs, start_time)

    def _reduce(self, parts: dict[str, float]) -> dict[str, float]:
        """Combine this process's measurements with the others': means of losses, sums of token counts."""
        # A window of steps may hold both phases: each loss is the mean over the steps that had it.
        steps = {n: count / self.recipe.gradient_accumulation_steps for n, count in self._loss_counts.items()}
        self._loss_counts = {}
        world = self.args.world_size
        weights: dict[str, float] = {**dict.fromkeys(LOSSES, 1.0 / world), **dict.fromkeys(_COUNTS, 1.0)}
        names = [name for name in weights if name in parts]
        sums = all_reduce_sum([parts[name] for name in names], self.args.device)
        reduced = {name: total * weights[name] for name, total in zip(names, sums, strict=True)}
        reduced.update({name: int(reduced[name]) for name in _COUNTS if name in reduced})
        reduced.update({name: reduced[name] / max(1.0, steps[name]) for name in LOSSES if name in reduced})
        return {**parts, **reduced}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the losses of held-out rows, their metrics, and what the evaluator says.

        Args:
            eval_dataset: Rows in place of those of the constructor.
            ignore_keys: Not used; the Trainer gives it.
            metric_key_prefix: What every name begins with.
        """
        rows = self.eval_rows if eval_dataset is None else open_rows(eval_dataset, self.recipe, name="eval_dataset")
        metrics: dict[str, float] = {}
        if rows is not None:
            metrics |= self._held_out(rows)
        if self.evaluator is not None:
            metrics |= self.score()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self._since = time.perf_counter()  # a step's seconds are those of training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self) -> Mapping[str, float]:
        """Return what the evaluator says of the model as it is; a number is ``score``."""
        assert self.evaluator is not None
        with unshard_root(self._objective()):
            found = self.evaluator(self.gem)
        return found if isinstance(found, Mapping) else {"score": found}

    def _held_out(self, sources: list[tuple[Source, DataSource]]) -> dict[str, float]:
        """The losses of every held-out row, and the metrics of their vectors."""
        objective, alpha = self._objective(), self.recipe.schedule.alpha(max(0, self.state.global_step - 1))
        batches = make_batches(self.gem, self.recipe, sources, self.args)
        was_training, sums, weights = objective.training, {}, {}  # type: ignore[var-annotated]
        objective.eval()
        with torch.no_grad(), self._autocast():
            for batch, counts in batches.held_out():
                losses = objective(batch)
                for name, weight in counts.items():
                    sums[name] = sums.get(name, 0.0) + float(getattr(losses, name)) * weight
                    weights[name] = weights.get(name, 0) + weight
        world = self.args.world_size
        parts = dict(zip(sums, all_reduce_sum(list(sums.values()), self.args.device), strict=True))
        found = {name: total / weights[name] / world for name, total in parts.items()}
        if found.keys() == {"ntp", "contrastive"}:
            loss = (1.0 - alpha) * found["ntp"] + alpha * found["contrastive"]
        else:
            loss = sum(found.values())
        metrics = {**found, **({"loss": loss} if found else {})}
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(self._predict([source for source, _ in sources]))
        objective.train(was_training)
        return metrics

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = bool(self.args.bf16)
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _predict(self, sources: list[Source]) -> EvalPrediction:
        examples = [example for source in sources for example in source]
        first = self.gem.encode([e.text for e in examples])
        seconds = [e.second for e in examples if e.second is not None]
        predictions: Any = first if len(seconds) < len(examples) else (first, self.gem.encode(seconds))
        return EvalPrediction(predictions=predictions, label_ids=np.arange(len(examples)))

    def _objective(self) -> Objective:
        objective = self.accelerator.unwrap_model(self.model)
        assert isinstance(objective, Objective)
        return objective


def build_recipe(gem: GemModel, args: TrainingArguments, entries: Mapping[str, Any], *, num_rows: int | None) -> Recipe:
    """Build the recipe of a run: the model's choices, the arguments' numbers, and entries about rows and losses.

    Args:
        gem: The model.
        args: transformers' arguments.
        entries: Recipe entries by name.
        num_rows: Rows of the training data, where that is known: with ``num_train_epochs`` it gives the steps.

    Raises:
        ValueError: An entry is the model's or the arguments' to say; the number of steps is not known; weights are to
            be sharded; or values contradict each other.
    """
    if taken := sorted(set(entries) - _ROWS_AND_LOSSES):
        raise ValueError(
            f"recipe entry {taken[0]!r} is set by the model (GemModel.from_base) or by TrainingArguments: the recipe"
            f" takes {', '.join(sorted(_ROWS_AND_LOSSES))}"
        )
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "GemTrainer holds the whole model in every process: to shard weights run gemify train with"
            " recipes/accelerate/fsdp2.yaml"
        )
    batch_size = args.per_device_train_batch_size * args.world_size
    max_steps = args.max_steps
    if max_steps <= 0:
        if num_rows is None:
            raise ValueError("the length of train_dataset is not known: set max_steps in TrainingArguments")
        per_epoch = math.ceil(num_rows / (batch_size * args.gradient_accumulation_steps))
        max_steps = max(1, math.ceil(args.num_train_epochs * per_epoch))
    config = gem.config
    recipe = Recipe.from_dict(
        {
            **entries,
            "base": config.base,
            "tune": config.tune,
            "data": "train_dataset",
            "special_tokens": config.k,
            "pooling": config.pooling,
            "attention": config.attention,
            "shared_position": config.shared_position,
            "template": config.template,
            "layer": config.layer,
            "max_steps": max_steps,
            "batch_size": batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "gradient_checkpointing": bool(args.activation_checkpointing),
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
    )
    require_positions(recipe, gem)
    return recipe


def open_rows(
    dataset: Rows | Mapping[str, Rows], recipe: Recipe, *, name: str = "train_dataset"
) -> list[tuple[Source, DataSource]]:
    """Rows in memory, or several data sets of them, as sources; each is chosen by its size."""
    parts = dataset if isinstance(dataset, Mapping) else {name: dataset}
    sources = [Source(n, recipe.text_column, skip_bad=recipe.skip_bad, rows=rows) for n, rows in parts.items()]
    weights = [len(rows) if isinstance(rows, Sized) and len(rows) else 1 for rows in parts.values()]
    return [(s, DataSource(s.name, float(w))) for s, w in zip(sources, weights, strict=True)]


def make_objective(
    gem: GemModel, recipe: Recipe, *, sharded: bool = False, distillation: Distillation | None = None
) -> Objective:
    """Build the losses of a model.

    Args:
        gem: The model.
        recipe: The run's choices.
        sharded: Whether every process holds a part of the weights.
        distillation: The linear map into a teacher's space. None: there is no teacher.

    Raises:
        ValueError: Vectors are to be cut to more dimensions than they have.
    """
    if (widest := max(recipe.matryoshka_dims, default=0)) > gem.get_embedding_dim():
        raise ValueError(
            f"matryoshka_dims must be at most {gem.get_embedding_dim()}, the dimensions of a vector, got {widest}"
        )
    overhead = _LONG_PASS_OVERHEAD if recipe.tune == "embedding_lora" else PASS_OVERHEAD_TOKENS
    return Objective(
        gem.lm,
        gem.adapter,
        gem.config,
        group_tokens=recipe.group_tokens,
        pass_overhead_tokens=overhead if gem.device.type == "cpu" else _GPU_PASS_OVERHEAD,
        contrastive_chunk_size=recipe.contrastive_chunk_size,
        sharded=sharded,
        distillation=distillation,
        projection=gem.projection if distillation is None else None,
        matryoshka_dims=recipe.matryoshka_dims,
        text_cache_bytes=parse_bytes(recipe.text_cache) or 0,
    )


def require_positions(recipe: Recipe, gem: GemModel) -> None:
    """Refuse rows longer than the model's positions: a reconstruction row holds its text twice, a view the template."""
    k, template = gem.config.k, gem.config.max_text_tokens - gem.max_seq_length
    longest = recipe.max_length + k + max(recipe.max_length + 1, template)
    limit = max_positions(gem.lm) or longest
    if longest > limit:
        raise ValueError(
            f"rows of max_length {recipe.max_length} take up to {longest} positions, {recipe.base} has {limit}:"
            f" set --max-length to at most {min((limit - k - 1) // 2, limit - k - template)}"
        )


def make_batches(
    gem: GemModel, recipe: Recipe, sources: list[tuple[Source, DataSource]], args: TrainingArguments
) -> Batches:
    """Build the batches of a model's run; each process takes its shard."""
    return Batches(
        recipe,
        sources,
        gem.text_tokenizer,
        end_id=gem.tokenizer.eos_token_id,
        rank=args.process_index,
        world=args.world_size,
    )


def count_rows(dataset: Any) -> int | None:
    """Count the rows of a data set, or of a mapping of them; None if one does not know its length."""
    parts = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    return sum(map(len, parts)) if all(isinstance(part, Sized) for part in parts) else None
