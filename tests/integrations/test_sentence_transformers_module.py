"""A GEM inside sentence-transformers: the library's vectors in all that takes a SentenceTransformer."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from gemify import GemModel
from gemify.model.config import resolve_directory
from gemify.model.projection import Projection
from tiny_gems import make_gem

st = pytest.importorskip(
    "sentence_transformers",
    reason="sentence-transformers is not installed: pip install 'gemify[sentence-transformers]'",
)

from gemify.integrations.sentence_transformers import Gem  # noqa: E402

LONG = "the river is long and red " * 10
TEXTS = ["a cat on a mat", "", "x" * 90, LONG, "<|reserved_0|> is a name", "</s> hi", "é ß 日本"]
BIDIRECTIONAL: dict[str, Any] = {"tune": "embedding_lora", "special_tokens": 0, "attention": "bidirectional"}
SCOPES: dict[str, dict[str, Any]] = {
    "gated": {"tune": "gated"},
    "gated-concat": {"tune": "gated", "special_tokens": 3, "pooling": "concat"},
    "gated-template-layer": {"tune": "gated", "template": 'say : "{text}" is:"', "layer": 1},
    "tokens": {"tune": "tokens", "special_tokens": 2, "shared_position": False},
    "embedding_lora": {"tune": "embedding_lora", "layer": 1},
    "bidirectional": BIDIRECTIONAL,
    "lora": {"tune": "lora"},
    "full": {"tune": "full"},
}


def load(directory: Path, **options: Any) -> Any:
    return st.SentenceTransformer(str(directory), trust_remote_code=True, device="cpu", **options)


def wrap(gem: GemModel, **options: Any) -> Any:
    return st.SentenceTransformer(modules=[Gem(gem)], device="cpu", **options)


@pytest.mark.parametrize("scope", SCOPES)
def test_vectors_equal_the_librarys(base_dir: Path, tmp_path: Path, scope: str) -> None:
    gem = make_gem(base_dir, max_length=64, **SCOPES[scope])
    if gem.config.tune == "embedding_lora":
        gem.config, gem.projection = replace(gem.config, projection_dim=7), Projection(torch.randn(7, 32))
    vectors = gem.encode(TEXTS)
    gem.save_pretrained(tmp_path / "gem")
    for model in (wrap(gem), load(tmp_path / "gem")):
        np.testing.assert_allclose(model.encode(TEXTS), vectors, atol=2e-5)
        np.testing.assert_allclose(model.encode(TEXTS, batch_size=1), vectors, atol=2e-5)
        np.testing.assert_allclose(model.encode(TEXTS[0]), vectors[0], atol=2e-5)
        assert model.get_embedding_dimension() == vectors.shape[1]
        assert model.max_seq_length == gem.max_seq_length


def test_an_added_token_and_a_base_of_its_own_embedding_scale(tmp_path: Path) -> None:
    gem = make_gem(tiny_models.save(tmp_path / "base", "gemma3", reserved=0))
    np.testing.assert_allclose(wrap(gem).encode(TEXTS), gem.encode(TEXTS), atol=2e-5)


def test_only_a_directory_needs_the_flag(gem: GemModel, tmp_path: Path) -> None:
    """sentence-transformers imports another package's class for no directory's sake unless it is told to."""
    gem.save_pretrained(tmp_path / "gem")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        st.SentenceTransformer(str(tmp_path / "gem"), device="cpu")


@pytest.mark.parametrize("default", [None, "document"])
def test_prompts_are_the_gems(base_dir: Path, tmp_path: Path, default: str | None) -> None:
    gem = make_gem(base_dir, prompts={"query": "find: ", "document": "text: "})
    gem.config = replace(gem.config, default_prompt_name=default)
    gem.save_pretrained(tmp_path / "gem")
    for model in (wrap(gem), load(tmp_path / "gem")):
        for way in ("encode", "encode_query", "encode_document"):
            np.testing.assert_allclose(getattr(model, way)(TEXTS), getattr(gem, way)(TEXTS), atol=2e-5)
        own = model.encode(TEXTS, prompt="my own: ")
        np.testing.assert_allclose(own, gem.encode(TEXTS, prompt="my own: "), atol=2e-5)


def test_queries_have_the_default_prompt_where_they_have_none_of_their_own(base_dir: Path) -> None:
    gem = make_gem(base_dir, prompts={"text": "a text: "})
    gem.config = replace(gem.config, default_prompt_name="text")
    np.testing.assert_allclose(wrap(gem).encode_query(TEXTS), gem.encode_query(TEXTS), atol=2e-5)


def test_a_prompt_that_the_caller_gives_wins(base_dir: Path, tmp_path: Path) -> None:
    gem = make_gem(base_dir, prompts={"query": "find: "})
    gem.save_pretrained(tmp_path / "gem")
    assert wrap(gem, prompts={"query": "seek: "}).prompts["query"] == "seek: "
    assert load(tmp_path / "gem", prompts={"query": ""}).prompts["query"] == ""


@pytest.mark.parametrize("options", [{"precision": p} for p in ("int8", "uint8", "binary", "ubinary")], ids=str)
def test_precision_is_the_same_in_both(gem: GemModel, options: dict[str, Any]) -> None:
    ours, theirs = gem.encode(TEXTS, **options), wrap(gem).encode(TEXTS, **options)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    close = np.abs(ours.astype(int) - theirs.astype(int)) <= 1  # a value at a border may round either way
    assert close.mean() > 0.99


def test_length_and_cut_of_vectors(gem: GemModel) -> None:
    model = wrap(gem)
    for options in ({"truncate_dim": 8}, {"normalize_embeddings": True, "truncate_dim": 5}):
        np.testing.assert_allclose(model.encode(TEXTS, **options), gem.encode(TEXTS, **options), atol=2e-5)
    assert wrap(gem, truncate_dim=8).encode(TEXTS).shape == (len(TEXTS), 8)
    model.max_seq_length = 20
    np.testing.assert_allclose(model.encode([LONG]), gem.encode([LONG[:20]]), atol=2e-5)  # a token is a byte


def test_a_long_text_is_cut_at_its_start_or_refused(base_dir: Path) -> None:
    gem = make_gem(base_dir, max_length=32)
    tail = st.SentenceTransformer(modules=[Gem(gem, truncate="start")], device="cpu")
    np.testing.assert_allclose(tail.encode([LONG]), gem.encode([LONG], truncate="start"), atol=2e-5)
    with pytest.raises(ValueError, match="this model embeds up to 31"):
        st.SentenceTransformer(modules=[Gem(gem, truncate="error")], device="cpu").encode([LONG])
    with pytest.raises(ValueError, match=r"for the mean use GemModel\.encode"):
        Gem(gem, truncate="mean")


def test_tokens_states_end_with_the_special_tokens(base_dir: Path) -> None:
    gem = make_gem(base_dir, special_tokens=2)
    states = wrap(gem).encode(["abc", "a"], output_value="token_embeddings")
    assert [s.shape for s in states] == [(5, 32), (3, 32)]  # bytes, then two special tokens
    vectors = torch.stack([s[-2:].mean(0) for s in states])
    np.testing.assert_allclose(vectors, gem.encode(["abc", "a"]), atol=2e-5)


def test_search_mining_quantisation_and_evaluators(gem: GemModel) -> None:
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    model, texts = wrap(gem), ["a cat on a mat", "the river", "a cat on a mat", "red sky"]
    vectors = model.encode(texts)
    hits = st.util.semantic_search(vectors[:1], vectors, top_k=2)[0]
    assert {hit["corpus_id"] for hit in hits} == {0, 2}
    score, first, second = st.util.paraphrase_mining(model, texts)[0]
    assert (score, first, second) == (pytest.approx(1.0), 0, 2)
    assert st.util.quantize_embeddings(vectors, precision="ubinary").shape == (4, 4)
    same = EmbeddingSimilarityEvaluator(texts, [*texts[:3], "a cat"], scores=[1.0, 0.9, 0.8, 0.1])
    assert -1 <= same(model)[same.primary_metric] <= 1


@pytest.mark.parametrize("scope", SCOPES)
def test_a_copy_for_another_process_has_the_same_vectors(base_dir: Path, scope: str) -> None:
    gem = make_gem(base_dir, **SCOPES[scope])
    model = pickle.loads(pickle.dumps(wrap(gem)))
    np.testing.assert_allclose(model.encode(TEXTS), gem.encode(TEXTS), atol=2e-5)
    assert model[0].gem.lm is model[0].lm


def test_a_pool_of_processes_gives_the_same_vectors(base_dir: Path) -> None:
    gem = make_gem(base_dir, **SCOPES["gated-template-layer"])
    model = wrap(gem)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        vectors = model.encode(TEXTS, pool=pool, chunk_size=3)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(vectors, gem.encode(TEXTS), atol=2e-5)


@pytest.mark.parametrize("tune", ["gated", "full"])
def test_saved_and_loaded_again(base_dir: Path, tmp_path: Path, tune: Any) -> None:
    gem = make_gem(base_dir, tune=tune)
    model = wrap(gem, prompts={"query": "seek: "}, truncate_dim=8, similarity_fn_name="dot")
    model.max_seq_length = 40
    model.save_pretrained(str(tmp_path / "one"))
    again = load(tmp_path / "one")
    again.save_pretrained(str(tmp_path / "two"))
    for other in (again, load(tmp_path / "two")):
        np.testing.assert_allclose(other.encode_query(TEXTS), model.encode_query(TEXTS), atol=2e-5)
        assert (other.truncate_dim, other.similarity_fn_name, other.max_seq_length) == (8, "dot", 40)
    alone = GemModel.from_pretrained(tmp_path / "two")  # the library reads the same prompts
    np.testing.assert_allclose(alone.encode_query(TEXTS)[:, :8], model.encode_query(TEXTS), atol=2e-5)
    assert json.loads((tmp_path / "two" / "modules.json").read_text())[0]["type"].endswith("sentence_transformers.Gem")


def test_saving_changes_neither_gem_nor_fingerprint(gem: GemModel, tmp_path: Path) -> None:
    wrap(gem).save_pretrained(str(tmp_path / "gem"))
    assert GemModel.from_pretrained(tmp_path / "gem").fingerprint == gem.fingerprint
    gem.save_pretrained(tmp_path / "gem")  # over it
    np.testing.assert_allclose(load(tmp_path / "gem").encode(TEXTS), gem.encode(TEXTS), atol=2e-5)


def test_push_to_hub_uploads_a_directory_that_loads(
    gem: GemModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = tmp_path / "hub"

    def keep(self: Any, *, folder_path: str, **options: Any) -> Any:
        shutil.copytree(folder_path, hub)
        return type("Commit", (), {"commit_url": "https://hub/commit", "pr_url": None, "oid": "0" * 40})()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, **o: type("R", (), {"repo_id": "me/gem"})())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", keep)
    wrap(gem).push_to_hub("me/gem")
    np.testing.assert_allclose(load(hub).encode(TEXTS), gem.encode(TEXTS), atol=2e-5)


def test_its_losses_train_the_adapter_alone(gem: GemModel) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = wrap(gem)
    loss = MultipleNegativesRankingLoss(model)
    pairs = [["a cat", "the river"], ["a feline", "a stream"]]
    loss([model.preprocess(texts) for texts in pairs], None).backward()
    trained = {id(p) for p in [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD]}
    for parameter in model.parameters():
        assert (id(parameter) in trained) == (parameter.grad is not None)


def test_a_projection_in_another_precision(base_dir: Path) -> None:
    gem = make_gem(base_dir, tune="embedding_lora")
    gem.config, gem.projection = replace(gem.config, projection_dim=7), Projection(torch.randn(7, 32))
    vectors = gem.encode(TEXTS)
    cosines = st.util.pairwise_cos_sim(wrap(gem).bfloat16().encode(TEXTS), vectors)
    assert cosines.min() > 0.99


def test_what_cannot_be_loaded_says_so(gem: GemModel, tmp_path: Path) -> None:
    gem.save_pretrained(tmp_path / "gem")
    assert load(tmp_path / "gem", model_kwargs={"torch_dtype": "bfloat16"}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"model_kwargs of a GEM are base, .* got \['device_map'\]"):
        load(tmp_path / "gem", model_kwargs={"device_map": "auto"})
    with pytest.raises(ValueError, match="no processor_kwargs"):
        load(tmp_path / "gem", processor_kwargs={"padding_side": "left"})
    with pytest.raises(ValueError, match="in safetensors only"):
        wrap(gem).save_pretrained(str(tmp_path / "other"), safe_serialization=False)
    with pytest.raises(ValueError, match="item 0 is a tuple"):
        wrap(gem).encode([("a", "pair")])


@pytest.mark.real
@pytest.mark.parametrize("name", ["starter", "starter-gated"])
def test_the_shipped_gems(name: str, starter: Any) -> None:
    gem = GemModel.from_pretrained(name, dtype="float32")
    texts = ["a cat on a mat", "The museum opens at noon on Sundays. " * 30, ""]
    model = load(resolve_directory(name), model_kwargs={"dtype": "float32"})
    np.testing.assert_allclose(model.encode(texts), gem.encode(texts), atol=1e-4)
