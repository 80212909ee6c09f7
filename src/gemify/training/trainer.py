"""A training run on transformers' Trainer: it loops, accumulates, checkpoints and resumes; the method is elsewhere.

Layout of a run's directory: the finished GEM, ``recipe.yaml``, ``metrics.jsonl`` (one line a step), ``summary.json``,
``tensorboard/`` if tensorboard is installed, and ``checkpoints/``. Each checkpoint is itself a GEM directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from gemify.io.atomic import atomic_file
from gemify.io.signals import StopRequestedError, stop_signals
from gemify.model.base import enable_activation_checkpointing
from gemify.model.encode import throughput
from gemify.model.gem import GemModel
from gemify.model.projection import Projection
from gemify.training.batches import Batches
from gemify.training.callbacks import Progress, StopOnSignal, read_pairs, spearman
from gemify.training.checkpoints import CHECKPOINTS, RECIPE_FILE, prepare_directory
from gemify.training.distributed import barrier
from gemify.training.examples import open_sources
from gemify.training.fsdp import ShardedTrainer, gather_weights, is_sharded, select_lm_weights
from gemify.training.gem_trainer import LOSSES, Evaluator, GemTrainer, make_objective, require_positions
from gemify.training.objective import Objective
from gemify.training.recipe import Recipe
from gemify.training.teacher import Distillation, Teacher

SUMMARY_FILE = "summary.json"


class _RecipeTrainer(GemTrainer):
    """GemTrainer with a recipe's own schedule, and with all that the recipe says."""

    lr_scheduler: Any

    def __init__(
        self, gem: GemModel, recipe: Recipe, batches: Batches, evaluator: Evaluator | None, **options: Any
    ) -> None:
        self.eval_rows = None
        self._setup(gem, recipe, batches, evaluator, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            # The optimizer's own rate is 1, so that the lambda is the rate itself.
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, self.recipe.schedule.learning_rate
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


class _ShardedRecipeTrainer(ShardedTrainer, _RecipeTrainer):
    """The same with weights sharded over the processes."""


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    show_progress_bar: bool = True,
    report_to: Sequence[str] = (),
    on_ready: Callable[[GemModel], None] | None = None,
) -> tuple[GemModel, dict[str, Any]]:
    """Run a recipe and save the GEM to a directory.

    Args:
        recipe: The run's choices.
        output: The run's directory; see the layout at the top of this file.
        resume: Go on from the last complete checkpoint, with the batches, losses and weights of an uninterrupted run.
        device: Where to train. None: the accelerator if there is one.
        show_progress_bar: Show a progress bar on stderr.
        report_to: transformers' names of where the metrics go beside ``metrics.jsonl``, such as ``wandb``, or ``none``.
            Empty: ``tensorboard`` if it is installed.
        on_ready: Called with the untrained model.

    Returns:
        The trained GEM, and the summary that ``summary.json`` holds.

    Raises:
        ValueError: The recipe, the data or the directory needs a change by the user.
        FloatingPointError: The loss became infinite or not a number.
        StopRequestedError: A signal stopped the run after a checkpoint.
    """
    output = Path(output)
    sharded = is_sharded(recipe, device)
    checkpoint = prepare_directory(recipe, output, resume=resume)
    device = _device(device)
    if resume and (output / SUMMARY_FILE).is_file():  # written last: the run is complete
        return GemModel.from_pretrained(output, device=device), json.loads((output / SUMMARY_FILE).read_text())
    sources = open_sources(recipe)
    teacher = Teacher(recipe.teacher, device=device) if recipe.teacher is not None else None
    pairs = read_pairs(Path(recipe.eval_pairs)) if recipe.eval_pairs else None
    gem, objective = build_objective(recipe, device, sharded=sharded, teacher_dim=teacher.dim if teacher else None)
    if on_ready is not None:
        on_ready(gem)
    torch.manual_seed(recipe.seed)
    runs_on = torch.device("cuda") if sharded and torch.cuda.is_available() else gem.device
    arguments = _arguments(recipe, output, device=runs_on, evaluated=pairs is not None, report_to=report_to)
    batches = Batches(
        recipe,
        sources,
        gem.text_tokenizer,
        end_id=gem.tokenizer.eos_token_id,
        teacher=teacher,
        rank=arguments.process_index,
        world=arguments.world_size,
    )
    next(iter(batches))  # unreadable or too little data shows now, before anything is written
    barrier()  # every process has checked the directory: now one may write to it
    with stop_signals() as flag:
        stopper = StopOnSignal(flag)
        trainer = (_ShardedRecipeTrainer if sharded else _RecipeTrainer)(
            gem,
            recipe,
            batches,
            (lambda trained: {"sts": round(spearman(trained, pairs), 3)}) if pairs else None,
            model=objective,
            args=arguments,
            callbacks=[Progress(output, show=show_progress_bar), stopper],
            eval_dataset=[] if pairs else None,
        )
        _run(trainer, output, checkpoint)
    if stopper.stopped and trainer.state.global_step < recipe.max_steps:
        raise StopRequestedError(
            f"stopped at step {trainer.state.global_step} of {recipe.max_steps}; go on with --resume"
        )
    return _finish(trainer, output, objective)


def _run(trainer: _RecipeTrainer, output: Path, checkpoint: Path | None) -> None:
    """Write the recipe and run the steps, from a checkpoint if there is one."""
    recipe, arguments = trainer.recipe, trainer.args
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output / "tensorboard")
    if recipe.gradient_checkpointing:
        enable_activation_checkpointing(trainer.gem.lm)
    if arguments.should_save:
        with atomic_file(output / RECIPE_FILE) as stage:
            stage.write_text(recipe.to_yaml(), encoding="utf-8")
    if checkpoint is None and (distillation := trainer._objective().distillation) is not None:
        distillation.fit(trainer._objective().embed, trainer.batches.sample(recipe.ridge_texts))
    if arguments.process_index:
        torch.manual_seed(recipe.seed + arguments.process_index)  # the processes' dropout differs
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _finish(trainer: _RecipeTrainer, output: Path, objective: Objective) -> tuple[GemModel, dict[str, Any]]:
    """Save the trained GEM and its summary, and return both."""
    gem = trainer.gem
    gem.lm.eval()
    summary = _summary(trainer)
    weights = select_lm_weights(gem, gather_weights(objective)) if objective.sharded else None
    if trainer.args.should_save:
        gem.save_pretrained(output, weights=weights)
        with atomic_file(output / SUMMARY_FILE) as stage:
            stage.write_text(json.dumps(summary, indent=2) + "\n")
    if objective.sharded:  # the caller gets a whole model
        barrier()
        gem = GemModel.from_pretrained(output, device="cpu")
    return gem, summary


def build_objective(
    recipe: Recipe, device: str | None, *, sharded: bool = False, teacher_dim: int | None = None
) -> tuple[GemModel, Objective]:
    """Build the model a run starts from, and its objective.

    Args:
        recipe: The run's choices.
        device: Where the model goes. A model to be sharded is first whole in main memory.
        sharded: Whether its weights will be sharded.
        teacher_dim: Width of the teacher's vectors, if there is a teacher.
    """
    gem = _model(recipe, device, sharded=sharded)
    distillation = None
    if teacher_dim is not None:
        projection = Projection(torch.zeros(teacher_dim, gem.get_embedding_dim())).to(gem.device)
        distillation = Distillation(projection, recipe)
        if distillation.keep:
            space = str(recipe.teacher).removeprefix("st:")
            gem.config = dataclasses.replace(gem.config, projection_dim=teacher_dim, teacher=space)
            gem.projection = projection
    require_positions(recipe, gem)
    return gem, make_objective(gem, recipe, sharded=sharded, distillation=distillation)


def _model(recipe: Recipe, device: str | None, *, sharded: bool) -> GemModel:
    bf16 = uses_bf16(recipe, device) or recipe.quantize not in (None, "none")
    if recipe.attn_implementation == "flex_attention" and (device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(
            "attn_implementation 'flex_attention' cannot train on a CPU (it has no backward pass there): use sdpa"
        )
    torch.manual_seed(recipe.seed)  # fresh LoRA weights are random
    return GemModel.from_base(
        recipe.base,
        tune=recipe.tune,
        max_length=max(512, recipe.max_length),
        special_tokens=list(recipe.special_names) if recipe.special_names is not None else recipe.special_tokens,
        pooling=recipe.pooling,
        shared_position=recipe.shared_position,
        template=recipe.template,
        layer=recipe.layer,
        attention=recipe.attention,
        adapter={
            "rank": recipe.rank,
            "lora_alpha": recipe.lora_alpha,
            "lora_dropout": recipe.lora_dropout,
            "target_modules": recipe.target_modules,
        },
        # A frozen base may be held in bfloat16; one that is trained keeps float32 weights and computes under autocast.
        dtype=torch.bfloat16 if bf16 and recipe.frozen_base else torch.float32,
        device="cpu" if sharded else device,
        attn_implementation=recipe.attn_implementation,
        quantize=recipe.quantize,
    )


def _device(device: str | None) -> str | None:
    """The Trainer drives the process's own device: refuse to pretend otherwise."""
    if device is not None and ":" in device and not device.endswith(":0"):
        raise ValueError(f"cannot train on {device!r}: make it the only visible device (CUDA_VISIBLE_DEVICES) instead")
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device is None and rank is not None and torch.cuda.is_available() else device


def uses_bf16(recipe: Recipe, device: str | None) -> bool:
    """Return whether a run computes in bfloat16."""
    if recipe.precision == "auto":
        return torch.cuda.is_available() and device != "cpu" and torch.cuda.is_bf16_supported()
    return recipe.precision == "bf16"


def _arguments(
    recipe: Recipe, output: Path, *, device: torch.device, evaluated: bool, report_to: Sequence[str]
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=1.0,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=uses_bf16(recipe, str(device)) and not recipe.frozen_base,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(report_to) or ["tensorboard" if is_tensorboard_available() else "none"],
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=recipe.eval_steps,
        seed=recipe.seed,
        ignore_data_skip=True,  # Batches starts at the right step by itself
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=True,  # the temperature rests while alpha is 0
        remove_unused_columns=False,
    )


def _summary(trainer: _RecipeTrainer) -> dict[str, Any]:
    gem = trainer.gem
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]  # those before a resume too
    last = steps[-1]
    tokens, padding, seconds = (sum(entry[name] for entry in steps) for name in ("tokens", "padding", "seconds"))
    summary: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "loss": last["loss"],
        **{name: last[name] for name in LOSSES if name in last},
        **throughput(tokens, padding, seconds),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "device": gem.device.type,
        "base_fingerprint": gem.config.base_fingerprint,
    }
    if trainer.recipe.text_cache:
        summary["cached_tokens"] = sum(entry.get("cached", 0) for entry in steps)
    summary |= trainer.batches.skipped_rows()
    if trainer.evaluator is not None:
        summary["sts_spearman"] = trainer.score()["sts"]
    return summary
