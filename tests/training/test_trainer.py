"""Whole runs on a tiny model: what is trained, what stays, killing and resuming, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gemify.training.trainer
import tiny_models
from children import train as train_in_child
from gemify import GemModel
from gemify.io.signals import StopRequestedError
from gemify.training.batches import Batches
from gemify.training.checkpoints import last_checkpoint
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from gemify.training.trainer import train


def recipe(base_dir: Path, texts_file: Path, **options: Any) -> Recipe:
    values = {
        "base": str(base_dir),
        "data": str(texts_file),
        "max_steps": 8,
        "ntp_steps": 4,
        "batch_size": 8,
        "contrastive_batch_size": 16,
        "save_steps": 3,
        "lora_dropout": 0.1,
        **options,
    }
    if values.get("tune") == "full":
        values["lora_dropout"] = 0.0
    return Recipe.from_dict(values)


def curve(output: Path) -> list[dict[str, Any]]:
    """The loss curve: the metrics without what depends on the machine."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("peak_memory_mb", "seconds")} for row in rows]


def weights(output: Path, tune: str) -> dict[str, torch.Tensor]:
    return load_file(output / ("model.safetensors" if tune == "full" else "adapter_model.safetensors"))


@pytest.mark.parametrize("tune", ["gated", "tokens", "lora", "full"])
def test_a_run_trains_what_it_should(
    base_dir: Path, texts_file: Path, pairs_file: Path, tmp_path: Path, tune: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    gem, summary = train(
        recipe(base_dir, texts_file, tune=tune, eval_pairs=str(pairs_file), eval_steps=4),
        tmp_path / "run",
        show_progress_bar=False,
    )
    ids = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        same = torch.equal(gem.lm(input_ids=ids).logits[..., : base.config.vocab_size], base(input_ids=ids).logits)
    assert same == (tune in ("gated", "tokens"))
    fresh = GemModel.from_base(str(base_dir), tune=tune)  # type: ignore[arg-type]
    assert not (fresh.encode("hello") == gem.encode("hello")).all()
    again = GemModel.from_pretrained(tmp_path / "run")
    assert (again.encode("hello") == gem.encode("hello")).all()
    rows = curve(tmp_path / "run")
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert all("ntp" in r and "contrastive" not in r for r in steps[:4])
    assert all("contrastive" in r and "ntp" not in r for r in steps[4:])
    assert [r["step"] for r in rows if "eval_sts" in r] == [4, 8]
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved == summary
    assert {"tokens_per_second", "peak_memory_mb", "padding", "sts_spearman", "seconds"} <= set(saved)
    assert saved["padding"] < 0.1


@pytest.mark.parametrize("tune", ["gated", "lora", "full"])
def test_bfloat16_training_keeps_float32_weights(base_dir: Path, texts_file: Path, tmp_path: Path, tune: str) -> None:
    gem, _ = train(recipe(base_dir, texts_file, tune=tune, precision="bf16"), tmp_path / "run", show_progress_bar=False)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "run", tune).values())
    assert gem.lm.dtype == (torch.bfloat16 if tune == "gated" else torch.float32)
    again = GemModel.from_pretrained(tmp_path / "run")
    close = torch.cosine_similarity(torch.tensor(again.encode("hello")), torch.tensor(gem.encode("hello")), dim=0)
    assert close > 0.99


def test_ntp_training_lowers_the_loss(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    _, _ = train(
        recipe(base_dir, texts_file, max_steps=30, ntp_steps=30, lr=1e-2, reconstruction=1.0),
        tmp_path / "run",
        show_progress_bar=False,
    )
    losses = [r["ntp"] for r in curve(tmp_path / "run") if "ntp" in r]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2


def test_gradient_checkpointing_changes_nothing(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    for tune in ("lora", "full"):
        for on in (False, True):
            train(
                recipe(base_dir, texts_file, tune=tune, gradient_checkpointing=on, lora_dropout=0.0),
                tmp_path / f"{tune}-{on}",
                show_progress_bar=False,
            )
        assert curve(tmp_path / f"{tune}-False") == curve(tmp_path / f"{tune}-True")


def test_accumulation_of_ntp_equals_one_large_batch(
    base_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches of four against one batch of the same eight rows."""
    common = {"max_steps": 3, "ntp_steps": 3, "lora_dropout": 0.0, "reconstruction": 1.0}
    two = recipe(base_dir, texts_file, batch_size=4, gradient_accumulation_steps=2, **common)
    train(two, tmp_path / "two", show_progress_bar=False)
    parts = Batches.__iter__

    def joined(self: Batches) -> Any:
        self.recipe = two
        halves = [b["batch"] for b in parts(self)]
        for first, second in zip(halves[::2], halves[1::2], strict=True):
            yield {"batch": MicroBatch(0.0, [*first.rows, *second.rows], step_targets=first.step_targets)}

    monkeypatch.setattr(Batches, "__iter__", joined)
    train(recipe(base_dir, texts_file, batch_size=8, **common), tmp_path / "one", show_progress_bar=False)
    a, b = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-5)
    assert [r["grad_norm"] for r in a] == pytest.approx([r["grad_norm"] for r in b], rel=1e-4)


@pytest.mark.parametrize("tune", ["gated", "tokens"])
def test_a_text_cache_runs_texts_in_the_first_epoch_alone(base_dir: Path, tmp_path: Path, tune: str) -> None:
    """Sixteen pairs, eight a batch: every second step begins an epoch. The curve is that of texts that run."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"anchor": f"the anchor of pair {i}", "positive": f"a longer positive text {i * i}"} for i in range(16)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tune": tune, "ntp_steps": 0, "contrastive_batch_size": 8, "drop_rate": 0.0, "lora_dropout": 0.0}
    runs = {}
    for name, cache in (("plain", None), ("cached", "100MB"), ("small", "20kB")):
        made = recipe(base_dir, pairs, text_cache=cache, **options)
        runs[name] = train(made, tmp_path / name, show_progress_bar=False)
    losses = {name: [r["loss"] for r in curve(tmp_path / name) if "loss" in r] for name in runs}
    assert losses["cached"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["small"] == pytest.approx(losses["plain"], abs=1e-5)
    vectors = {name: gem.encode(["some text", "another one"]) for name, (gem, _) in runs.items()}
    assert vectors["cached"] == pytest.approx(vectors["plain"], abs=1e-5)
    steps = [r for r in curve(tmp_path / "cached") if "loss" in r]
    assert [r["tokens"] == 0 for r in steps] == [False] * 2 + [True] * 6
    assert all(r["cached"] == 0 for r in steps[:2])
    assert runs["cached"][1]["cached_tokens"] == 3 * runs["cached"][1]["tokens"]
    assert 0 < runs["small"][1]["cached_tokens"] < runs["cached"][1]["cached_tokens"]
    assert "cached_tokens" not in runs["plain"][1]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("tune", ["gated", "embedding_lora"])
def test_a_quantized_base_is_trained_on(
    base_dir: Path, texts_file: Path, tmp_path: Path, tune: str, quantize: str
) -> None:
    """The losses are near those of the base as it is, and the saved GEM has its vectors on the quantized base."""
    options = {"tune": tune, "lora_dropout": 0.0, "precision": "bf16", "ntp_steps": 0}
    options |= {"special_tokens": 0, "attention": "bidirectional"} if tune == "embedding_lora" else {}
    runs = {}
    for name, bits in (("plain", None), ("quantized", quantize)):
        made = recipe(base_dir, texts_file, quantize=bits, **options)
        runs[name], _ = train(made, tmp_path / name, show_progress_bar=False)
    ours, plain = ([r["loss"] for r in curve(tmp_path / name) if "loss" in r] for name in ("quantized", "plain"))
    assert ours != plain
    assert ours == pytest.approx(plain, rel=0.3)
    again = GemModel.from_pretrained(tmp_path / "quantized", quantize=quantize)
    assert torch.equal(torch.as_tensor(again.encode("hello")), torch.as_tensor(runs["quantized"].encode("hello")))
    assert again.config.base_fingerprint == runs["plain"].config.base_fingerprint


def test_only_a_frozen_base_is_quantized() -> None:
    for wrong in ({"tune": "lora"}, {"tune": "full"}, {"tune": "gated", "precision": "fp32"}):
        with pytest.raises(ValueError, match=r"quantize needs a frozen base .* and bfloat16"):
            Recipe.from_dict({"data": "x", "quantize": "int4", **wrong})
    with pytest.raises(ValueError, match="unknown quantization 'int3'"):
        Recipe.from_dict({"data": "x", "quantize": "int3"})


@pytest.mark.parametrize("tune", ["gated", "full"])
def test_sigkill_and_resume_is_the_uninterrupted_run(
    base_dir: Path, texts_file: Path, tmp_path: Path, server: ForkServerContext, tune: str
) -> None:
    """Killed at random moments, again and again, until it is through: same curve, same weights, to the bit."""
    made = recipe(base_dir, texts_file, tune=tune, max_steps=24, ntp_steps=10, save_steps=2)
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())

    def start(name: str) -> tuple[Any, Connection]:
        ours, theirs = server.Pipe()
        child = server.Process(
            target=train_in_child, args=(str(tmp_path / "recipe.yaml"), str(tmp_path / name), theirs)
        )
        child.start()
        theirs.close()
        return child, ours

    start("whole")[0].join()
    rng = random.Random(tune)
    metrics, kills = tmp_path / "killed" / "metrics.jsonl", 0
    while True:
        stamp = metrics.stat().st_mtime_ns if metrics.exists() else 0
        child, told = start("killed")
        if kills < 3:
            while child.is_alive() and not (metrics.exists() and metrics.stat().st_mtime_ns != stamp):
                time.sleep(0.01)  # until it trains
            time.sleep(rng.uniform(0.0, 0.4))
            kills += child.is_alive()
            child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            break
    assert child.exitcode == 0
    assert told.recv()["steps"] == made.max_steps
    assert kills >= 1
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "killed", tune), weights(tmp_path / "whole", tune)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_stops_with_a_checkpoint(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    made = recipe(base_dir, texts_file, max_steps=20, save_steps=50)

    def stop(_: GemModel) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.3)

    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(StopRequestedError, match="go on with --resume"):
            train(
                Recipe.from_dict({**_plain(made), "max_steps": 2000, "ntp_steps": 1000}),
                tmp_path / "run",
                show_progress_bar=False,
                on_ready=stop,
            )
    finally:
        signal.signal(signal.SIGALRM, before)
    assert last_checkpoint(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def _plain(made: Recipe) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load(made.to_yaml())
    return values


def test_a_loss_that_is_no_number_ends_the_run(
    base_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gemify.training.trainer.GemTrainer.create_optimizer

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.gem.adapter.rows.rows_KD.fill_(float("nan"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(gemify.training.trainer.GemTrainer, "create_optimizer", poisoned)
    with pytest.raises(FloatingPointError, match="became nan at step 1: lower the learning rate"):
        train(recipe(base_dir, texts_file), tmp_path / "run", show_progress_bar=False)
    assert not (tmp_path / "run" / "config_gemify.json").exists()


def test_a_full_disk_during_a_checkpoint_keeps_the_earlier_ones(
    base_dir: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GemModel.save_pretrained
    calls: list[int] = []

    def fills_up(self: GemModel, path: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(self, path, **options)

    monkeypatch.setattr(GemModel, "save_pretrained", fills_up)
    with pytest.raises(OSError, match="No space left"):
        train(recipe(base_dir, texts_file), tmp_path / "run", show_progress_bar=False)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]
    monkeypatch.undo()
    train(recipe(base_dir, texts_file), tmp_path / "run", resume=True, show_progress_bar=False)
    train(recipe(base_dir, texts_file), tmp_path / "whole", show_progress_bar=False)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_the_output_directory_is_guarded(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    made = recipe(base_dir, texts_file, max_steps=2, ntp_steps=2)
    train(made, tmp_path / "run", show_progress_bar=False)
    again, summary = train(made, tmp_path / "run", resume=True, show_progress_bar=False)  # complete: nothing to do
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert again.config.tune == "gated"
    with pytest.raises(ValueError, match="is not empty: add --resume"):
        train(made, tmp_path / "run", show_progress_bar=False)
    with pytest.raises(ValueError, match="cannot resume with another recipe: lr was"):
        train(recipe(base_dir, texts_file, max_steps=2, ntp_steps=2, lr=0.5), tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="no run to resume"):
        train(made, tmp_path / "other", resume=True)
    with pytest.raises(ValueError, match="is a file"):
        train(made, texts_file)


def test_a_template_is_trained_saved_and_kept_on_resuming(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    words = 'say : "{text}" is:"'
    gem, _ = train(recipe(base_dir, texts_file, template=words), tmp_path / "run", show_progress_bar=False)
    assert gem.config.template == words
    plain, _ = train(recipe(base_dir, texts_file), tmp_path / "plain", show_progress_bar=False)
    ours, theirs = (curve(tmp_path / name) for name in ("run", "plain"))
    assert ours[:4] == theirs[:4]  # next-token steps have no template
    assert all(a["contrastive"] != b["contrastive"] for a, b in zip(ours[4:8], theirs[4:8], strict=True))
    again = GemModel.from_pretrained(tmp_path / "run")
    assert (again.encode("hello") == gem.encode("hello")).all()
    assert not (plain.encode("hello") == gem.encode("hello")).all()
    with pytest.raises(ValueError, match="cannot resume with another recipe: template was 'say"):
        train(recipe(base_dir, texts_file), tmp_path / "run", resume=True)
    path = tmp_path / "plain" / "recipe.yaml"
    path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if not x.startswith("template")))
    train(recipe(base_dir, texts_file), tmp_path / "plain", resume=True)  # a run of before there were templates


def test_rows_that_outrun_the_models_positions_are_refused(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set --max-length to at most 511"):
        train(recipe(base_dir, texts_file, max_length=600), tmp_path / "run", show_progress_bar=False)
    narrow = tiny_models.build("llama")
    narrow.config.max_position_embeddings = 650
    narrow.save_pretrained(tmp_path / "narrow")
    tiny_models.tokenizer().save_pretrained(tmp_path / "narrow")
    made = recipe(tmp_path / "narrow", texts_file, max_length=300, template="x" * 400 + "{text}")
    with pytest.raises(ValueError, match=r"up to 701 positions, .* has 650: set --max-length to at most 249"):
        train(made, tmp_path / "run", show_progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_bad_data_leaves_nothing_behind(base_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\x00\xff" * 100)
    with pytest.raises(ValueError, match="not UTF-8"):
        train(recipe(base_dir, bad), tmp_path / "run", show_progress_bar=False)
    assert not (tmp_path / "run").exists()
