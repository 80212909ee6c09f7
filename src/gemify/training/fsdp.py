"""Weights sharded over the processes: FSDP2, for bases whose weights and optimizer state outgrow one device.

Accelerate prepares the model: every decoder layer is a unit; embeddings and output head are another, which stays whole
during a step. PyTorch gathers what is saved. Checkpoints equal those of one process, so any number of processes
resumes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from gemify.model.gem import GemModel
from gemify.paper.objectives import MAX_LOG_SCALE
from gemify.training.distributed import world_size
from gemify.training.objective import Objective
from gemify.training.recipe import Recipe

_DDP = "launch with recipes/accelerate/ddp.yaml"
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "gathering weights from CPUs beside GPUs is not tested"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "give gemify --gradient-checkpointing instead"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", "it would untie tied embeddings"),
}


def is_sharded(recipe: Recipe, device: str | None) -> bool:
    """Return whether the launcher asks for sharded weights.

    Raises:
        ValueError: It asks for a set-up that cannot train or is not tested.
    """
    if _set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "cannot train under DeepSpeed, whose checkpoints are not tested here: launch with"
            " recipes/accelerate/fsdp2.yaml, which shards the same things, or ddp.yaml"
        )
    if not _set("ACCELERATE_USE_FSDP"):
        return False
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            "cannot shard weights over 1 process: launch with --num_processes 2 or more, or without Accelerate"
        )
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"cannot train under FSDP {version}: set fsdp_version to 2, as in recipes/accelerate/fsdp2.yaml"
        )
    if recipe.tune != "full":
        raise ValueError(
            f"cannot train --tune {recipe.tune} under FSDP: {_DDP}, as the gradients and optimizer state of an adapter"
            " are small; FSDP is for --tune full"
        )
    for variable, (name, why) in _REFUSED.items():
        if _set(variable):
            raise ValueError(f"cannot train with {name}: true, set it to false: {why}")
    if device == "cpu" and torch.cuda.is_available():
        raise ValueError("cannot shard weights over CPUs beside a GPU: hide it with CUDA_VISIBLE_DEVICES='' first")
    return True


class ShardedTrainer(Trainer):
    """What a trainer of an `Objective` does differently when weights are sharded."""

    lr_scheduler: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self.model, Objective)
        self.objective = self.model
        state = self.accelerator.state
        if self.accelerator.device.type == "cpu":  # Accelerate follows the launcher on GPUs only
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        plugin = state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or _layers(self.objective.lm)
        # Gradients add up in float32, and no output is rounded: losses are among them.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.args.bf16 else None, reduce_dtype=torch.float32
        )
        t = self.objective.temperature.t
        self.objective.temperature.t = nn.Parameter(t.detach().reshape(1))  # FSDP2 takes no scalars

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer, then shard the temperature by itself: rounded to bfloat16 it would hardly move.

        Sharded earlier, the Trainer would give it a parameter group of its own, and a run in one process could not read
        the optimizer's state.
        """
        temperature = self.objective.temperature
        before = temperature.t
        optimizer: Any = super().create_optimizer(model)
        fully_shard(temperature, mesh=init_device_mesh(self.accelerator.device.type, (world_size(),)))
        for group in optimizer.param_groups:
            group["params"] = [temperature.t if p is before else p for p in group["params"]]
        return optimizer

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Clamp the sharded temperature, then step."""
        # The temperature clamps itself, but what a step sees is a gathered copy.
        t: Any = self.objective.temperature.t
        with torch.no_grad():
            t.to_local().clamp_(0.0, MAX_LOG_SCALE)
        return super().training_step(*args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save whole weights from the first process."""
        whole = gather_weights(self.objective)
        if self.args.should_save:
            self._save(output_dir, whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        whole = _whole_state(self.optimizer, scalar=self.objective.temperature.t)
        if self.args.should_save:
            torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            paths = Path(checkpoint) / OPTIMIZER_NAME, Path(checkpoint) / SCHEDULER_NAME
            optimizer, scheduler = (
                torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths
            )
            _load_state(self.optimizer, optimizer)
            self.lr_scheduler.load_state_dict(scheduler)


def _layers(lm: nn.Module) -> list[str]:
    """The classes of a model's decoder layers, by name."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return sorted({type(layer).__name__ for layer in layers})


@contextmanager
def unshard_root(objective: Objective) -> Iterator[None]:
    """Unshard embeddings and final norm, for passes of the language model that do not start at the objective."""
    if not objective.sharded:
        yield
        return
    outermost: Any = objective
    outermost.unshard()
    try:
        yield
    finally:
        outermost.reshard()


def gather_weights(objective: Objective) -> dict[str, Tensor]:
    """Gather all weights on the CPU of the first process. The others get nothing, but must call this too."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(objective, options=options)
    return found


def select_lm_weights(gem: GemModel, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the language model's part of an objective's weights, tied weights once."""
    twice = {name for name, _ in gem.lm.named_parameters(remove_duplicate=False)}
    twice -= {name for name, _ in gem.lm.named_parameters()}
    found = {name.removeprefix("lm."): weight for name, weight in whole.items() if name.startswith("lm.")}
    return {name: weight for name, weight in found.items() if name not in twice}


def load_weights(objective: Objective, lm_weights: dict[str, Tensor], t: Tensor) -> None:
    """Load whole weights: every process takes its shard."""
    weights: dict[str, Any] = {f"lm.{name}": weight for name, weight in lm_weights.items()}
    weights["temperature.t"] = t.reshape(1)
    set_model_state_dict(objective, weights, options=StateDictOptions(full_state_dict=True))


@torch.no_grad()
def _whole_state(optimizer: Any, *, scalar: Tensor) -> dict[str, Any]:
    """The optimizer's state as in a run of one process: gathered, on the CPU, the temperature's as scalars."""
    saved: dict[str, Any] = optimizer.state_dict()
    parameters = _parameters(optimizer)

    def gathered(number: int, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor().cpu()
        return whole.reshape(()) if parameters[number] is scalar else whole

    state = {n: {name: gathered(n, v) for name, v in parts.items()} for n, parts in saved["state"].items()}
    return {**saved, "state": state}


@torch.no_grad()
def _load_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Load a state that `_whole_state` or a run in one process saved: every process takes its shard."""
    parameters = _parameters(optimizer)

    def part(number: int, name: str, value: Any) -> Any:
        parameter = parameters[number]
        if name == "step" or not isinstance(parameter, DTensor):
            return value
        whole = value.reshape(parameter.shape).to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)

    state = {n: {name: part(n, name, v) for name, v in parts.items()} for n, parts in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
