"""GemModel on a tiny model: encode, prefill, generate, recover, save and load, bad input."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import gemify.model.gem
import tiny_models
from gemify import GemModel
from gemify.model.base import choose_cpu_dtype, load_base
from gemify.model.config import CONFIG_FILE
from gemify.model.forward import MaskedBatch, masked_pass
from gemify.paper.tokens import Row, Segment, build_inputs
from tiny_gems import make_gem, randomize

TEXTS = ["hello", "a somewhat longer text than that", "", "hello", "x" * 40]


@pytest.fixture(params=[(1, "mean", True), (3, "mean", True), (3, "concat", False)], ids=str)
def any_gem(request: pytest.FixtureRequest, base_dir: Path) -> GemModel:
    k, pooling, shared = request.param
    return make_gem(base_dir, special_tokens=k, pooling=pooling, shared_position=shared)


def test_encode_is_sentence_transformers_like(any_gem: GemModel) -> None:
    many = any_gem.encode(TEXTS)
    assert many.dtype == np.float32
    assert many.shape == (5, any_gem.get_embedding_dim())
    one = any_gem.encode(TEXTS[1])
    assert one.shape == (any_gem.get_embedding_dim(),)
    np.testing.assert_allclose(one, many[1], rtol=1e-5, atol=2e-5)  # kernels differ with the number of threads
    assert (many[0] == many[3]).all()
    assert np.isfinite(many).all()
    assert any_gem.encode([]).shape == (0, any_gem.get_embedding_dim())
    assert isinstance(any_gem.encode(TEXTS, convert_to_tensor=True), torch.Tensor)
    short = any_gem.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1.0, atol=1e-5)
    assert short.shape == (5, 8)
    sims = any_gem.similarity(many, many)
    np.testing.assert_allclose(sims.diagonal(), 1.0, atol=1e-5)
    np.testing.assert_allclose(any_gem.similarity_pairwise(many, many), 1.0, atol=1e-5)


def test_encode_equals_one_row_alone(any_gem: GemModel) -> None:
    """Batched, sorted and padded against a single masked pass read at the special columns."""
    got = any_gem.encode(TEXTS, batch_size=2, convert_to_tensor=True)
    for text, vector in zip(TEXTS, got, strict=True):
        ids = any_gem.tokenizer(text)["input_ids"]
        laid = build_inputs(
            Row("split", tuple(ids)), any_gem.special_ids, shared_position=any_gem.config.shared_position
        )
        batch = MaskedBatch.of([laid], shared_position=any_gem.config.shared_position)
        with torch.no_grad():
            hidden = masked_pass(any_gem.lm, batch, body_only=True)[batch.segments_BT == Segment.SPECIAL]
        expected = hidden.mean(0) if any_gem.config.pooling == "mean" else hidden.flatten()
        torch.testing.assert_close(vector, expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=8), batch=st.integers(1, 5))
def test_order_and_batching_do_not_matter(gem: GemModel, texts: list[str], batch: int) -> None:
    reference = np.stack([gem.encode(t) for t in texts])
    np.testing.assert_allclose(gem.encode(texts, batch_size=batch), reference, atol=2e-5)


def test_truncation_never_cuts_the_special_tokens(base_dir: Path) -> None:
    gem = GemModel.from_base(str(base_dir), special_tokens=2, max_length=10)
    assert (gem.encode("abcdefgh" + "zzz") == gem.encode("abcdefgh")).all()
    assert not (gem.encode("abcdefg") == gem.encode("abcdefgh")).all()


def test_a_special_tokens_name_in_a_text_is_text(gem: GemModel) -> None:
    name = gem.config.special_tokens[0]
    ids = gem.text_tokenizer([f"a {name} b"], max_tokens=None)[0]
    assert not set(ids) & set(gem.special_ids)
    assert gem.tokenizer.decode(ids) == f"a {name} b"
    assert np.isfinite(gem.encode(f"a {name} b")).all()


def test_prompts(base_dir: Path) -> None:
    gem = GemModel.from_base(str(base_dir), prompts={"query": "find: "})
    assert (gem.encode_query("x") == gem.encode("find: x")).all()
    assert (gem.encode_document("x") == gem.encode("x")).all()
    assert (gem.encode("x", prompt="find: ") == gem.encode_query("x")).all()
    with pytest.raises(ValueError, match="no prompt named 'other'"):
        gem.encode("x", prompt_name="other")
    with pytest.raises(ValueError, match="not both"):
        gem.encode("x", prompt_name="query", prompt="y")


@pytest.mark.parametrize("texts", ["a prompt", ["a prompt", "another, longer prompt", "c"]])
def test_handover_equals_the_separate_computations(any_gem: GemModel, texts: Any) -> None:
    prefill = any_gem.prefill(texts)
    kept = [layer.keys.clone() for layer in prefill.text.cache.layers]
    first = any_gem.embed(prefill)
    generated = any_gem.generate(prefill, max_new_tokens=8, do_sample=False)
    again = any_gem.embed(prefill)
    assert torch.equal(first, again)  # neither use disturbs the other
    assert generated == any_gem.generate(prefill, max_new_tokens=8, do_sample=False)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, prefill.text.cache.layers, strict=True))
    torch.testing.assert_close(first, torch.tensor(any_gem.encode(texts)), atol=1e-5, rtol=1e-5)
    assert generated == any_gem.generate(texts, max_new_tokens=8, do_sample=False)


def test_handover_generation_is_bit_equal(gem: GemModel) -> None:
    """Same shapes: every score of the continuation has the bits of a plain generate."""
    texts = ["a prompt", "another one, longer"]
    prefill = gem.prefill(texts)
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    ours = gem.generate_ids(prefill, prefill.ids_BT, prefill.text.mask_BT, **options)
    plain = gem.generate_ids(None, prefill.ids_BT, prefill.text.mask_BT, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, plain.scores, strict=True))


def test_handover_with_sampling_and_several_answers(gem: GemModel) -> None:
    prefill = gem.prefill("a prompt")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    ours = gem.generate(prefill, **options)
    torch.manual_seed(3)
    assert ours == gem.generate("a prompt", **options)
    assert len(ours) == 3
    beams = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert gem.generate(prefill, **beams) == gem.generate("a prompt", **beams)


def test_special_ids_are_never_emitted(gem: GemModel) -> None:
    with torch.no_grad():  # a head that wants nothing but the special token
        gem.lm.lm_head.weight.zero_()
        gem.lm.lm_head.weight[gem.special_ids] = 5.0
    prefill = gem.prefill("text")
    ids = gem.generate_ids(prefill, prefill.ids_BT, prefill.text.mask_BT, max_new_tokens=5, do_sample=False)
    assert not set(ids[0].tolist()) & set(gem.special_ids)
    assert gem.recover("text", max_new_tokens=3) is not None


def test_chat_uses_the_bases_template(gem: GemModel) -> None:
    answer = gem.chat([{"role": "user", "content": "hi"}], max_new_tokens=5, do_sample=False)
    assert answer == gem.generate("user: hi\nassistant: ", max_new_tokens=5, do_sample=False)
    gem.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        gem.chat([{"role": "user", "content": "hi"}])


def test_recover_is_greedy_decoding_under_the_mask(any_gem: GemModel) -> None:
    """Against full masked passes ``text S decoded-so-far``, one for every token."""
    texts = ["some words", "other"]
    expected = []
    for text in texts:
        ids, out = any_gem.tokenizer(text)["input_ids"], []
        for _ in range(6):
            laid = build_inputs(
                Row("reconstruction", tuple(ids), tuple(out)),
                any_gem.special_ids,
                shared_position=any_gem.config.shared_position,
            )
            with torch.no_grad():
                batch = MaskedBatch.of([laid], shared_position=any_gem.config.shared_position)
                logits = masked_pass(any_gem.lm, batch)[0, -1]
            logits[any_gem.special_ids] = -torch.inf
            if int(logits.argmax()) == any_gem.tokenizer.eos_token_id:
                break
            out.append(int(logits.argmax()))
        expected.append(any_gem.tokenizer.decode(out, skip_special_tokens=True))
    assert any_gem.recover(texts, max_new_tokens=6) == expected
    assert any_gem.recover(texts[0], max_new_tokens=6) == expected[0]


@pytest.mark.parametrize("tune", ["gated", "tokens", "lora", "full"])
def test_save_and_load_give_the_same_bytes(base_dir: Path, tmp_path: Path, tune: Any) -> None:
    gem = make_gem(base_dir, tune=tune)
    gem.save_pretrained(tmp_path / "gem")
    again = GemModel.from_pretrained(tmp_path / "gem")
    assert again.config == gem.config
    assert (again.encode(TEXTS) == gem.encode(TEXTS)).all()
    assert again.generate("hi", max_new_tokens=5, do_sample=False) == gem.generate(
        "hi", max_new_tokens=5, do_sample=False
    )
    files = {p.name for p in (tmp_path / "gem").iterdir()}
    assert ("model.safetensors" in files) == (tune == "full")
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    gem.save_pretrained(tmp_path / "gem")  # over itself
    assert (GemModel.from_pretrained(tmp_path / "gem").encode("x") == gem.encode("x")).all()


def test_other_base_weights_are_named(gem: GemModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gem.save_pretrained(tmp_path / "gem")
    with caplog.at_level(logging.WARNING):
        GemModel.from_pretrained(tmp_path / "gem")
    assert caplog.text == ""
    tiny_models.build("llama", seed=7).save_pretrained(tmp_path / "other")
    tiny_models.tokenizer().save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        GemModel.from_pretrained(tmp_path / "gem", base=str(tmp_path / "other"))
    assert "trained on other base weights" in caplog.text


def test_a_failed_save_leaves_what_was_there(gem: GemModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "gem"
    gem.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    randomize(gem, seed=9)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gemify.model.gem.Adapter, "save", full)
    with pytest.raises(OSError, match="No space left"):
        gem.save_pretrained(target)
    with pytest.raises(OSError, match="No space left"):
        gem.save_pretrained(tmp_path / "new")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["gem"]


def test_a_disk_that_fills_up_while_writing(gem: GemModel, base_dir: Path, tmp_path: Path) -> None:
    """The real thing, in a process that may write files of a few kB only."""
    gem.save_pretrained(tmp_path / "gem")
    before = {p.name: p.read_bytes() for p in (tmp_path / "gem").iterdir()}
    code = (
        "import resource, sys\n"
        "from gemify import GemModel\n"
        "gem = GemModel.from_base(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: gem.save_pretrained(sys.argv[2])\n"
        "except OSError as error: print('refused:', str(error).splitlines()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base_dir), str(tmp_path / "gem")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused:"), done.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "gem").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["gem"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / CONFIG_FILE).unlink(), "it is no GEM"),
        (lambda d: (d / CONFIG_FILE).write_text("{"), "is damaged"),
        (lambda d: _edit(d, format_version=99), "format version 99, this gemify reads 1"),
        (lambda d: _edit(d, tune="half"), "unknown tune 'half'"),
        (lambda d: _edit(d, special_ids=[], special_tokens=[]), "k must be at least 1"),
        (lambda d: _edit(d, extra=1), "unknown entries"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"abc"), "is damaged"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor a model"),
    ],
)
def test_damaged_directories_are_named(gem: GemModel, tmp_path: Path, damage: Any, message: str) -> None:
    gem.save_pretrained(tmp_path / "gem")
    damage(tmp_path / "gem")
    with pytest.raises(ValueError, match=message):
        GemModel.from_pretrained(tmp_path / "gem")


def _edit(directory: Path, **values: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_bad_bases_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load the model"):
        GemModel.from_base(str(tmp_path / "nothing" / "here"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        GemModel.from_base(str(tmp_path / "empty"))
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file"):
        GemModel.from_base(str(tmp_path / "file.bin"))
    bert = tmp_path / "t5"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))
    with pytest.raises(ValueError, match="not a decoder-only causal LM"):
        GemModel.from_base(str(bert))
    (bert / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(ValueError, match="no causal LM"):
        GemModel.from_base(str(bert))
    tiny_models.build("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="tokenizer"):
        GemModel.from_base(str(tmp_path / "bare"))


def test_a_tokenizer_without_a_fast_backend_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    tiny_models.build("llama").save_pretrained(tmp_path / "slow")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match="no fast backend"):
        GemModel.from_base(str(tmp_path / "slow"))


def test_bad_arguments_are_named(gem: GemModel, base_dir: Path) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        GemModel.from_base(str(base_dir), special_tokens=0)
    with pytest.raises(ValueError, match="ordinary token"):
        GemModel.from_base(str(base_dir), special_tokens=["a"])
    with pytest.raises(ValueError, match="different names"):
        GemModel.from_base(str(base_dir), special_tokens=["<|x|>", "<|x|>"])
    with pytest.raises(ValueError, match="item 1 is a int"):
        gem.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"truncate_dim must lie in 1\.\.32"):
        gem.encode("a", truncate_dim=33)
    with pytest.raises(ValueError, match="batch_size"):
        gem.encode("a", batch_size=0)
    with pytest.raises(ValueError, match="has no tokens"):
        gem.generate("")


def test_stop_strings_and_streaming_pass_through(gem: GemModel) -> None:
    class Collect:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    streamer = Collect()
    full = gem.generate("abc", max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.ids[-1] == -1
    assert len(streamer.ids) >= 3 + 1
    assert full is not None
    assert isinstance(gem.generate("abc", max_new_tokens=6, do_sample=False, stop_strings=["e"]), str)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"do_sample": False}])
def test_a_prefills_growing_cache_gives_the_text_of_a_plain_run(gem: GemModel, options: dict[str, Any]) -> None:
    """transformers crops, repeats or reorders the cache it was given; the text stays that of its own cache."""
    prompt = "a b a b a b a b a"
    text = gem.generate(gem.prefill(prompt), max_new_tokens=90, min_new_tokens=90, **options)
    assert text == gem.generate(prompt, max_new_tokens=90, min_new_tokens=90, **options)


@pytest.mark.parametrize(
    ("stored", "bf16", "expected"),
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (None, True, "auto"),
    ],
)
def test_a_cpu_gets_a_dtype_it_is_fast_in(stored: Any, bf16: bool, expected: Any) -> None:
    assert choose_cpu_dtype(stored, bf16=bf16) == expected


def test_float16_weights_are_float32_on_a_cpu_with_the_same_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_models.build("llama").half().save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        lm, _ = load_base(str(tmp_path), device="cpu")
    assert "stored in torch.float16 and loaded in torch.float32" in caplog.text
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(p, stored[n].float()) for n, p in lm.named_parameters() if n in stored)
    assert load_base(str(tmp_path), device="cpu", dtype=torch.float16)[0].dtype == torch.float16


def test_sentence_transformers_keywords_of_encode(gem: GemModel) -> None:
    vectors = gem.encode(TEXTS)
    rows = gem.encode(TEXTS, convert_to_numpy=False, output_value="sentence_embedding", device="cpu")
    assert isinstance(rows, list)
    assert torch.equal(torch.stack(rows), torch.from_numpy(vectors))
    assert isinstance(gem.encode(TEXTS[0], convert_to_numpy=False), torch.Tensor)
    assert isinstance(gem.encode(TEXTS, convert_to_numpy=False, convert_to_tensor=True), torch.Tensor)
    with pytest.raises(ValueError, match="output_value must be 'sentence_embedding', got 'token_embeddings'"):
        gem.encode(TEXTS, output_value="token_embeddings")
    with pytest.raises(ValueError, match="unknown precision 'int4': choose one of float32, int8"):
        gem.encode(TEXTS, precision="int4")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"device must name one device, got \['cpu', 'cpu'\]"):
        gem.encode(TEXTS, device=["cpu", "cpu"])  # type: ignore[call-overload]


def test_a_pickled_gem_works_and_has_a_lock_of_its_own(any_gem: GemModel) -> None:
    copy = pickle.loads(pickle.dumps(any_gem))
    np.testing.assert_array_equal(copy.encode(TEXTS), any_gem.encode(TEXTS))
    assert copy.lock is not any_gem.lock
