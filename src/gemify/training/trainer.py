"""A training run on transformers' Trainer: it loops, accumulates, checkpoints and resumes; the method is elsewhere.

Layout of a run's directory: the finished GEM, ``recipe.yaml``, ``metrics.jsonl`` (one line a step), ``summary.json``,
``tensorboard/`` if tensorboard is installed, and ``checkpoints/``. Each checkpoint is itself a GEM directory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from gemify.io.atomic import atomic_file, sync
from gemify.io.signals import StopRequestedError, stop_signals
from gemify.io.tables import parse_bytes
from gemify.model.base import enable_activation_checkpointing, max_positions
from gemify.model.encode import peak_memory_bytes, throughput
from gemify.model.forward import PASS_OVERHEAD_TOKENS
from gemify.model.gem import GemModel
from gemify.model.projection import Projection
from gemify.training.batches import Batches
from gemify.training.callbacks import Pair, Progress, StopOnSignal, read_pairs, spearman
from gemify.training.checkpoints import CHECKPOINTS, RECIPE_FILE, STATE_FILE, prepare_directory
from gemify.training.distributed import all_reduce_sum, barrier
from gemify.training.examples import open_sources
from gemify.training.fsdp import (
    ShardedTrainer,
    gather_weights,
    is_sharded,
    load_weights,
    select_lm_weights,
    unshard_root,
)
from gemify.training.objective import Objective
from gemify.training.recipe import Recipe
from gemify.training.teacher import Distillation, Teacher

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
_TEMPERATURE_FILE = "temperature.safetensors"
_LONG_PASS_OVERHEAD = 60.0
"""What a pass with its way back costs beside its tokens, in tokens: measured in bfloat16 on one CPU core."""
_GPU_PASS_OVERHEAD = 4096.0
"""The same on a GPU, where starting a pass's kernels takes as long as some thousands of tokens."""
_LOSSES = ("ntp", "contrastive", "distillation")
_COUNTS = ("tokens", "padding", "cached")


class _GemTrainer(Trainer):
    """transformers' Trainer with our batches, losses, schedule and checkpoints."""

    lr_scheduler: Any
    control: TrainerControl

    def __init__(
        self, gem: GemModel, recipe: Recipe, batches: Batches, pairs: list[Pair] | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.gem, self.recipe, self.batches, self.pairs = gem, recipe, batches, pairs
        self._parts: dict[str, float] = {}
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        # Not prepared by accelerate: a micro-batch is already this process's shard, and moves to the device itself.
        self._since = time.perf_counter()
        # A generator of its own: starting an iterator draws a seed, which would move the random state on a resume.
        return DataLoader(self.batches, batch_size=None, generator=torch.Generator())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = model(inputs["batch"])
        if not bool(torch.isfinite(losses.total)):
            raise FloatingPointError(
                f"the loss became {float(losses.total.detach())} at step {self.state.global_step + 1}: lower the"
                " learning rate or use --precision fp32; the last checkpoint is untouched"
            )
        share = 1.0 / self.recipe.gradient_accumulation_steps
        for name in _LOSSES:
            part = getattr(losses, name)
            if part is not None:
                self._parts[name] = self._parts.get(name, 0.0) + float(part.detach()) * share
        self._parts.update(alpha=inputs["batch"].alpha, scale=losses.scale)
        for name in _COUNTS if self.recipe.text_cache else _COUNTS[:2]:
            self._parts[name] = self._parts.get(name, 0) + getattr(losses.counts, name)
        return (losses.total, None) if return_outputs else losses.total

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            # The optimizer's own rate is 1, so that the lambda is the rate itself.
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, self.recipe.schedule.learning_rate
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            parts, self._parts = self._reduce(self._parts), {}
            before, self._since = self._since, time.perf_counter()
            parts["seconds"] = round(self._since - before, 3)
            logs = {**logs, **parts, "peak_memory_mb": round(peak_memory_bytes() / 2**20, 1)}
        super().log(logs, start_time)

    def _reduce(self, parts: dict[str, float]) -> dict[str, float]:
        """Combine this process's measurements with the others': means of losses, sums of token counts."""
        world = self.args.world_size
        weights: dict[str, float] = {**dict.fromkeys(_LOSSES, 1.0 / world), **dict.fromkeys(_COUNTS, 1.0)}
        names = [name for name in weights if name in parts]
        sums = all_reduce_sum([parts[name] for name in names], self.args.device)
        reduced = {name: total * weights[name] for name, total in zip(names, sums, strict=True)}
        reduced.update({name: int(reduced[name]) for name in _COUNTS if name in reduced})
        return {**parts, **reduced}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.pairs is not None
        metrics = {"eval_sts": self.sts(self.pairs)}
        self.log(dict(metrics))
        self._since = time.perf_counter()  # a step's seconds are those of training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def sts(self, pairs: list[Pair]) -> float:
        with unshard_root(self._objective()):
            return round(spearman(self.gem, pairs), 3)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As a GEM. The objective's whole weights are given where this process holds a part of them."""
        directory = Path(output_dir or self.args.output_dir)
        self.gem.save_pretrained(
            directory, weights=None if state_dict is None else select_lm_weights(self.gem, state_dict)
        )
        t = self._objective().temperature.t if state_dict is None else state_dict["temperature.t"]
        save_file({"t": t.detach().cpu().reshape(())}, directory / _TEMPERATURE_FILE)
        if (distillation := self._objective().distillation) is not None:
            distillation.projection.save(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        objective, t = self._objective(), load_file(directory / _TEMPERATURE_FILE)["t"]
        if objective.distillation is not None:
            objective.distillation.projection.load_from(directory)
        if self.gem.adapter is not None:
            self.gem.adapter.load(directory)
        else:
            saved = type(self.gem.lm).from_pretrained(directory, dtype=torch.float32).state_dict()
            if objective.sharded:
                return load_weights(objective, saved, t)
            self.gem.lm.load_state_dict(saved)
        with torch.no_grad():
            objective.temperature.t.copy_(t)

    def _objective(self) -> Objective:
        objective = self.accelerator.unwrap_model(self.model)
        assert isinstance(objective, Objective)
        return objective

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the base class, but in a staging directory that is renamed when complete."""
        run = Path(self.args.output_dir)
        stage = run / ".stage"
        name = f"checkpoint-{self.state.global_step}"
        try:
            self.args.output_dir = str(stage)
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(run)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            for path in [*(stage / name).iterdir(), stage / name]:
                sync(path)
            os.replace(stage / name, run / name)
            sync(run)
            shutil.rmtree(stage, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)


class _ShardedGemTrainer(ShardedTrainer, _GemTrainer):
    """The same with weights sharded over the processes."""


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    show_progress_bar: bool = True,
    on_ready: Callable[[GemModel], None] | None = None,
) -> tuple[GemModel, dict[str, Any]]:
    """Run a recipe and save the GEM to a directory.

    Args:
        recipe: The run's choices.
        output: The run's directory; see the layout at the top of this file.
        resume: Go on from the last complete checkpoint, with the batches, losses and weights of an uninterrupted run.
        device: Where to train. None: the accelerator if there is one.
        show_progress_bar: Show a progress bar on stderr.
        on_ready: Called with the untrained model.

    Returns:
        The trained GEM, and the summary that ``summary.json`` holds.

    Raises:
        ValueError: The recipe, the data or the directory needs a change by the user.
        FloatingPointError: The loss became infinite or not a number.
        StopRequestedError: A signal stopped the run after a checkpoint.
    """
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
    arguments = _arguments(recipe, output, device=runs_on, evaluated=pairs is not None)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process drives one device; several devices are for `accelerate launch`
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
        trainer = (_ShardedGemTrainer if sharded else _GemTrainer)(
            gem,
            recipe,
            batches,
            pairs,
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


def _run(trainer: _GemTrainer, output: Path, checkpoint: Path | None) -> None:
    """Write the recipe and run the steps, from a checkpoint if there is one."""
    recipe, arguments = trainer.recipe, trainer.args
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if recipe.gradient_checkpointing:
        enable_activation_checkpointing(trainer.gem.lm)
    if arguments.should_save:
        with atomic_file(output / RECIPE_FILE) as stage:
            stage.write_text(recipe.to_yaml(), encoding="utf-8")
    if checkpoint is not None:
        trainer.batches.start_step = int(json.loads((checkpoint / STATE_FILE).read_text())["global_step"])
    elif (distillation := trainer._objective().distillation) is not None:
        distillation.fit(trainer._objective().embed, trainer.batches.sample(recipe.ridge_texts))
    if arguments.process_index:
        torch.manual_seed(recipe.seed + arguments.process_index)  # the processes' dropout differs
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _finish(trainer: _GemTrainer, output: Path, objective: Objective) -> tuple[GemModel, dict[str, Any]]:
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
    _require_positions(recipe, gem)
    if max(recipe.matryoshka_dims, default=0) > gem.get_embedding_dim():
        raise ValueError(
            f"matryoshka_dims must be at most {gem.get_embedding_dim()}, the dimensions of a vector,"
            f" got {max(recipe.matryoshka_dims)}"
        )
    objective = Objective(
        gem.lm,
        gem.adapter,
        gem.config,
        group_tokens=recipe.group_tokens,
        pass_overhead_tokens=_pass_overhead_tokens(recipe, gem.device),
        contrastive_chunk_size=recipe.contrastive_chunk_size,
        sharded=sharded,
        distillation=distillation,
        matryoshka_dims=recipe.matryoshka_dims,
        text_cache_bytes=parse_bytes(recipe.text_cache) or 0,
    )
    return gem, objective


def _pass_overhead_tokens(recipe: Recipe, device: torch.device) -> float:
    if device.type != "cpu":
        return _GPU_PASS_OVERHEAD
    return _LONG_PASS_OVERHEAD if recipe.tune == "embedding_lora" else PASS_OVERHEAD_TOKENS


def _model(recipe: Recipe, device: str | None, *, sharded: bool) -> GemModel:
    bf16 = uses_bf16(recipe, device)
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
    )


def _device(device: str | None) -> str | None:
    """The Trainer drives the process's own device: refuse to pretend otherwise."""
    if device is not None and ":" in device and not device.endswith(":0"):
        raise ValueError(f"cannot train on {device!r}: make it the only visible device (CUDA_VISIBLE_DEVICES) instead")
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device is None and rank is not None and torch.cuda.is_available() else device


def _require_positions(recipe: Recipe, gem: GemModel) -> None:
    """Refuse rows longer than the model's positions: a reconstruction row holds its text twice, a view the template."""
    k, template = gem.config.k, gem.config.max_text_tokens - gem.max_seq_length
    longest = recipe.max_length + k + max(recipe.max_length + 1, template)
    limit = max_positions(gem.lm) or longest
    if longest > limit:
        raise ValueError(
            f"rows of max_length {recipe.max_length} take up to {longest} positions, {recipe.base} has {limit}:"
            f" set --max-length to at most {min((limit - k - 1) // 2, limit - k - template)}"
        )


def uses_bf16(recipe: Recipe, device: str | None) -> bool:
    """Return whether a run computes in bfloat16."""
    if recipe.precision == "auto":
        return torch.cuda.is_available() and device != "cpu" and torch.cuda.is_bf16_supported()
    return recipe.precision == "bf16"


def _arguments(recipe: Recipe, output: Path, *, device: torch.device, evaluated: bool) -> TrainingArguments:
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
        report_to="none",
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


def _summary(trainer: _GemTrainer) -> dict[str, Any]:
    gem, pairs = trainer.gem, trainer.pairs
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]  # those before a resume too
    last = steps[-1]
    tokens, padding, seconds = (sum(entry[name] for entry in steps) for name in ("tokens", "padding", "seconds"))
    summary: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "loss": last["loss"],
        **{name: last[name] for name in _LOSSES if name in last},
        **throughput(tokens, padding, seconds),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "device": gem.device.type,
        "base_fingerprint": gem.config.base_fingerprint,
    }
    if trainer.recipe.text_cache:
        summary["cached_tokens"] = sum(entry.get("cached", 0) for entry in steps)
    summary |= trainer.batches.skipped_rows()
    if pairs is not None:
        summary["sts_spearman"] = trainer.sts(pairs)
    return summary
