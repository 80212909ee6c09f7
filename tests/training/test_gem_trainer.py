"""GemTrainer: data sets in memory, transformers' arguments, callbacks, evaluation, resuming, the Hub."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from gemify import GemModel, GemTrainer
from gemify.training.batches import Batches
from gemify.training.recipe import Recipe
from gemify.training.trainer import train
from tiny_gems import make_gem

RECIPE = {"ntp_steps": 3, "contrastive_batch_size": 4, "min_length": 2}


def arguments(output: Path, **options: Any) -> TrainingArguments:
    values = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, **options}
    return TrainingArguments(
        output_dir=str(output), use_cpu=True, disable_tqdm=True, **{"report_to": "none", "save_steps": 3, **values}
    )


def chats(count: int = 30) -> Dataset:
    rows = [[("user", f"what is {n}?"), ("assistant", f"a number, {n}")] for n in range(count)]
    return Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in row]} for row in rows])


def texts(texts_file: Path) -> list[str]:
    return texts_file.read_text().splitlines()


def curve(trainer: GemTrainer) -> list[dict[str, float]]:
    names = ("loss", "ntp", "contrastive", "alpha", "scale", "grad_norm", "learning_rate")
    return [{n: e[n] for n in names if n in e} for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("tune", ["gated", "tokens", "lora", "full", "embedding_lora"])
def test_it_trains_on_a_data_set_of_conversations(base_dir: Path, tmp_path: Path, tune: str) -> None:
    gem = GemModel.from_base(str(base_dir), tune=tune)  # type: ignore[arg-type]
    before = gem.encode("what is 3?")
    recipe = RECIPE | ({"ntp_steps": 0} if tune == "embedding_lora" else {})
    trainer = GemTrainer(gem, arguments(tmp_path / "run"), chats(), recipe=recipe)
    trainer.train()
    rows = curve(trainer)
    assert len(rows) == 6
    assert all("ntp" in r for r in rows[: recipe["ntp_steps"]])
    assert all("contrastive" in r for r in rows[recipe["ntp_steps"] :])
    assert not (gem.encode("what is 3?") == before).all()
    trainer.save_model(str(tmp_path / "gem"))
    assert (GemModel.from_pretrained(tmp_path / "gem").encode("what is 3?") == gem.encode("what is 3?")).all()


def test_the_command_trains_by_the_same_class(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    """With one rate and no warm-up a recipe's schedule is transformers' cosine."""
    entries = {"max_steps": 6, "batch_size": 8, "lr": 1e-3, "contrastive_lr": 1e-3, "warmup_steps": 0, **RECIPE}
    recipe = Recipe.from_dict({"base": str(base_dir), "data": str(texts_file), **entries})
    train(recipe, tmp_path / "command", device="cpu", show_progress_bar=False)
    wanted = [json.loads(line) for line in (tmp_path / "command" / "metrics.jsonl").read_text().splitlines()]
    torch.manual_seed(0)
    gem = GemModel.from_base(str(base_dir))
    trainer = GemTrainer(
        gem, arguments(tmp_path / "run", seed=0, lr_scheduler_type="cosine"), texts(texts_file), recipe=RECIPE
    )
    trainer.train()
    assert [r["loss"] for r in curve(trainer)] == pytest.approx([r["loss"] for r in wanted], rel=1e-5)


def test_the_commands_reports(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    entries = {"max_steps": 1, "batch_size": 4, **RECIPE, "ntp_steps": 1}
    recipe = Recipe.from_dict({"base": str(base_dir), "data": str(texts_file), **entries})
    for name, report_to in (("some", ()), ("none", ("none",))):
        train(recipe, tmp_path / name, device="cpu", show_progress_bar=False, report_to=report_to)
    assert list((tmp_path / "some" / "tensorboard").glob("events.out.tfevents*"))
    assert not list((tmp_path / "none").rglob("events.out.tfevents*"))
    with pytest.raises(ValueError, match="nowhere is not supported"):
        train(recipe, tmp_path / "nowhere", device="cpu", show_progress_bar=False, report_to=["nowhere"])


@pytest.mark.parametrize("tune", ["gated", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(base_dir: Path, tmp_path: Path, tune: str) -> None:
    def make(name: str) -> GemTrainer:
        torch.manual_seed(0)
        gem = GemModel.from_base(str(base_dir), tune=tune)  # type: ignore[arg-type]
        return GemTrainer(gem, arguments(tmp_path / name), chats(), recipe=RECIPE)

    whole = make("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    cut = make("cut")
    cut.train(resume_from_checkpoint=True)
    assert curve(cut) == curve(whole)
    assert (cut.gem.encode("what is 3?") == whole.gem.encode("what is 3?")).all()


class Steps(TrainerCallback):
    """Remembers the steps and what was logged."""

    def __init__(self) -> None:
        self.steps, self.logs = 0, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(logs)


def test_callbacks_reports_and_means_over_logged_steps(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    def run(name: str, steps: int, **options: Any) -> tuple[GemTrainer, Steps]:
        seen = Steps()
        torch.manual_seed(0)
        gem = GemModel.from_base(str(base_dir))
        args = arguments(tmp_path / name, logging_steps=steps, gradient_accumulation_steps=2, **options)
        trainer = GemTrainer(gem, args, texts(texts_file), recipe=RECIPE, callbacks=[seen])
        trainer.train()
        return trainer, seen

    (one, seen), (three, _) = run("one", 1), run("three", 3, report_to="tensorboard")
    assert seen.steps == 6
    losses = [r["ntp"] for r in curve(one)[:3]]
    assert [r["ntp"] for r in curve(three) if "ntp" in r] == [pytest.approx(sum(losses) / 3)]
    assert sum(e["tokens"] for e in seen.logs if "tokens" in e) == sum(
        e["tokens"] for e in three.state.log_history if "tokens" in e
    )
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_epochs_are_counted_in_rows(base_dir: Path, tmp_path: Path) -> None:
    gem = GemModel.from_base(str(base_dir))
    trainer = GemTrainer(gem, arguments(tmp_path, max_steps=-1, num_train_epochs=2), chats(30), recipe=RECIPE)
    assert trainer.args.max_steps == 8  # 30 rows are 4 batches of 8


def test_held_out_rows_evaluators_and_metrics(base_dir: Path, tmp_path: Path) -> None:
    gem = GemModel.from_base(str(base_dir), tune="full")
    args = arguments(
        tmp_path, max_steps=12, eval_strategy="steps", eval_steps=6, save_strategy="no", learning_rate=3e-3
    )

    def accuracy(predicted: Any) -> dict[str, float]:
        first, second = predicted.predictions
        assert (first == gem.encode([f"what is {n}?" for n in range(30)])).all()
        return {"accuracy": float(((first @ second.T).argmax(1) == predicted.label_ids).mean())}

    trainer = GemTrainer(
        gem,
        args,
        chats(),
        chats(),
        recipe=RECIPE | {"ntp_steps": 6, "mix": 0.5},
        evaluator=lambda trained: float(np.linalg.norm(trained.encode("hello"))),
        compute_metrics=accuracy,
    )
    first = trainer.evaluate()
    assert first.keys() == {"eval_ntp", "eval_contrastive", "eval_loss", "eval_accuracy", "eval_score"}
    assert first["eval_loss"] == first["eval_ntp"]  # alpha is 0 in the first phase
    assert trainer.evaluate() == first
    sums: dict[str, float] = {"loss": 0.0, "targets": 0.0}
    for batch, counts in trainer.batches.held_out():  # the training rows are the held-out ones
        with torch.no_grad():
            sums["loss"] += float(trainer.model(batch).ntp) * counts["ntp"]
        sums["targets"] += counts["ntp"]
    assert first["eval_ntp"] == pytest.approx(sums["loss"] / sums["targets"])
    trainer.train()
    last = [e for e in trainer.state.log_history if "eval_ntp" in e][-1]
    assert last["eval_ntp"] < first["eval_ntp"] - 0.1
    assert last["eval_loss"] == last["eval_contrastive"]


def test_the_best_checkpoint_is_loaded(base_dir: Path, tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 1.0])
    vectors: list[np.ndarray] = []

    def evaluator(gem: GemModel) -> dict[str, float]:
        vectors.append(gem.encode("hello"))
        return {"sts": next(scores)}

    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_sts", "greater_is_better": True}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, **options)
    gem = GemModel.from_base(str(base_dir))
    GemTrainer(gem, args, chats(), recipe=RECIPE, evaluator=evaluator).train()
    assert (gem.encode("hello") == vectors[0]).all()


def test_several_data_sets_are_chosen_by_their_size(base_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    pairs = [(f"what is {n}?", f"a number, {n}") for n in range(20)]
    data = {"texts": texts(texts_file), "pairs": pairs}
    trainer = GemTrainer(GemModel.from_base(str(base_dir)), arguments(tmp_path), data, recipe=RECIPE)
    assert [(c.path, c.weight) for c in trainer.batches.choices] == [("texts", 400.0), ("pairs", 20.0)]
    assert isinstance(next(iter(trainer.batches))["batch"].rows, list)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recipe": {"lr": 1e-3}}, "'lr' is set by the model .* or by TrainingArguments"),
        ({"recipe": {"tune": "full"}}, "'tune' is set by the model"),
        ({"recipe": {"mix": 0.5}}, "mix = 0.5 contradicts tune 'gated'"),
        ({"train_dataset": iter(["a", "b"])}, "read once an epoch, got list_iterator: give a list"),
        ({"train_dataset": None}, "needs a train_dataset"),
        ({"args": {"max_steps": -1}, "train_dataset": chats().to_iterable_dataset()}, "set max_steps"),
        ({"args": {"activation_checkpointing": True}}, "gradient_checkpointing contradicts tune 'gated'"),
    ],
)
def test_what_it_cannot_honour_is_refused(base_dir: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    given = {"train_dataset": chats(), "recipe": RECIPE, **options}
    args = arguments(tmp_path, **given.pop("args", {}))
    with pytest.raises(ValueError, match=reason):
        GemTrainer(GemModel.from_base(str(base_dir)), args, **given)


def test_a_row_of_another_kind_says_which(base_dir: Path, tmp_path: Path) -> None:
    trainer = GemTrainer(GemModel.from_base(str(base_dir)), arguments(tmp_path), ["a text", 3], recipe=RECIPE)
    with pytest.raises(ValueError, match=r"train_dataset row 2: a row must be a text, .* got int"):
        trainer.train()


def test_the_hub_gets_a_gem_with_a_card(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = tmp_path / "hub"

    def keep(self: Any, *, folder_path: str, **options: Any) -> Any:
        shutil.copytree(folder_path, hub, ignore=shutil.ignore_patterns("checkpoint-*"))
        return type("Commit", (), {"commit_url": "https://hub/commit", "pr_url": None, "oid": "0" * 40})()

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, *a, **o: type("R", (), {"repo_id": "me/g"})()
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", keep)
    gem = GemModel.from_base(str(base_dir))
    trainer = GemTrainer(gem, arguments(tmp_path / "run"), chats(), recipe=RECIPE)
    trainer.train()
    with pytest.raises(ValueError, match="is a path of this machine"):
        trainer.push_to_hub()
    gem.config = dataclasses.replace(gem.config, base="me/base")
    trainer.push_to_hub(tags="mine")
    loaded = GemModel.from_pretrained(hub, base=str(base_dir))
    assert (loaded.encode("hello") == gem.encode("hello")).all()
    card = huggingface_hub.ModelCard.load(hub / "README.md")
    assert card.data.tags == ["embeddings", "feature-extraction", "gemify", "sentence-transformers", "mine"]
    assert "| contrastive |" in card.text


def test_a_batch_is_that_of_all_processes(base_dir: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer = GemTrainer(GemModel.from_base(str(base_dir)), args, chats(), recipe=RECIPE)
    assert isinstance(trainer.batches, Batches)
    assert [len(b["batch"].rows) for b in trainer.batches] == [8] * 4


def test_a_logged_loss_is_the_mean_over_the_steps_that_had_it(base_dir: Path, tmp_path: Path) -> None:
    """Three steps of next-token prediction and three of contrast, logged once."""
    found = {}
    for every in (1, 6):
        gem = make_gem(base_dir)
        args = arguments(tmp_path / str(every), logging_steps=every, learning_rate=1e-9)
        trainer = GemTrainer(gem, args, chats(), recipe=RECIPE)
        trainer.train()
        rows = [e for e in trainer.state.log_history if "loss" in e]
        assert len(rows) == 6 // every
        found[every] = {n: np.mean([r[n] for r in rows if n in r]) for n in ("ntp", "contrastive")}
    assert found[6] == pytest.approx(found[1], rel=1e-4)


def test_a_second_call_of_train_begins_at_the_first_step(base_dir: Path, tmp_path: Path) -> None:
    trainer = GemTrainer(make_gem(base_dir), arguments(tmp_path), chats(), recipe=RECIPE)
    trainer.batches.start_step = 3  # as the best checkpoint of an earlier call leaves it
    trainer.train()
    assert all("ntp" in r for r in curve(trainer)[:3])


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_an_interval_of_an_epoch_is_refused(base_dir: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be steps or no, got epoch"):
        GemTrainer(make_gem(base_dir), arguments(tmp_path, **{name: "epoch"}), chats(), recipe=RECIPE)
