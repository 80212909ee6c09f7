"""Baseline embeddings of an untrained model, against a forward pass over one row whose ids are written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from gemify.evaluation.baselines import BASELINES, BaselineEncoder, load_sentence_transformer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a text", "a rather longer text than the first one of them", "x", "", "a text", "q" * 70, "  two  spaces "]
Encoders = Callable[..., BaselineEncoder]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {name: (tiny_models.build(name), tiny_models.tokenizer()) for name in ("llama", "gpt2")}


@pytest.fixture(params=["llama", "gpt2"])  # rotary positions, and a table of them
def encoders(request: pytest.FixtureRequest, models: dict[str, tuple[Any, Any]]) -> Encoders:
    lm, tokenizer = models[request.param]
    return lambda method, **settings: BaselineEncoder(lm, tokenizer, method, **settings)


def ids_of(encoder: BaselineEncoder, text: str) -> list[int]:
    """The tiny tokenizer's ids: one a byte."""
    vocabulary = encoder.tokenizer.get_vocab()
    visible = {" ": "Ġ", "\n": "Ċ"}
    return [vocabulary[visible.get(c, c)] for c in text]


def hidden(encoder: BaselineEncoder, text: str) -> np.ndarray:
    """Last hidden states [T, D] of one row, without any padding."""
    with torch.no_grad():
        states = encoder.lm(input_ids=torch.tensor([ids_of(encoder, text)]), output_hidden_states=True).hidden_states
    return states[-1][0].double().numpy()


def expected(encoder: BaselineEncoder, text: str, prompt: str = "") -> np.ndarray:
    text = text or "\n"
    match encoder.method:
        case "mean":
            return hidden(encoder, prompt + text)[len(prompt) :].mean(0)
        case "weighted-mean":
            states = hidden(encoder, prompt + text)[len(prompt) :]
            return np.average(states, axis=0, weights=np.arange(1, len(text) + 1))
        case "last":
            return hidden(encoder, prompt + text)[-1]
        case "prompteol":
            return hidden(encoder, f'{prompt}This sentence : "{text}" means in one word:"')[-1]
        case "echo":
            return hidden(encoder, f"{prompt}Rewrite the sentence: {text}, rewritten sentence: {text}")[
                -len(text) :
            ].mean(0)
    raise AssertionError(encoder.method)


@pytest.mark.parametrize("method", BASELINES)
def test_every_vector_is_that_of_its_row_alone(method: str, encoders: Encoders) -> None:
    encoder = encoders(method)
    wanted = np.stack([expected(encoder, text) for text in TEXTS])
    got = encoder.encode(TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert len(np.unique(got.round(3), axis=0)) == len(set(TEXTS))  # texts are told apart
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_size=1), wanted, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1], batch_size=3, max_tokens=90), wanted[::-1], atol=1e-5)


@pytest.mark.parametrize("method", BASELINES)
def test_a_prompt_is_read_and_not_pooled(method: str, encoders: Encoders) -> None:
    encoder, prompt = encoders(method), "find the topic: "
    texts = TEXTS[1:4]
    wanted = np.stack([expected(encoder, text, prompt) for text in texts])
    got = encoder.encode(texts, prompt=prompt)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    bare = encoder.encode(texts)
    assert np.abs(got - bare).max() > 0.01
    np.testing.assert_array_equal(encoder.encode(texts, prompt=""), bare)


def test_methods_differ_and_a_text_given_twice_is_computed_once(models: dict[str, tuple[Any, Any]]) -> None:
    lm, tokenizer = models["llama"]
    vectors = [BaselineEncoder(lm, tokenizer, method).encode(["some text"]) for method in BASELINES]
    for at, one in enumerate(vectors):
        assert all(np.abs(one - other).max() > 0.01 for other in vectors[at + 1 :])
    rows = []
    handle = lm.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        got = BaselineEncoder(lm, tokenizer, "mean").encode(["b", "a", "b", "b"])
    finally:
        handle.remove()
    assert sum(rows) == 2
    np.testing.assert_array_equal(got[0], got[3])


def test_a_bos_stands_first_and_is_not_pooled(models: dict[str, tuple[Any, Any]]) -> None:
    from tokenizers.processors import TemplateProcessing

    lm, _ = models["llama"]
    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain = BaselineEncoder(lm, tiny_models.tokenizer(), "mean")
    with torch.no_grad():
        ids = torch.tensor([[1, *ids_of(plain, "ask: "), *ids_of(plain, "abc")]])
        states = lm(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    got = BaselineEncoder(lm, tokenizer, "mean").encode(["abc"], prompt="ask: ")
    np.testing.assert_allclose(got[0], states[-3:].mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("method", BASELINES)
def test_long_texts_are_cut_at_the_end_and_templates_never(method: str, encoders: Encoders) -> None:
    encoder = encoders(method, max_length=5)
    got = encoder.encode(["abcdefgh", "abcde", "abcdx"])
    np.testing.assert_array_equal(got[0], got[1])
    assert np.abs(got[1] - got[2]).max() > 0.01
    np.testing.assert_allclose(got[0], expected(encoder, "abcde"), atol=1e-5)


@pytest.mark.parametrize("method", BASELINES)
def test_the_longest_text_fits_a_model_of_1024_positions(method: str, encoders: Encoders) -> None:
    encoder = encoders(method)
    assert np.isfinite(encoder.encode(["a long text " * 200], prompt="find the topic: ")).all()
    assert np.isfinite(encoder.encode(["abc"], prompt="z" * 900)).all()
    with pytest.raises(ValueError, match="leaves no room for a text in 1024 positions"):
        encoder.encode(["abc"], prompt="z" * 1024)


def test_no_text_and_odd_texts(encoders: Encoders) -> None:
    encoder = encoders("mean")
    assert encoder.encode([]).shape == (0, 32)
    assert np.isfinite(encoder.encode(["", " ", "\n", "</s>", "\N{PILE OF POO}", "\x00"])).all()


def test_an_unknown_baseline_is_refused(encoders: Encoders) -> None:
    encoder = encoders("last")
    with pytest.raises(ValueError, match="unknown baseline 'median': choose from mean, weighted-mean, last"):
        BaselineEncoder(encoder.lm, encoder.tokenizer, "median")  # type: ignore[arg-type]


def test_what_is_no_sentence_transformer_is_said_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/modules.json").write_text("{")
    cases = {str(tmp_path / "none"): "no such", str(tmp_path / "empty"): "cannot load", "./none": "no such"}
    for name, said in {**cases, str(tmp_path / "broken"): "cannot load", "nobody/has-this": "cannot load"}.items():
        with pytest.raises(ValueError, match=said) as error:
            load_sentence_transformer(name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
