"""The directory of a run: what is checked before it starts, and the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gemify.training.recipe import Recipe

CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.yaml"
STATE_FILE = "trainer_state.json"


def last_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    found = [p for p in (output / CHECKPOINTS).glob("checkpoint-*") if (p / STATE_FILE).is_file()]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def prepare_directory(recipe: Recipe, output: Path, *, resume: bool) -> Path | None:
    """Check a run's directory, and return the checkpoint to go on from, if there is one.

    Raises:
        ValueError: The directory holds something else, or a run of another recipe.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"cannot write to {output}: it is a file, give a directory")
    path = output / RECIPE_FILE
    if not resume:
        if output.exists() and any(output.iterdir()):
            raise ValueError(
                f"{output} is not empty: add --resume to go on with the run in it, or choose another directory"
            )
        return None
    if not path.is_file():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} holds no {RECIPE_FILE}: there is no run to resume")
        return None  # killed before the first file was written
    before = Recipe.from_dict(Recipe.read_yaml(path), source=str(path))
    if changed := [f.name for f in dataclasses.fields(Recipe) if getattr(before, f.name) != getattr(recipe, f.name)]:
        name = changed[0]
        raise ValueError(
            f"cannot resume with another recipe: {name} was {getattr(before, name)!r}, is {getattr(recipe, name)!r};"
            " give the run's own settings, or another --output"
        )
    return last_checkpoint(output)
