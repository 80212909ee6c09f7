"""Make a finished run a GEM that comes with gemify: its adapter in float16, its recipe and figures beside it.

    python recipes/ship_starter.py runs/starter-gated src/gemify/shipped/starter-gated
    python recipes/ship_starter.py runs/starter src/gemify/shipped/starter 16

The tokenizer is the base's own, so it is left out. Layers above the one that is read are left out too. A number at the
end is a rank: every layer's low-rank product is replaced by its best approximation of that rank (singular values).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemify.io.atomic import atomic_directory
from gemify.model.adapter import ADAPTER_FILE
from gemify.model.config import CONFIG_FILE, GemConfig
from gemify.model.projection import PROJECTION_FILE
from gemify.model.sentence_transformers_files import write_sentence_transformers_files
from gemify.training.checkpoints import RECIPE_FILE
from gemify.training.recipe import Recipe


def main(run: Path, target: Path, rank: int | None = None) -> None:
    with atomic_directory(target, last=CONFIG_FILE) as stage:
        state, settings = load_file(run / ADAPTER_FILE), json.loads((run / "adapter_config.json").read_text())
        if (layer := GemConfig.from_directory(run).layer) is not None:
            state = {name: tensor for name, tensor in state.items() if layer_of(name) < layer}
            modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in state if ".lora_" in name}
            settings["target_modules"] = sorted(modules)
        if rank is not None:
            if settings["lora_alpha"] != settings["r"]:
                raise ValueError(f"the rank of {run} cannot be reduced: its lora_alpha is not its rank")
            state = reduce_rank(state, rank)
            settings["r"] = settings["lora_alpha"] = rank
        state = {name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()}
        save_file(state, stage / ADAPTER_FILE, metadata={"format": "pt"})
        (stage / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in ("summary.json", CONFIG_FILE):
            shutil.copyfile(run / name, stage / name)
        write_sentence_transformers_files(stage, GemConfig.from_directory(run))
        if (run / PROJECTION_FILE).exists():
            halves = {name: tensor.to(torch.float16) for name, tensor in load_file(run / PROJECTION_FILE).items()}
            save_file(halves, stage / PROJECTION_FILE)
        recipe = Recipe.from_dict({**Recipe.read_yaml(run / RECIPE_FILE), "eval_pairs": None})
        data: object = recipe.data  # no path of the machine it ran on
        if isinstance(recipe.data, str):
            data = os.path.relpath(recipe.data)
        else:
            data = tuple(dataclasses.replace(source, path=Path(source.path).name) for source in recipe.data)
        recipe = dataclasses.replace(recipe, data=data)  # type: ignore[arg-type]
        (stage / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")


def layer_of(name: str) -> int:
    """The decoder layer of a tensor; -1 for what belongs to none."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def reduce_rank(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The best approximation of every product ``B @ A`` by one of a smaller rank."""
    reduced = dict(state)
    for name in state:
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        q_b, r_b = torch.linalg.qr(state[other].double())
        q_a, r_a = torch.linalg.qr(state[name].double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        reduced[other] = (q_b @ u[:, :rank] * root).float()
        reduced[name] = ((v[:rank] * root[:, None]) @ q_a.T).float()
    return reduced


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
