"""GEM inside TRL's own SFTTrainer: nothing changes without it, and with it both learn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl")

from trl import SFTConfig, SFTTrainer

from gemify import GemModel
from gemify.integrations.trl import GemSFTTrainer

RECIPE = {"ntp_steps": 4, "min_length": 2, "reconstruction": 0.5}


def chats(count: int = 24) -> Dataset:
    rows = [[("user", f"what is {n}?"), ("assistant", f"a number, {n}")] for n in range(count)]
    return Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in row]} for row in rows])


def config(output: Path, **options: Any) -> SFTConfig:
    values = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "bf16": False, **options}
    return SFTConfig(
        str(output), use_cpu=True, logging_steps=1, save_steps=3, report_to="none", disable_tqdm=True, **values
    )


def make(base_dir: Path, tune: str) -> GemModel:
    torch.manual_seed(0)
    return GemModel.from_base(str(base_dir), tune=tune, dtype=torch.float32)  # type: ignore[arg-type]


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_without_weight_it_is_plain_sft(base_dir: Path, tmp_path: Path, tune: str) -> None:
    gem = make(base_dir, tune)
    plain = SFTTrainer(gem.lm, config(tmp_path / "sft"), train_dataset=chats(), processing_class=gem.tokenizer)
    plain.train()
    ours = GemSFTTrainer(make(base_dir, tune), config(tmp_path / "gem"), chats(), gem_weight=0.0)
    ours.train()
    assert losses(ours) == losses(plain)
    assert len(losses(ours)) == 6
    assert not losses(ours, "gem_ntp")


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_with_it_both_losses_fall(base_dir: Path, tmp_path: Path, tune: str) -> None:
    gem = make(base_dir, tune)
    before = gem.encode("what is 3?")
    args = config(tmp_path, max_steps=40, learning_rate=1e-2, save_strategy="no")
    trainer = GemSFTTrainer(gem, args, chats(), recipe=RECIPE | {"ntp_steps": 20})
    own = [p.detach().clone() for p in trainer._own_parameters()]
    trainer.train()
    for name, count in (("gem_ntp", 20), ("gem_contrastive", 20)):
        found = losses(trainer, name)
        assert len(found) == count
        assert sum(found[-5:]) < sum(found[:5]), (name, found)
    assert len(own) == (2 if tune == "lora" else 1)  # the special token's row under LoRA, and the temperature
    assert all(not torch.equal(p, q) for p, q in zip(own, trainer._own_parameters(), strict=True))
    assert not (gem.encode("what is 3?") == before).all()


def test_accumulated_and_checkpointed_steps_have_the_same_gem_losses(base_dir: Path, tmp_path: Path) -> None:
    """Of one step: two micro-batches are averaged, and recomputing activations changes nothing."""
    found = []
    for n, options in enumerate(({}, {"gradient_checkpointing": False})):
        args = config(tmp_path / str(n), max_steps=2, gradient_accumulation_steps=2, **options)
        trainer = GemSFTTrainer(make(base_dir, "full"), args, chats(), recipe=RECIPE)
        trainer.train()
        found.append([(e["loss"], e["gem_ntp"]) for e in trainer.state.log_history if "gem_ntp" in e])
    (first, second), again = found
    assert [first, second] == [pytest.approx(pair, rel=1e-5) for pair in again]
    plain = GemSFTTrainer(make(base_dir, "full"), args, chats(), gem_weight=0.0)
    plain.train()
    # The first step's SFT loss is that of plain SFT, and what is beyond it is the mean of GEM's micro-batches.
    assert first[0] - losses(plain)[0] == pytest.approx(first[1], rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(base_dir: Path, tmp_path: Path) -> None:
    def trainer(name: str) -> GemSFTTrainer:
        return GemSFTTrainer(make(base_dir, "lora"), config(tmp_path / name), chats(), recipe=RECIPE)

    whole = trainer("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    cut = trainer("cut")
    cut.train(resume_from_checkpoint=True)
    assert losses(cut) == losses(whole)
    assert losses(cut, "gem_contrastive") == losses(whole, "gem_contrastive")
    again = GemModel.from_pretrained(tmp_path / "cut" / "checkpoint-6")
    assert (again.encode("what is 3?") == whole.gem.encode("what is 3?")).all()


@pytest.mark.parametrize(
    ("tune", "options", "reason"),
    [
        ("gated", {}, "tune 'gated' leaves the base as it is"),
        ("full", {"peft_config": object()}, "peft_config is the GEM's to say"),
        ("full", {"gem_weight": -1.0}, "gem_weight must not be negative"),
        ("full", {"recipe": {"lr": 1.0}}, "'lr' is set by the model"),
    ],
)
def test_what_it_cannot_honour_is_refused(
    base_dir: Path, tmp_path: Path, tune: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        GemSFTTrainer(make(base_dir, tune), config(tmp_path), chats(), **options)


def test_packing_makes_other_rows_and_so_other_steps(base_dir: Path, tmp_path: Path) -> None:
    """TRL cuts long texts into many rows: GEM's rows go on as long as its steps do."""
    texts = Dataset.from_list([{"text": f"text {n} " * 60} for n in range(8)])
    args = config(tmp_path, max_steps=-1, num_train_epochs=1, packing=True, packing_strategy="wrapped", max_length=32)
    trainer = GemSFTTrainer(make(base_dir, "lora"), args, texts, recipe={"ntp_steps": 1, "min_length": 2})
    trainer.train()
    assert trainer.state.global_step == trainer.recipe.max_steps > 2


def test_gems_own_parameters_are_clipped(base_dir: Path, tmp_path: Path) -> None:
    trainer = GemSFTTrainer(make(base_dir, "lora"), config(tmp_path, max_grad_norm=1e-3), chats(), recipe=RECIPE)
    norms = []
    step = type(trainer)._clip_grad_norm

    def watch(self: Any, model: Any) -> Any:
        found = step(self, model)
        norms.append(float(torch.stack([p.grad.norm() for p in self._own_parameters() if p.grad is not None]).norm()))
        return found

    trainer._clip_grad_norm = watch.__get__(trainer)  # type: ignore[method-assign]
    trainer.train()
    assert len(norms) == 6
    assert max(norms) <= 1e-3 * 1.001
