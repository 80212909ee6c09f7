"""Several processes of one run: real ones, over gloo, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

import children
import tiny_models
from gemify.paper.tokens import reconstruction_row, split_row
from gemify.paper.views import View, full_view
from gemify.training.batches import Batches
from gemify.training.checkpoints import last_checkpoint
from gemify.training.distributed import RankShard
from gemify.training.examples import Source
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from gemify.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(server: ForkServerContext, work: Callable[..., None], *args: Any) -> list[tuple[Any, Connection]]:
    """Two processes of one piece of work, and where each says how it ended."""
    port, started = free_port(), []
    for rank in range(2):
        hears, tells = server.Pipe(duplex=False)
        process = server.Process(target=work, args=(rank, 2, port, *args, tells))
        process.start()
        tells.close()
        started.append((process, hears))
    return started


def heard(started: list[tuple[Any, Connection]]) -> list[Any]:
    told = [hears.recv() for _, hears in started]
    for process, _ in started:
        process.join(60)
        assert process.exitcode == 0
    return told


def recipe(base_dir: Path, texts_file: Path, path: Path, **options: Any) -> Recipe:
    """Batches whose rows do not come out even over two processes."""
    common = {"max_steps": 6, "ntp_steps": 3, "batch_size": 7, "contrastive_batch_size": 9, "save_steps": 3}
    made = Recipe.from_dict({"base": str(base_dir), "data": str(texts_file), **common, **options})
    path.write_text(made.to_yaml())
    return made


def curve(output: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {n: [r[n] for r in rows if n in r] for n in ("loss", "ntp", "contrastive", "scale", "grad_norm", "eval_sts")}


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = curve(one), curve(other)
    assert [len(v) for v in ours.values()] == [len(v) for v in theirs.values()]
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
    name = "model.safetensors" if (one / "model.safetensors").exists() else "adapter_model.safetensors"
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "gated", "gradient_accumulation_steps": 2, "contrastive_chunk_size": 2},
        {"tune": "full", "lr": 1e-4, "contrastive_lr": 1e-4, "contrastive_batch_size": None, "mix": 0.5},
    ],
    ids=["gated", "full"],
)
def test_two_processes_train_as_one(
    base_dir: Path, texts_file: Path, tmp_path: Path, server: ForkServerContext, options: dict[str, Any]
) -> None:
    made = recipe(base_dir, texts_file, tmp_path / "recipe.yaml", **options)
    told = heard(start(server, children.train_together, str(tmp_path / "recipe.yaml"), str(tmp_path / "two")))
    train(made, tmp_path / "one", show_progress_bar=False)
    assert told[0]["steps"] == told[1]["steps"] == 6
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_run_goes_on_in_another_number_of_processes(
    base_dir: Path, texts_file: Path, tmp_path: Path, server: ForkServerContext
) -> None:
    made = recipe(base_dir, texts_file, tmp_path / "recipe.yaml")
    train(made, tmp_path / "one", show_progress_bar=False)
    heard(start(server, children.train_together, str(tmp_path / "recipe.yaml"), str(tmp_path / "two")))
    assert_either_goes_on(made, tmp_path, server, children.train_together)


def assert_either_goes_on(made: Recipe, root: Path, server: ForkServerContext, together: Callable[..., None]) -> None:
    """What two processes began one ends, and the other way round, as if nothing had happened."""
    for name in ("one", "two"):
        half(root / name)
    train(made, root / "half-two", resume=True, show_progress_bar=False)
    heard(start(server, together, str(root / "recipe.yaml"), str(root / "half-one")))
    for name in ("half-two", "half-one"):
        assert_same_run(root / name, root / "one")


def half(run: Path) -> None:
    """A copy of a run as if killed between the checkpoint and the end."""
    copy = run.parent / f"half-{run.name}"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "checkpoint-6")
    for made_last in ("summary.json", "config_gemify.json", "adapter_model.safetensors", "model.safetensors"):
        (copy / made_last).unlink(missing_ok=True)


def test_weights_cut_up_over_two_processes_train_as_one(
    texts_file: Path, tmp_path: Path, server: ForkServerContext
) -> None:
    """FSDP2 on tied embeddings, with all that runs layers again; either checkpoint goes on as the other's kind."""
    pairs = [{"sentence1": "the cat sat", "sentence2": f"the {'dog ' * n}ran", "score": n % 5} for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    again = {"gradient_accumulation_steps": 2, "contrastive_chunk_size": 2, "gradient_checkpointing": True}
    options = {"mix": 0.5, "lr": 1e-4, "contrastive_lr": 1e-4, "eval_pairs": str(tmp_path / "pairs.jsonl"), **again}
    base = tiny_models.save(tmp_path / "base", "gemma3")
    made = recipe(base, texts_file, tmp_path / "recipe.yaml", tune="full", eval_steps=4, **options)
    started = start(server, children.train_sharded, str(tmp_path / "recipe.yaml"), str(tmp_path / "two"))
    summaries = heard(started)
    held = [hears.recv()[0] for _, hears in started]
    train(made, tmp_path / "one", show_progress_bar=False)
    assert summaries[0]["steps"] == 6
    assert sum(held) == summaries[0]["trainable_parameters"]
    assert max(held) < 0.6 * sum(held)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert_either_goes_on(made, tmp_path, server, children.train_sharded)


def test_a_signal_to_one_process_stops_all_at_one_step(
    base_dir: Path, texts_file: Path, tmp_path: Path, server: ForkServerContext
) -> None:
    recipe(base_dir, texts_file, tmp_path / "recipe.yaml", max_steps=5000, ntp_steps=2500, save_steps=5000)
    started = start(server, children.train_together, str(tmp_path / "recipe.yaml"), str(tmp_path / "run"))
    until(lambda: lines(tmp_path / "run" / "metrics.jsonl") > 2)
    os.kill(started[1][0].pid, signal.SIGTERM)
    told = heard(started)
    assert told[0] == told[1]
    assert told[0].startswith("stopped at step")
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert f"step {checkpoint.name.split('-')[1]} of 5000" in told[0]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_killed_worker_ends_the_run_which_then_goes_on(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    """With the real launcher: it fails soon, nothing is half-written, and the run in one process finishes it."""
    made = recipe(base_dir, texts_file, tmp_path / "recipe.yaml", max_steps=400, ntp_steps=200, save_steps=2)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes/accelerate/ddp.yaml"), "--num_processes", "2"]
    command += ["-m", "gemify", "train", "--config", str(tmp_path / "recipe.yaml"), "-o", str(run), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen([*command, "-q"], stdout=log, stderr=log, env=environment)
        try:
            until(lambda: last_checkpoint(run) is not None and lines(run / "metrics.jsonl") > 4, launcher)
            os.kill(workers(launcher.pid)[1], signal.SIGKILL)
            assert launcher.wait(60) != 0
        finally:
            launcher.kill()
    assert not (run / "summary.json").exists()
    assert not (run / "adapter_model.safetensors").exists()
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    assert all(p.stat().st_size for p in checkpoint.iterdir())
    done = int(checkpoint.name.split("-")[1])
    shorter = Recipe.from_dict({**Recipe.read_yaml(run / "recipe.yaml")})
    assert shorter == made
    alone = start_alone(made, run, stop_after=done + 2)
    assert [r["step"] for r in alone] == list(range(1, len(alone) + 1))
    assert len(alone) >= done + 2


def start_alone(made: Recipe, run: Path, *, stop_after: int) -> list[dict[str, Any]]:
    """Go on with a run in this process for some steps; its metrics."""
    before = signal.signal(signal.SIGALRM, lambda *_: lines(run / "metrics.jsonl") >= stop_after and stop())
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)

    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Exception, match="stopped at step"):
            train(made, run, resume=True, show_progress_bar=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def workers(launcher: int) -> list[int]:
    import psutil

    found = [c for c in psutil.Process(launcher).children(recursive=True) if "RANK" in c.environ()]
    return [c.pid for c in sorted(found, key=lambda c: int(c.environ()["RANK"]))]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(holds: Callable[[], bool], running: subprocess.Popen[bytes] | None = None) -> None:
    for _ in range(1200):
        if holds():
            return
        assert running is None or running.poll() is None, "the launcher ended"
        time.sleep(0.05)
    raise AssertionError("waited a minute in vain")


VIEWS = [
    (full_view([20, 21, 22, 23, 24]), full_view([20, 22, 24])),
    (full_view([30, 31]), View((30, 31), (False, True))),
    (View((50, 51, 52, 53), (True, False, True, True)), View((50, 51, 52, 53), (False, True, True, True))),
    (full_view([20, 21, 22, 23, 24]), full_view([60, 61])),
    (full_view([70, 71, 72]), full_view([73, 72])),
]
ROWS = [
    split_row(list(range(20, 32)), 5),
    reconstruction_row(list(range(40, 47)), end_ids=[2]),
    split_row(list(range(60, 63)), 2),
]


KEYS = [(0, 10, 11, 40), (1, 12, 12, -1), (2, 13, 14, 11), (3, 10, 15, 41), (1, 16, 17, 42)]
"""Pairs 0 and 3 have one anchor, 1 and 4 one id; a negative is the first positive, another only fills up."""
TRIPLES = [(*pair, full_view([80 + i, 81, 82])) for i, pair in enumerate(VIEWS)]
TAUGHT = list(np.random.default_rng(0).standard_normal((len(VIEWS), 2, 6)).astype(np.float32))


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("taught", [None, TAUGHT], ids=["contrast", "teacher"])
@pytest.mark.parametrize("options", [{}, {"contrastive_chunk_size": 2}, {"sharded": True, "group_tokens": 12}])
def test_gathered_negatives_have_the_gradient_of_the_whole_batch(
    base_dir: Path, server: ForkServerContext, options: dict[str, Any], taught: list[np.ndarray] | None, equal: bool
) -> None:
    """Five pairs (with negatives and equal texts) and three rows over two processes, the temperature included."""
    targets = sum(len(r.suffix) for r in ROWS)
    batch = MicroBatch(0.5, ROWS, VIEWS, step_targets=targets, targets=taught)
    if equal:
        vectors = taught and [np.concatenate([v, v[:1] + 0.5]) for v in taught]
        batch = MicroBatch(0.5, ROWS, TRIPLES, step_targets=targets, targets=vectors, keys=KEYS)
    together = heard(start(server, children.gradients_together, str(base_dir), batch, options))
    alone = children.gradients(str(base_dir), batch, {})
    assert float(alone["temperature.t"].abs()) > 1e-4
    expected = np.concatenate([gradient.numpy().ravel() for gradient in alone.values()])
    for ours in together:
        got = np.concatenate([ours[name].ravel() for name in alone])
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)
        np.testing.assert_allclose(ours["temperature.t"], alone["temperature.t"].numpy(), rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_batch_is_dealt_out_whole(world: int) -> None:
    items = list(range(7))
    shares = [RankShard.of(items, rank, world) for rank in range(world)]
    assert len({len(s.items) for s in shares}) == 1
    assert sorted(i for s in shares for i in s.items[: s.own]) == items
    interleaved = [s.items[at] for at in range(len(shares[0].items)) for s in shares]
    assert interleaved[: len(items)] == items


def test_more_processes_than_rows_are_refused(gem: Any, texts_file: Path) -> None:
    made = Recipe.from_dict({"data": str(texts_file), "batch_size": 2})
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be shared by 3 processes"):
        Batches(made, Source(str(texts_file)), gem.text_tokenizer, end_id=None, world=3)


def test_the_launchers_configuration_parses_and_what_cannot_run_is_refused(
    base_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = set(vars(launch_command_parser().parse_args(["train.py"])))
    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")):
        config = load_config_from_file(str(ROOT / "recipes/accelerate" / f"{name}.yaml"))
        assert (config.num_processes, config.distributed_type) == (2, kind)
        assert known >= {*(config.fsdp_config or {}), *(config.deepspeed_config or {})}
    with pytest.raises(ValueError, match="'flex_attention' cannot train on a CPU"):
        train(
            recipe(base_dir, texts_file, tmp_path / "r.yaml", attn_implementation="flex_attention"),
            tmp_path / "run",
            device="cpu",
        )


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"tune": "full"}, "cannot train under DeepSpeed"),
        ({"WORLD_SIZE": "1"}, {"tune": "full"}, "cannot shard weights over 1 process"),
        ({"FSDP_VERSION": "1"}, {"tune": "full"}, "set fsdp_version to 2"),
        ({}, {"tune": "gated"}, "cannot train --tune gated under FSDP: launch with recipes/accelerate/ddp.yaml"),
        ({}, {"tune": "lora"}, "cannot train --tune lora"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"tune": "full"}, "fsdp_offload_params: true, set it to false"),
    ],
)
def test_a_way_to_shard_weights_that_is_not_tested_is_refused(
    base_dir: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    options: dict[str, Any],
    message: str,
) -> None:
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    for name, value in {**launched, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(recipe(base_dir, texts_file, tmp_path / "r.yaml", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()
