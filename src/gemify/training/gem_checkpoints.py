"""Checkpoints of a trainer that has a GEM: each is a GEM directory, complete or absent. With a card for the Hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from gemify.io.atomic import sync
from gemify.model.gem import GemModel
from gemify.model.hub import CARD_FILE, model_card, require_public_base
from gemify.training.batches import Batches
from gemify.training.checkpoints import STATE_FILE
from gemify.training.fsdp import load_weights, select_lm_weights
from gemify.training.objective import Objective

_TEMPERATURE_FILE = "temperature.safetensors"


class GemCheckpoints(Trainer):
    """What a trainer of a GEM saves, loads and uploads in place of a transformers model."""

    gem: GemModel
    batches: Batches

    def _objective(self) -> Objective:
        raise NotImplementedError

    def create_model_card(
        self,
        language: Any = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **options: Any,
    ) -> None:
        """Write a model card with the base, the tuning scope and the last measurements, unless there is one.

        Args:
            language: As in transformers, as are the others.
            license: Its id.
            tags: Tags beside those of gemify.
            model_name: The title.
            options: Further entries of the card's data.
        """
        path = Path(self.args.output_dir) / CARD_FILE
        if not self.is_world_process_zero() or path.exists():
            return
        name = getattr(self, "hub_model_id", None) or model_name or Path(self.args.output_dir).name
        card = ModelCard(model_card(name, self.gem.config))
        more = [tags] if isinstance(tags, str) else tags or []
        data: Any = card.data
        known = {**data.to_dict(), "pipeline_tag": "feature-extraction", **options}
        known |= {"language": language, "license": license, "tags": [*data.tags, *more]}
        card.data = ModelCardData(**known)
        measured = {k: v for entry in self.state.log_history[-20:] for k, v in entry.items() if k != "epoch"}
        table = "".join(f"| {name} | {value} |\n" for name, value in measured.items())
        card.content = f"{card.content}\n| measured | value |\n|---|---|\n{table}"
        card.save(path)

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        """Upload the GEM, as in transformers.

        Raises:
            ValueError: The base is a path of this machine.
        """
        require_public_base(self.gem.config)
        return super().push_to_hub(*args, **options)

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
        self.batches.start_step = int(json.loads((directory / STATE_FILE).read_text())["global_step"])
        objective, t = self._objective(), load_file(directory / _TEMPERATURE_FILE)["t"]
        trained = objective.projection if objective.distillation is None else objective.distillation.projection
        if trained is not None:
            trained.load_from(directory)
        if objective.sharded:
            return load_weights(objective, read_lm_weights(self.gem, directory), t)
        load_gem_weights(self.gem, directory)
        with torch.no_grad():
            objective.temperature.t.copy_(t)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the base class, but in a staging directory that is renamed when complete."""
        if self.args.push_to_hub or self.args.metric_for_best_model is not None:  # they go by the directory's name
            return super()._save_checkpoint(model, trial)
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
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self._save()  # the base class copies the files that a transformers model has, and uploads the directory
        super()._push_from_checkpoint(checkpoint_folder)


def read_lm_weights(gem: GemModel, directory: Path) -> dict[str, Tensor]:
    """Read a saved language model's state dict, in float32."""
    saved: dict[str, Tensor] = type(gem.lm).from_pretrained(directory, dtype=torch.float32).state_dict()
    return saved


def load_gem_weights(gem: GemModel, directory: Path) -> None:
    """Load the trained weights of a saved GEM into one of the same kind."""
    if gem.adapter is not None:
        gem.adapter.load(directory)
    else:
        gem.lm.load_state_dict(read_lm_weights(gem, directory))
