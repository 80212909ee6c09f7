"""A read-out layer below the last: vectors are that layer's, the layers above do not run, nothing else changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny_models
from gemify import GemModel
from gemify.cli.main import main
from gemify.integrations.vllm.config import EngineGem
from gemify.model.adapter import gate
from gemify.model.attention import gem_mask
from gemify.model.config import CONFIG_FILE, GemConfig
from gemify.model.early_exit import early_exit, enable_early_exit
from gemify.model.export import export
from gemify.paper.tokens import Row, build_inputs
from gemify.paper.views import View, full_view
from gemify.rag.prompt_cache import ModelRunner, PromptCache
from gemify.training.objective import MicroBatch
from gemify.training.recipe import Recipe
from gemify.training.trainer import train
from tiny_gems import make_gem, make_objective

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a cat on a mat", "x", "the river is long and red " * 3]
DEPTH = 4
FAR = {"sliding_window": 6, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
NEAR = {"sliding_window": 6, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}


def deep(directory: Path, name: str = "llama", **settings: Any) -> str:
    """A model directory of `DEPTH` layers."""
    return str(tiny_models.save(directory, name, **{"num_hidden_layers": DEPTH, **settings}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return deep(tmp_path_factory.mktemp("deep"))


def made(base: str, **options: Any) -> GemModel:
    return make_gem(base, **options)


def final_norm(lm: PreTrainedModel) -> nn.Module:
    body = lm.get_decoder()
    return next(m for name in ("norm", "ln_f", "final_layer_norm") if (m := getattr(body, name, None)) is not None)


def expected(gem: GemModel, text: str, layer: int) -> Tensor:
    """[K, D] by a full pass under the GEM mask: transformers' own states after that layer, and the final norm."""
    ids = gem.text_tokenizer([text], max_tokens=gem.config.max_text_tokens)[0]
    row = build_inputs(Row("split", tuple(ids)), gem.special_ids, shared_position=gem.config.shared_position)
    segments_BT = torch.tensor([row.segments])
    special_BT = torch.arange(len(row.ids))[None] >= len(ids)
    with torch.no_grad(), gate(special_BT), gem_mask(segments_BT, shared_position=gem.config.shared_position):
        states = gem.lm(
            input_ids=torch.tensor([row.ids]),
            position_ids=torch.tensor([row.positions]),
            attention_mask=torch.ones_like(segments_BT),
            output_hidden_states=True,
        ).hidden_states
        assert len(states) == DEPTH + 1
        last = states[layer] if layer == DEPTH else final_norm(gem.lm)(states[layer])  # normed already
    return last[0, len(ids) :]


@contextlib.contextmanager
def counted(gem: GemModel) -> Iterator[list[int]]:
    """How often each layer runs."""
    counts = [0] * DEPTH
    layers = next(m for m in gem.lm.get_decoder().modules() if isinstance(m, nn.ModuleList))

    def hook(number: int) -> Any:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    handles = [layers[number].register_forward_pre_hook(hook(number)) for number in range(DEPTH)]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("qwen3", {}),
        ("opt", {}),
        ("gemma3", FAR),
        ("gemma3", NEAR),
        ("cohere2", FAR),
    ],
    ids=["llama", "gpt2", "qwen3", "opt", "gemma3-far", "gemma3-near", "cohere2-far"],
)
def test_vectors_are_those_of_the_layer_however_they_are_made(name: str, settings: Any, tmp_path: Path) -> None:
    gem = made(deep(tmp_path, name, **settings), special_tokens=2, layer=2)
    want = torch.stack([expected(gem, text, 2).mean(0) for text in TEXTS])
    with counted(gem) as counts:
        torch.testing.assert_close(torch.tensor(gem.encode(TEXTS)), want, atol=2e-5, rtol=1e-4)
        assert counts[0] == counts[1] > 0
        assert counts[2:] == [0, 0]
    handle = gem.prefill(TEXTS)
    with counted(gem) as counts:
        torch.testing.assert_close(gem.embed(handle), want, atol=2e-5, rtol=1e-4)
        assert counts == [1, 1, 0, 0]
    views = [full_view(gem.tokenizer(text)["input_ids"]) for text in TEXTS]
    for frozen in (True, False):
        own = make_objective(gem, frozen=frozen)
        with counted(gem) as counts:
            got = own.embed(views)
            assert counts[2:] == [0, 0]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [1, 3, DEPTH])
def test_every_layer_can_be_read_and_the_last_is_the_default(base: str, layer: int) -> None:
    gem, plain = made(base, layer=layer), made(base)
    want = torch.stack([expected(plain, text, layer)[0] for text in TEXTS]).numpy()
    np.testing.assert_allclose(gem.encode(TEXTS), want, atol=1e-5)
    assert np.array_equal(gem.encode(TEXTS), plain.encode(TEXTS)) == (layer == DEPTH)
    assert gem.fingerprint != plain.fingerprint


def test_a_mean_over_the_text_is_read_there_too(base: str) -> None:
    gem = made(base, tune="full", special_tokens=0, layer=2)
    ids = torch.tensor(gem.text_tokenizer([TEXTS[0]], max_tokens=99))
    with torch.no_grad():
        states = gem.lm(input_ids=ids, output_hidden_states=True).hidden_states
        want = final_norm(gem.lm)(states[2])[0].mean(0)
    np.testing.assert_allclose(gem.encode(TEXTS[0]), want.numpy(), atol=1e-5)


def test_a_thread_that_writes_in_the_midst_of_encoding_runs_all_layers(base: str) -> None:
    gem = made(base, layer=2)
    original = AutoModelForCausalLM.from_pretrained(base)
    ids_BT = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        logits = original(ids_BT).logits
        written = original.generate(ids_BT, max_new_tokens=9, do_sample=False, pad_token_id=0, suppress_tokens=[3])
    assert gem.special_ids == [3]
    alone = gem.encode(TEXTS)
    heard: list[Tensor] = []

    @torch.no_grad()
    def write() -> None:
        heard.append(gem.lm(ids_BT).logits)
        heard.append(gem.generate_ids(None, ids_BT, torch.ones_like(ids_BT).bool(), max_new_tokens=9, do_sample=False))

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=write)
            thread.start()
            thread.join(60)

    second = next(m for m in gem.lm.get_decoder().modules() if isinstance(m, nn.ModuleList))[1]
    handle = second.register_forward_pre_hook(interrupt)
    meanwhile = gem.encode(TEXTS)
    handle.remove()
    assert np.array_equal(alone, meanwhile)
    assert len(heard) >= 2
    assert all(torch.equal(got, logits) for got in heard[0::2])
    assert all(torch.equal(got, written) for got in heard[1::2])


@pytest.mark.parametrize("template", ["{text}", '{text} is:"'])
def test_a_prompt_that_grows_is_embedded_at_the_layer_and_goes_on(base: str, template: str) -> None:
    gem = made(base, layer=2, template=template)
    prompt, ids = PromptCache(ModelRunner(gem)), gem.tokenizer("a prompt that grows")["input_ids"]
    for length in (4, len(ids)):
        vector = prompt.extend_and_embed(ids[:length], start=0)
        want = gem.encode(gem.tokenizer.decode(ids[:length]))
        np.testing.assert_allclose(vector.numpy(), want, atol=2e-5)
    handle = prompt.extend_to(ids)
    with torch.no_grad():
        torch.testing.assert_close(handle.logits_BV, gem.lm(torch.tensor([ids])).logits[:, -1], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(gem.embed(handle).numpy(), vector.numpy(), atol=2e-5)


def test_an_error_inside_leaves_all_layers(base: str) -> None:
    lm = AutoModelForCausalLM.from_pretrained(base)
    ids_BT = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        before = lm(ids_BT).logits
        with pytest.raises(KeyError), early_exit(lm, 1):
            raise KeyError
        assert torch.equal(lm(ids_BT).logits, before)
        with early_exit(lm, 1), early_exit(lm, None):
            assert torch.equal(lm(ids_BT).logits, before)


def test_the_contrast_trains_what_is_below_and_next_tokens_all(base: str) -> None:
    gem = made(base, tune="full", layer=2)
    own = make_objective(gem, frozen=False)
    views: list[tuple[View, View]] = [
        (full_view([20, 21, 22]), full_view([20, 22])),
        (full_view([30, 31]), full_view([31, 30])),
    ]
    layers = next(m for m in gem.lm.get_decoder().modules() if isinstance(m, nn.ModuleList))

    def moved(batch: MicroBatch) -> list[bool]:
        own.zero_grad(set_to_none=True)
        own(batch).total.backward()
        return [any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters()) for layer in layers]

    assert moved(MicroBatch(1.0, views=views)) == [True, True, False, False]
    assert moved(MicroBatch(0.0, [Row("split", (20, 21), (22, 23))], step_targets=3)) == [True] * DEPTH


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_run_trains_saves_and_loads_it(base: str, texts_file: Path, tmp_path: Path, chunk: int | None) -> None:
    values = {"base": base, "data": str(texts_file), "max_steps": 4, "ntp_steps": 2, "batch_size": 4}
    recipe = Recipe.from_dict({**values, "contrastive_batch_size": 8, "contrastive_chunk_size": chunk, "layer": 2})
    gem, _ = train(recipe, tmp_path / "run", show_progress_bar=False)
    assert json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["layer"] == 2
    again = GemModel.from_pretrained(tmp_path / "run")
    vectors = again.encode(TEXTS)
    assert np.array_equal(vectors, gem.encode(TEXTS))
    assert again.fingerprint == gem.fingerprint
    want = torch.stack([expected(again, text, 2)[0] for text in TEXTS]).numpy()
    np.testing.assert_allclose(vectors, want, atol=1e-5)
    with torch.no_grad():
        fresh = GemModel.from_base(base, layer=2).encode(TEXTS)
    assert np.abs(fresh - vectors).max() > 1e-3
    with pytest.raises(ValueError, match="cannot resume with another recipe: layer was 2, is 3"):
        train(dataclasses.replace(recipe, layer=3), tmp_path / "run", resume=True)


def test_it_is_written_down_only_where_it_is_set(base: str, tmp_path: Path) -> None:
    made(base).save_pretrained(tmp_path / "plain")
    assert "layer" not in json.loads((tmp_path / "plain" / CONFIG_FILE).read_text())
    assert GemConfig.from_directory(tmp_path / "plain").layer is None


@pytest.mark.parametrize("wrong", [0, -1, True, "2", 1.5])
def test_what_is_no_layer_is_refused(wrong: Any) -> None:
    config = GemConfig(special_tokens=("s",), special_ids=(3,))
    with pytest.raises(ValueError, match=r"^layer must be a number from 1 .*leave it out for the last$"):
        dataclasses.replace(config, layer=wrong)
    with pytest.raises(ValueError, match="layer must be"):
        Recipe.from_dict({"layer": wrong})


def test_a_layer_that_the_model_has_not_is_refused(
    base: str, texts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^layer must lie in 1\.\.4, the layers of this model, got 5$"):
        GemModel.from_base(base, layer=5)
    for layer, words in (("5", "layer must lie in 1..4"), ("0", "layer must be a number from 1")):
        command = ["gemify", "train", "--base", base, "--data", str(texts_file), "-o", str(tmp_path / "run")]
        monkeypatch.setattr("sys.argv", [*command, "--layer", layer, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    assert not (tmp_path / "run").exists()


def test_a_model_with_a_loop_of_its_own_is_refused(base: str) -> None:
    lm = AutoModelForCausalLM.from_pretrained(base)
    whole_list = list(lm.model.layers)
    lm.model.norm.register_forward_pre_hook(lambda *_: whole_list[-1](torch.zeros(1, 1, 32), position_embeddings=ONE))
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM runs all its layers in a way of its own: leave layer out$"
    ):
        enable_early_exit(lm, 2)


ONE = (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))


@pytest.mark.parametrize(("tune", "k"), [("lora", 1), ("tokens", 2)])
def test_an_export_embeds_with_a_model_of_that_many_layers(base: str, tmp_path: Path, tune: Any, k: int) -> None:
    gem = made(base, tune=tune, special_tokens=k, layer=3)
    vectors, text, ids = gem.encode(TEXTS), gem.generate("the cat sat", max_new_tokens=9, do_sample=False), [1, 20, 30]
    written = export(gem, tmp_path / "out")
    parts = []
    for name, special in zip(written.embedding, gem.special_ids, strict=True):
        body = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        assert len(body.model.layers) == body.config.num_hidden_layers == 3
        rows = [torch.tensor([[*gem.tokenizer(t)["input_ids"], special]]) for t in TEXTS]
        with torch.no_grad():
            parts.append(torch.stack([body.get_decoder()(input_ids=r).last_hidden_state[0, -1] for r in rows]))
    np.testing.assert_allclose(torch.stack(parts).mean(0).numpy(), vectors, atol=2e-5)
    again = GemModel.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=2e-5)
    assert again.generate("the cat sat", max_new_tokens=9, do_sample=False) == text
    assert again.lm(torch.tensor([ids])).logits.isfinite().all()
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == sorted(written.embedding)


def test_engines_that_read_the_last_layer_are_refused(base: str, tmp_path: Path) -> None:
    gem = made(base, layer=3)
    with pytest.raises(ValueError, match=r"^this gated model is read out at layer 3, other engines read the last: .*$"):
        export(gem, tmp_path / "out")
    gem.save_pretrained(tmp_path / "gem")
    with pytest.raises(ValueError, match=r"is read out at layer 3, this plugin reads the last: use `gemify serve`"):
        EngineGem.of(tmp_path / "gem")


def test_compiled_layers_give_the_same(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemify.model.encode.COMPILE_OPTIONS", {"dynamic": True, "backend": "eager"})
    gem = made(base, layer=2)
    plain = gem.encode(TEXTS)
    with counted(gem) as counts:
        np.testing.assert_allclose(gem.encode(TEXTS, compile=True), plain, atol=1e-5)
        assert counts[2:] == [0, 0]
