"""Make a finished run a GEM that comes with gemify: its adapter in float16, its recipe and figures beside it.

    python recipes/ship_starter.py runs/starter src/gemify/shipped/starter

The tokenizer is the base's own, so it is left out.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gemify.io.atomic import atomic_directory
from gemify.model.adapter import ADAPTER_FILE
from gemify.model.config import CONFIG_FILE
from gemify.training.checkpoints import RECIPE_FILE
from gemify.training.recipe import Recipe


def main(run: Path, target: Path) -> None:
    with atomic_directory(target, last=CONFIG_FILE) as stage:
        state = {name: tensor.to(torch.float16) for name, tensor in load_file(run / ADAPTER_FILE).items()}
        save_file(state, stage / ADAPTER_FILE, metadata={"format": "pt"})
        for name in ("adapter_config.json", "summary.json", CONFIG_FILE):
            shutil.copyfile(run / name, stage / name)
        recipe = Recipe.from_dict({**Recipe.read_yaml(run / RECIPE_FILE), "eval_pairs": None})
        recipe = dataclasses.replace(recipe, data=os.path.relpath(str(recipe.data)))  # no path of the machine it ran on
        (stage / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
