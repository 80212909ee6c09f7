"""GEM inside TRL's supervised fine-tuning (``pip install 'gemify[trl]'``).

`GemSFTTrainer` is `trl.SFTTrainer` whose steps also learn rows with special tokens and contrasted pairs, cut from the
same conversations: the loss is that of SFT plus ``gem_weight`` times GEM's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("trl is not installed: pip install 'gemify[trl]'", name=error.name) from error

import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from gemify.model.gem import GemModel
from gemify.model.hub import require_public_base
from gemify.training.gem_checkpoints import GemCheckpoints
from gemify.training.gem_trainer import LOSSES, Rows, build_recipe, count_rows, make_batches, make_objective, open_rows
from gemify.training.objective import MicroBatch, Objective


class GemSFTTrainer(GemCheckpoints, SFTTrainer):
    """TRL's SFTTrainer with GEM's rows and losses beside its own.

    Fine-tuning is TRL's: its data, loss, evaluation and arguments. Each of its batches is followed by one of rows with
    special tokens. Checkpoints are GEM directories.

    Args:
        model: A GEM of tuning scope ``lora`` or ``full``; its adapter takes the place of ``peft_config``.
        args: TRL's arguments. They also say GEM's steps, batch, rates and seed.
        train_dataset: TRL's data: conversations, prompts with completions, or texts.
        gem_dataset: Rows for GEM, as `GemTrainer` takes them. None: ``train_dataset``.
        gem_weight: What GEM's loss is multiplied with. 0: plain SFT.
        recipe: Entries of a `Recipe` that concern rows and losses. By default no row is raw (``mix``: 0), as SFT learns
            these, and the contrastive loss takes the rows of the batch (``contrastive_batch_size``: None).
        options: Those of SFTTrainer.

    Raises:
        ValueError: The model's base is frozen, several processes run, or an option is GEM's to say.
    """

    def __init__(
        self,
        model: GemModel,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        *,
        gem_dataset: Rows | None = None,
        gem_weight: float = 1.0,
        recipe: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        arguments = args or SFTConfig("trainer_output")
        _require_trainable(model, arguments, gem_weight, options)
        self.gem, self.gem_weight = model, gem_weight
        rows = train_dataset if gem_dataset is None else gem_dataset
        entries = {"mix": 0.0, "contrastive_batch_size": None, **(recipe or {})}
        first = build_recipe(model, arguments, entries, num_rows=count_rows(train_dataset))
        self.gem_objective = make_objective(model, first)
        self._step, self._steps = -1, iter(())
        self._micro_batches: Iterator[dict[str, MicroBatch]] = iter(())
        self._gem_parts: dict[str, list[float]] = {}
        super().__init__(
            model=model.lm, args=arguments, train_dataset=train_dataset, processing_class=model.tokenizer, **options
        )
        self.gem_objective.to(self.args.device)
        # Packing may have made other rows, and so another number of steps.
        self.recipe = build_recipe(model, arguments, entries, num_rows=count_rows(self.train_dataset))
        self.batches = make_batches(model, self.recipe, open_rows(rows, self.recipe), arguments)

    def _objective(self) -> Objective:
        return self.gem_objective

    def _own_parameters(self) -> list[nn.Parameter]:
        """What is trained outside the language model: the special tokens' rows under LoRA, the temperature."""
        known = {id(p) for p in self.gem.lm.parameters()}
        return [p for p in self.gem_objective.parameters() if p.requires_grad and id(p) not in known]

    def create_optimizer(self, model: Any = None) -> Any:
        """Create TRL's optimizer, with the parameters of GEM's own in a group without weight decay."""
        optimizer: Any = super().create_optimizer(model)
        there = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [p for p in self._own_parameters() if id(p) not in there]
        if own and self.gem_weight:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as TRL does; the model is in evaluation mode afterwards."""
        self._step = -1
        try:
            return super().train(*args, **options)
        finally:
            self.gem.lm.eval()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss, in training with GEM's beside it."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.gem_weight or not model.training:
            return found
        loss, outputs = found if return_outputs else (found, None)
        with torch.autocast(loss.device.type, dtype=torch.bfloat16, enabled=bool(self.args.bf16)):
            losses = self.gem_objective(self._next_batch())
        for name in LOSSES:
            if (part := getattr(losses, name)) is not None:
                self._gem_parts.setdefault(f"gem_{name}", []).append(float(part.detach()))
        # TRL's loss is normalised over the whole step where its tokens are counted, GEM's over a micro-batch.
        share = 1.0 if num_items_in_batch is None else 1.0 / self.current_gradient_accumulation_steps
        loss = loss + self.gem_weight * share * losses.total
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip what the Trainer's model does not hold, as a group of its own, and then the model."""
        if own := [p for p in self._own_parameters() if p.grad is not None]:
            nn.utils.clip_grad_norm_(own, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _next_batch(self) -> MicroBatch:
        """The next of this step's micro-batches, the same whether the run was resumed or not."""
        if self._step != self.state.global_step:
            if self._step < 0:
                self.batches.start_step = self.state.global_step
                self._steps = iter(self.batches)
            self._step = self.state.global_step
            self._micro_batches = iter(list(islice(self._steps, self.recipe.gradient_accumulation_steps)))
            for parameter in self._own_parameters():  # the Trainer clears the gradients of its model
                parameter.grad = None
        return next(self._micro_batches)["batch"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's numbers, and the means of GEM's losses as ``gem_ntp`` and ``gem_contrastive``."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._gem_parts.items()}}
            self._gem_parts = {}
        super().log(logs, start_time)


def _require_trainable(gem: GemModel, args: SFTConfig, gem_weight: float, options: Mapping[str, Any]) -> None:
    if gem.config.tune not in ("lora", "full"):
        raise ValueError(
            f"tune {gem.config.tune!r} leaves the base as it is, so there is nothing to fine-tune: take lora or full"
            " (GemModel.from_base), or GemTrainer"
        )
    for name in ("peft_config", "processing_class", "quantization_config"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is the GEM's to say: give GemModel.from_base tune='lora' and its adapter")
    if gem_weight < 0.0:
        raise ValueError(f"gem_weight must not be negative, got {gem_weight}")
    if args.push_to_hub:
        require_public_base(gem.config)
    if args.world_size > 1:
        raise ValueError("GemSFTTrainer runs in one process: for several run gemify train or GemTrainer")
