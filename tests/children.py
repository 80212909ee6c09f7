"""What tests run in a process of its own: an index run that is killed, reading without permission, a command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def killed_at(
    server: ForkServerContext, work: Callable[..., None], *args: Any, kill_after: int | None = None, wait: float = 0.0
) -> tuple[int, int]:
    """Work in a child, killed ``wait`` seconds after a step that it reports. Gives their number and the exit code."""
    ours, theirs = server.Pipe()
    child = server.Process(target=work, args=(*args, theirs))
    child.start()
    theirs.close()
    steps = 0
    with contextlib.suppress(EOFError):
        while steps != kill_after:
            ours.recv()
            steps += 1
        time.sleep(wait)
        child.kill()
    child.join()
    assert child.exitcode is not None
    return steps, child.exitcode


META = {"project": "atlas"}


def _tell_steps(tell: Connection) -> None:
    """Say before and after every step of writing to a store that it is taken."""
    from gemify.retrieval.document_store import Store

    def told(name: str) -> None:
        step = getattr(Store, name)

        def taken(self: Store, *args: Any) -> Any:
            tell.send(f"{name}")
            result = step(self, *args)
            tell.send(f"{name} done")
            return result

        setattr(Store, name, taken)

    for name in ("append", "commit", "remove", "optimize"):
        told(name)


def index(model: str, store: str, corpus: str, tell: Connection) -> None:
    """Watch a corpus until it is indexed."""
    import torch

    from gemify import GemModel
    from gemify.io.signals import StopFlag
    from gemify.retrieval.index import GemIndex
    from gemify.retrieval.watch import watch_files

    torch.set_num_threads(1)
    _tell_steps(tell)
    opened, stop = GemIndex.open(store, GemModel.from_pretrained(model), tokens=48, overlap=8), StopFlag()
    for _ in watch_files(opened, [corpus], stop_flag=stop, commit_tokens=300, meta=META):
        stop.is_set = True


def upload_in_child(model: str, store: str, name: str, content: str, tell: Connection) -> None:
    """Put a file into a store, as the server's thread does."""
    import torch

    from gemify import GemModel
    from gemify.retrieval.index import GemIndex
    from gemify.serving import upload

    torch.set_num_threads(1)
    opened = GemIndex.open(store, GemModel.from_pretrained(model))
    _tell_steps(tell)
    upload._add(opened, upload._directory(opened) / name, content.encode())


def read_as_nobody(root: str, tell: Connection) -> None:
    """Look for files as a user who may do little."""
    from gemify.retrieval.loaders import Columns, find_files, read_file

    "".encode("utf-8-sig")  # a codec is loaded when first used, from where a nobody may not read
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    found = find_files([root])
    read: dict[str, str] = {}
    for path in found.files:
        try:
            read[path.name] = "".join(s.text for s in read_file(path, Columns()))  # type: ignore[union-attr]
        except ValueError as error:
            read[path.name] = f"error: {error}"
    gone = found.is_gone(Path(root) / "locked" / "inside.txt"), found.is_gone(Path(root) / "never.txt")
    tell.send((read, [(s.path, s.reason) for s in found.skipped], gone))


def join(rank: int, world: int, port: int) -> None:
    """Make this process one of several of a run, as a launcher would."""
    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")


def train_sharded(rank: int, world: int, port: int, recipe: str, output: str, tell: Connection) -> None:
    """The same, launched with recipes/accelerate/fsdp2.yaml; reports how many weights this process held at the end."""
    from accelerate.commands.config.config_args import load_config_from_file

    from gemify.training import fsdp

    config = load_config_from_file(str(Path(__file__).parents[1] / "recipes/accelerate/fsdp2.yaml")).fsdp_config
    os.environ.update({name.upper(): str(value) for name, value in config.items()}, ACCELERATE_USE_FSDP="true")
    gathered, held = fsdp.gather_weights, []

    def counted(objective: Any) -> Any:
        held.append(sum(p.to_local().numel() for p in objective.parameters()))
        return gathered(objective)

    fsdp.gather_weights = counted
    train_together(rank, world, port, recipe, output, tell)
    tell.send(held[-1:])


def train_together(rank: int, world: int, port: int, recipe: str, output: str, tell: Connection) -> None:
    """One process of a training run; says how it ended."""
    join(rank, world, port)
    train(recipe, output, tell)


def train(recipe: str, output: str, tell: Connection) -> None:
    """A training run on one thread, which goes on where it stopped; says how it ended."""
    import torch

    from gemify.io.signals import StopRequestedError
    from gemify.training.recipe import Recipe
    from gemify.training.trainer import train as run

    torch.set_num_threads(1)
    try:
        made = Recipe.from_dict(Recipe.read_yaml(Path(recipe)))
        _, summary = run(made, Path(output), resume=True, device="cpu", show_progress_bar=False)
        tell.send(summary)
    except (StopRequestedError, ValueError) as error:
        tell.send(str(error))


def gradients_together(rank: int, world: int, port: int, base: str, batch: Any, options: Any, tell: Connection) -> None:
    """The gradients of one process's share of a batch, averaged over all processes as DDP does."""
    join(rank, world, port)
    import torch.distributed as dist

    from gemify.training.batches import shard_batch

    dist.init_process_group("gloo")
    named = gradients(base, shard_batch(batch, rank, world), options)
    for gradient in named.values():
        dist.all_reduce(gradient)
        gradient /= world
    dist.destroy_process_group()
    tell.send({name: gradient.numpy() for name, gradient in named.items()})


def gradients(base: str, batch: Any, options: Any) -> dict[str, Any]:
    """The gradients of a batch's loss, by a gated GEM whose weights are not those of a fresh one."""
    import torch

    from gemify.model.projection import Projection
    from gemify.training.objective import Objective
    from gemify.training.recipe import Recipe
    from gemify.training.teacher import Distillation
    from tiny_gems import make_gem

    gem = make_gem(base, adapter={"lora_dropout": options.pop("dropout", 0.0)})
    if batch.targets is not None:
        weight_PD = torch.randn(batch.targets[0].shape[1], gem.get_embedding_dim(), generator=torch.manual_seed(4))
        recipe = Recipe(teacher="st:any", similarity_weight=0.5)
        options = {**options, "distillation": Distillation(Projection(weight_PD), recipe)}
    made = Objective(gem.lm, gem.adapter, gem.config, **options).double()  # float32's rounding is near 1e-5
    torch.manual_seed(3)
    made.train()(batch).total.backward()
    return {
        n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in made.named_parameters() if p.requires_grad
    }


def run_llm(home: Path, *arguments: str, plugins: str = "", **environment: str) -> str:
    """What the command `llm` prints, with a user directory and plugins of its own."""
    given = {**os.environ, "LLM_USER_PATH": str(home), "LLM_LOAD_PLUGINS": plugins, **environment}
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout
