"""Training on a GPU against the same run on the CPU: losses, gradients, weights, checkpoints, a teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pretend_device
from gemify import GemModel
from gemify.paper.tokens import raw_row, reconstruction_row, split_row
from gemify.paper.views import View, full_view
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from gemify.training.teacher import Teacher
from gemify.training.trainer import train
from gpu_device import DEVICE, KINDS, NEEDS_GPU, TEXTS
from tiny_gems import make_gem, make_objective

pytestmark = NEEDS_GPU
needs_trainer = pytest.mark.skipif(DEVICE == pretend_device.NAME, reason="transformers' Trainer knows no such device")
FLOAT32: dict[str, Any] = {"dtype": torch.float32}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMIFY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def teacher_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence-transformers model of 12 dimensions."""
    library = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    torch.manual_seed(5)
    parts = [
        models.Transformer(str(base_dir)),
        models.Pooling(32, "mean"),
        models.Dense(32, 12, activation_function=torch.nn.Tanh()),
    ]
    directory = tmp_path_factory.mktemp("teacher")
    library.SentenceTransformer(modules=parts, device="cpu").save(str(directory))
    return directory


def recipe(base_dir: Path, data: Path, **options: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "base": str(base_dir),
            "data": str(data),
            "max_steps": 3,
            "ntp_steps": 1,
            "ramp_steps": 2,
            "batch_size": 6,
            "contrastive_batch_size": 8,
            "precision": "fp32",
            "warmup_steps": 0,
            **options,
        }
    )


def curve(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # Not the tokens: a GPU's groups are larger, and hold more padding.
    names = ("step", "loss", "ntp", "contrastive", "distillation", "scale")
    return [{name: row[name] for name in names if name in row} for row in rows if "loss" in row]


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float = 1e-4) -> bool:
    assert len(ours) == len(theirs)
    return all(one == pytest.approx(other, rel=rel, abs=1e-6) for one, other in zip(ours, theirs, strict=True))


def batch(alpha: float) -> MicroBatch:
    ids = [list(range(20 + 9 * i, 34 + 10 * i)) for i in range(6)]
    rows = [split_row(ids[0], 9), split_row(ids[1], 3), reconstruction_row(ids[2][:5]), raw_row(ids[3])]
    views = []
    for i in ids:
        hidden = View(tuple(i), tuple(at % 4 != 1 for at in range(len(i))))
        views.append((hidden, full_view(i[: 3 + i[0] % 7])))
    return MicroBatch(alpha, rows=rows, views=views, step_targets=40)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kind", ["gated", "gated-2", "gated-layer", "tokens", "lora", "full", "embedding-lora-mean"])
def test_losses_and_gradients_are_the_cpus(base_dir: Path, kind: str, chunk: int | None) -> None:
    alpha = 1.0 if kind.startswith("embedding") else 0.5
    found = []
    for device in (DEVICE, "cpu"):
        gem = make_gem(base_dir, **KINDS[kind], device=device, **FLOAT32)
        frozen = gem.config.frozen_base
        objective = make_objective(gem, frozen=frozen, group_tokens=48, contrastive_chunk_size=chunk).to(device)
        rows = batch(alpha)
        if frozen:
            rows = MicroBatch(alpha, rows=rows.rows[:3], views=rows.views, step_targets=rows.step_targets)
        losses = objective(rows)
        losses.total.backward()
        grads = {n: p.grad.cpu() for n, p in objective.named_parameters() if p.grad is not None}
        found.append(([losses.total, losses.ntp, losses.contrastive], losses.counts, grads))
    (ours, counts, grads), (theirs, their_counts, their_grads) = found
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.device.type == torch.device(DEVICE).type
            torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
    assert counts == their_counts
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        difference = (grad - their_grads[name]).norm()
        assert difference <= 1e-3 * their_grads[name].norm() + 1e-6, name


@needs_trainer
@pytest.mark.parametrize("tune", ["gated", "tokens", "lora", "full"])
def test_three_steps_are_the_cpus(base_dir: Path, texts_file: Path, tmp_path: Path, tune: str) -> None:
    made = recipe(base_dir, texts_file, tune=tune)
    gem, summary = train(made, tmp_path / "gpu", device=DEVICE, show_progress_bar=False)
    cpu, _ = train(made, tmp_path / "cpu", device="cpu", show_progress_bar=False)
    assert summary["device"] == gem.device.type == torch.device(DEVICE).type
    assert close(curve(tmp_path / "gpu"), curve(tmp_path / "cpu"))
    np.testing.assert_allclose(gem.encode(TEXTS), cpu.encode(TEXTS), atol=2e-3)
    again = GemModel.from_pretrained(tmp_path / "gpu", device=DEVICE, **FLOAT32)
    np.testing.assert_allclose(again.encode(TEXTS), gem.encode(TEXTS), atol=1e-5)


@needs_trainer
@pytest.mark.parametrize("tune", ["gated", "lora", "full"])
def test_three_steps_in_bfloat16(base_dir: Path, texts_file: Path, tmp_path: Path, tune: str) -> None:
    made = recipe(base_dir, texts_file, tune=tune, precision="auto" if DEVICE != "cpu" else "bf16")
    gem, _ = train(made, tmp_path / "gpu", device=DEVICE, show_progress_bar=False)
    train(recipe(base_dir, texts_file, tune=tune), tmp_path / "cpu", device="cpu", show_progress_bar=False)
    assert gem.lm.dtype == (torch.bfloat16 if tune == "gated" else torch.float32)
    ours, theirs = ([row["loss"] for row in curve(tmp_path / name)] for name in ("gpu", "cpu"))
    assert ours == pytest.approx(theirs, rel=5e-2)


def distilled(base_dir: Path, data: Path, teacher_dir: Path, **options: Any) -> Recipe:
    own = {"tune": "embedding_lora", "attention": "bidirectional", "special_tokens": 0}
    learned = {"teacher": f"st:{teacher_dir}", "ridge_texts": 16, "similarity_weight": 0.3, "ntp_steps": 0}
    return recipe(base_dir, data, **{**own, **learned, "ramp_steps": 0, **options})


@needs_trainer
def test_three_steps_with_a_teacher_are_the_cpus(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    made = distilled(base_dir, texts_file, teacher_dir)
    cpu, _ = train(made, tmp_path / "cpu", device="cpu", show_progress_bar=False)
    gem, _ = train(made, tmp_path / "gpu", device=DEVICE, show_progress_bar=False)  # with the vectors kept before
    assert all("distillation" in row for row in curve(tmp_path / "gpu"))
    assert close(curve(tmp_path / "gpu"), curve(tmp_path / "cpu"))
    assert gem.projection is not None
    assert gem.projection.weight_PD.device.type == torch.device(DEVICE).type
    np.testing.assert_allclose(gem.encode(TEXTS), cpu.encode(TEXTS), atol=2e-3)


@needs_trainer
def test_a_teachers_vectors(teacher_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Teacher(f"st:{teacher_dir}", device=DEVICE).vectors(TEXTS)
    monkeypatch.setenv("GEMIFY_HOME", str(home / "other"))
    np.testing.assert_allclose(ours, Teacher(f"st:{teacher_dir}", device="cpu").vectors(TEXTS), atol=1e-3)


@needs_trainer
@pytest.mark.parametrize("tune", ["gated", "full", "embedding_lora"])
def test_a_resumed_run_is_the_uninterrupted_one(
    base_dir: Path, texts_file: Path, tmp_path: Path, tune: str, request: pytest.FixtureRequest
) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "save_total_limit": 9}
    if tune == "embedding_lora":
        request.getfixturevalue("home")
        made = distilled(base_dir, texts_file, request.getfixturevalue("teacher_dir"), **options)
    else:
        dropout = {} if tune == "full" else {"lora_dropout": 0.1}
        made = recipe(base_dir, texts_file, tune=tune, **options, **dropout)
    train(made, tmp_path / "whole", device=DEVICE, show_progress_bar=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"checkpoint-{step}")
    train(made, tmp_path / "killed", device=DEVICE, resume=True, show_progress_bar=False)
    assert close(curve(tmp_path / "killed"), curve(tmp_path / "whole"), rel=1e-5)
    name = "model.safetensors" if tune == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-4, rtol=1e-4)


@needs_trainer
def test_activation_checkpointing(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    curves = []
    for wanted in (True, False):
        made = recipe(base_dir, texts_file, tune="full", gradient_checkpointing=wanted)
        train(made, tmp_path / str(wanted), device=DEVICE, show_progress_bar=False)
        curves.append(curve(tmp_path / str(wanted)))
    assert close(*curves, rel=1e-5)
