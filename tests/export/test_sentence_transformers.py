"""Stock sentence-transformers on an exported GEM: the library's vectors, its cutting, its names and prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny_models
from gemify import GemModel
from gemify.model.export import export
from gemify.model.projection import Projection
from gemify.model.tokenization import PROMPTEOL
from tiny_gems import make_gem

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed: pip install 'gemify[eval]'"
)

LONG = "the river is long and red " * 10
TEXTS = ["a cat on a mat", "", "x" * 90, LONG, "<|reserved_0|> is a name", "<|gem_0|> too", "</s> hi", "é ß 日本"]


def exported(base: Path, out: Path, tune: Any, **settings: Any) -> tuple[Any, np.ndarray]:
    """The sentence-transformers model of an exported GEM, and the library's vectors."""
    gem = make_gem(base, tune=tune, max_length=64, **settings)
    vectors = gem.encode(TEXTS)
    export(gem, out)
    return sentence_transformers.SentenceTransformer(str(out / "embedding"), device="cpu"), vectors


@pytest.mark.parametrize("reserved", [4, 0], ids=["reserved-token", "added-token"])
@pytest.mark.parametrize("tune", ["tokens", "lora", "full"])
def test_vectors_equal_the_librarys(tmp_path: Path, tune: str, reserved: int) -> None:
    model, vectors = exported(tiny_models.save(tmp_path / "base", reserved=reserved), tmp_path / "out", tune)
    np.testing.assert_allclose(model.encode(TEXTS), vectors, atol=2e-5)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=1), vectors, atol=2e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral-window"])
@pytest.mark.parametrize(("attention", "k", "layer"), [("bidirectional", 0, None), ("causal", 1, 1)])
def test_an_embedding_pass_of_its_own(tmp_path: Path, arch: str, attention: str, k: int, layer: int | None) -> None:
    """The projection comes along, and the language model beside it is the base."""
    base = tiny_models.save(tmp_path / "base", arch)
    options: dict[str, Any] = {"attention": attention, "special_tokens": k, "layer": layer, "max_length": 64}
    gem = make_gem(base, tune="embedding_lora", **options)
    gem.config, gem.projection = replace(gem.config, projection_dim=7), Projection(torch.randn(7, 32))
    texts = [text for text in TEXTS if text]
    vectors = gem.encode(texts)
    export(gem, tmp_path / "out")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out" / "embedding"), device="cpu")
    np.testing.assert_allclose(model.encode(texts), vectors, atol=3e-5)
    plain, ours = (AutoModelForCausalLM.from_pretrained(d) for d in (base, tmp_path / "out"))
    ids = torch.tensor([[40, 41, 42, 43]])
    assert torch.equal(ours(input_ids=ids).logits[..., :320], plain(input_ids=ids).logits)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_no_special_tokens_is_mean_pooling(base_dir: Path, tmp_path: Path, tune: str) -> None:
    model, vectors = exported(base_dir, tmp_path / "out", tune, special_tokens=0)
    filled = [i for i, text in enumerate(TEXTS) if text]
    np.testing.assert_allclose(model.encode([TEXTS[i] for i in filled]), vectors[filled], atol=2e-5)


@pytest.mark.parametrize("arch", ["gpt2", "opt", "gemma3", "phi3-window", "falcon"])
def test_on_other_architectures(tmp_path: Path, arch: str) -> None:
    model, vectors = exported(tiny_models.save(tmp_path / "base", arch), tmp_path / "out", "tokens")
    np.testing.assert_allclose(model.encode(TEXTS), vectors, atol=2e-5)


@pytest.mark.parametrize("template", ['{text} is:"', "<|reserved_1|>say : {text}", 'This : "{text}" is: in a word:"'])
@pytest.mark.parametrize("bos", [False, True])
def test_a_template_comes_along(tmp_path: Path, template: str, bos: bool) -> None:
    """Also around texts that are cut; a token spelled with a colon is one of its words."""
    base = tiny_models.save(tmp_path / "base")
    if bos:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save_pretrained(base)
    model, vectors = exported(base, tmp_path / "out", "lora", template=template)
    np.testing.assert_allclose(model.encode(TEXTS), vectors, atol=2e-5)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=1), vectors, atol=2e-5)
    again = GemModel.from_pretrained(tmp_path / "out")  # the directory is a GEM too
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=2e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    before, after = (json.dumps(words) for words in template.split("{text}"))
    assert f"- Template: {before} before every text and {after} after it" in card


def test_prompts_come_along(base_dir: Path, tmp_path: Path) -> None:
    gem = GemModel.from_base(str(base_dir), tune="full", prompts={"query": "find: ", "document": "text: "})
    queries, documents = gem.encode_query(TEXTS), gem.encode_document(TEXTS)
    export(gem, tmp_path / "out")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out" / "embedding"), device="cpu")
    np.testing.assert_allclose(model.encode_query(TEXTS), queries, atol=2e-5)
    np.testing.assert_allclose(model.encode_document(TEXTS), documents, atol=2e-5)


def test_several_tokens_are_several_models(base_dir: Path, tmp_path: Path) -> None:
    gem = GemModel.from_base(str(base_dir), tune="full", special_tokens=2)
    vectors = gem.encode(TEXTS[:4])
    written = export(gem, tmp_path / "out")
    assert written.embedding == ("embedding-1", "embedding-2")
    models = [sentence_transformers.SentenceTransformer(str(tmp_path / "out" / name)) for name in written.embedding]
    np.testing.assert_allclose(np.mean([m.encode(TEXTS[:4]) for m in models], axis=0), vectors, atol=2e-5)


def test_a_beginning_token_stays_and_an_ending_one_goes(tmp_path: Path) -> None:
    """Like Llama 3's and Gemma's tokenizers, which begin with one. Only the special token ends the text."""
    base = tiny_models.save(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(base)
    model, vectors = exported(base, tmp_path / "out", "tokens")
    ids = model.tokenizer("hi")["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (1, 3, 4)
    np.testing.assert_allclose(model.encode(TEXTS), vectors, atol=2e-5)


@pytest.mark.real
@pytest.mark.parametrize("template", ["{text}", PROMPTEOL])
def test_the_starters_tokenizer(tmp_path: Path, starter: Any, template: str) -> None:
    """A real tokenizer, with merges and fourteen reserved tokens, on a small random model."""
    _, tokenizer = starter
    config = AutoConfig.for_model("llama", **{**tiny_models.ARCHITECTURES["llama"][1], "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    gem = make_gem(tmp_path / "base", tune="tokens", max_length=32, template=template)
    assert gem.config.special_tokens == ("<repo_name>",)
    texts = [*TEXTS, "Owls hunt at night.", "a <repo_name> in a text", "<|im_start|>user"]
    vectors = gem.encode(texts)
    export(gem, tmp_path / "out")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out" / "embedding"), device="cpu")
    np.testing.assert_allclose(model.encode(texts), vectors, atol=2e-5)
    ids = model.tokenizer("a <repo_name> in a text")["input_ids"]
    assert ids.count(gem.special_ids[0]) == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == tokenizer("a")["input_ids"]
