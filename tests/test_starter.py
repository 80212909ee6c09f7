"""The real starter model: untouched by an adapter, hand-over, save and reload, and sentence-transformers-like use."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemify import GemModel
from gemify.evaluation.models import PROBES, compare_logits, language_loss, same_logits
from gemify.model.base import load_base
from gemify.model.config import SHIPPED, resolve_directory
from gemify.model.kv_cache import output_cache
from gemify.training.recipe import Recipe
from gemify.training.trainer import train
from tiny_gems import make_gem

pytestmark = pytest.mark.real

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone plays an instrument.",
    "The stock market fell sharply on Monday.",
    "Water boils at one hundred degrees.",
]


@pytest.fixture(scope="module")
def base(starter: Any) -> Any:
    return starter


@pytest.fixture(scope="module")
def starter_gem(starter: Any) -> GemModel:
    return make_gem("starter")


def test_special_token_is_a_reserved_one(starter_gem: GemModel) -> None:
    assert starter_gem.config.special_tokens == ("<repo_name>",)
    assert starter_gem.config.base == "starter"


def test_the_starter_is_untouched(base: Any, starter_gem: GemModel) -> None:
    """Logits, KV cache and greedy text, to the bit."""
    lm, tokenizer = base
    assert same_logits(lm, starter_gem.lm, tokenizer, [*PROBES, *SENTENCES])
    assert language_loss(lm, tokenizer, SENTENCES) == language_loss(starter_gem.lm, tokenizer, SENTENCES)
    ids = tokenizer(PROBES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = starter_gem.lm(input_ids=ids, use_cache=True), lm(input_ids=ids, use_cache=True)
    for a, b in zip(output_cache(ours).layers, output_cache(theirs).layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}], tokenize=False, add_generation_prompt=True
    )
    plain = lm.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(
        plain[0, tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert starter_gem.chat([{"role": "user", "content": "Name a colour."}], max_new_tokens=12, do_sample=False) == text


def test_chat_knows_the_capital_of_france(starter_gem: GemModel) -> None:
    answer = starter_gem.chat(
        [{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=20, do_sample=False
    )
    assert "Paris" in answer


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_gem_embeds_and_leaves_the_base_alone(
    base: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = GemModel.from_pretrained(name)
    assert caplog.text == ""  # made for these weights
    guitar, instrument, market, water = shipped.encode(SENTENCES, normalize_embeddings=True)
    assert guitar @ instrument > 0.1 + max(guitar @ market, guitar @ water, market @ water)
    lm, tokenizer = base
    assert same_logits(lm, shipped.lm, tokenizer, [*PROBES, *SENTENCES])


@pytest.mark.long
@pytest.mark.parametrize("name", SHIPPED)
def test_200_real_prompts_are_answered_as_by_the_base(base: Any, name: str, shared: Path) -> None:
    """Logits at every token of questions, stories and encyclopedia sentences, to the bit."""
    files = {
        "lm/mmlu/mmlu.jsonl.gz": "question",
        "lm/hellaswag/val.jsonl.gz": "ctx",
        "lm/lambada/test.jsonl.gz": "text",
    }
    prompts = [str(row[name]) for file, name in files.items() for row in read_rows(shared / file, 50)]
    with gzip.open(shared / "text" / "wiki_sentences.txt.gz", "rt", encoding="utf-8") as lines:
        prompts += [line.strip() for line in itertools.islice(lines, 50)]
    lm, tokenizer = base
    found = compare_logits(lm, GemModel.from_pretrained(name).lm, tokenizer, prompts)
    assert found == {"prompts": 200, "identical": 200, "max_difference": 0.0}


def read_rows(path: Path, count: int) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_gem_is_small_and_of_its_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve_directory(name)
    assert sum(f.stat().st_size for f in directory.iterdir()) < 12e6
    root = Path(__file__).parents[1]
    recipe = Recipe.from_dict(Recipe.read_yaml(root / "recipes" / f"{name}.yaml"))
    used = Recipe.from_dict(Recipe.read_yaml(directory / "recipe.yaml"))
    assert dataclasses.replace(used, data=recipe.data or "", eval_pairs=None) == dataclasses.replace(
        recipe, eval_pairs=None
    )
    assert used.data == (recipe.data or "runs/starter-pairs.jsonl")
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_directory(name) == Path(name)  # what lies in the user's directory is meant


def test_handover(starter_gem: GemModel) -> None:
    prefill = starter_gem.prefill(SENTENCES)
    vectors = starter_gem.embed(prefill)
    separate = starter_gem.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(vectors, separate, atol=1e-4, rtol=1e-4)
    alone = starter_gem.embed(starter_gem.prefill(SENTENCES[0]))
    assert torch.equal(alone, starter_gem.embed(starter_gem.prefill(SENTENCES[0])))  # fixed shapes: the same bits
    options = {"max_new_tokens": 8, "do_sample": False}
    assert starter_gem.generate(prefill, **options) == starter_gem.generate(SENTENCES, **options)


def test_save_and_reload_without_a_copy_of_the_base(
    starter_gem: GemModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starter_gem.save_pretrained(tmp_path / "gem")
    assert sum(f.stat().st_size for f in (tmp_path / "gem").iterdir()) < 30e6
    again = GemModel.from_pretrained(tmp_path / "gem")
    assert caplog.text == ""
    assert (again.encode(SENTENCES) == starter_gem.encode(SENTENCES)).all()


def test_a_short_training_learns_and_leaves_the_base_alone(base: Any, tmp_path: Path) -> None:
    """Five steps of the same eight reconstructions: their loss must fall; the language model stays."""
    texts = [
        "The river rises in the hills and runs west through four villages.",
        "She wrote her first novel while working nights at a bakery.",
        "Copper conducts heat better than iron but worse than silver.",
        "The committee voted to postpone the decision until the spring.",
        "A small observatory was built on the roof of the school.",
        "Most of the islands can only be reached by boat in winter.",
        "The engine was later used in two other models of the same maker.",
        "He taught mathematics for thirty years before he retired.",
    ]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    recipe = Recipe(
        data=str(tmp_path / "t.txt"),
        max_steps=6,
        ntp_steps=5,
        batch_size=8,
        contrastive_batch_size=8,
        max_length=24,
        reconstruction=1.0,
    )
    gem, _ = train(recipe, tmp_path / "run", show_progress_bar=False)
    lm, tokenizer = base
    assert same_logits(lm, gem.lm, tokenizer, PROBES)
    assert np.isfinite(gem.encode(SENTENCES)).all()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ntp = [step["ntp"] for step in metrics if "ntp" in step]
    assert ntp[-1] < ntp[0]


@pytest.mark.long
def test_the_recipe_reaches_its_score(shared: Path, tmp_path: Path) -> None:
    """150 steps of the shipped recipe, about twenty minutes: STSBenchmark test at least 72, held-out loss unchanged."""
    from gemify.training.callbacks import read_pairs, spearman

    values = Recipe.read_yaml(Path(__file__).parents[1] / "recipes" / "gated.yaml")
    recipe = Recipe.from_dict({**values, "data": str(shared / "text" / "wiki_sentences.txt.gz")})
    train(recipe, tmp_path / "run")
    gem = GemModel.from_pretrained(tmp_path / "run")
    assert spearman(gem, read_pairs(shared / "mteb" / "sts" / "STSBenchmark.test.jsonl.gz")) >= 72.0
    lm, tokenizer = load_base("starter")
    assert language_loss(lm, tokenizer, SENTENCES) == language_loss(gem.lm, tokenizer, SENTENCES)
