"""Words around every text that is embedded: the rows that run, their vectors, and what cannot have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import tiny_models
from gemify import GemModel
from gemify.cli.main import app
from gemify.model.adapter import gate
from gemify.model.attention import gem_mask
from gemify.model.config import CONFIG_FILE, GemConfig
from gemify.model.tokenization import PROMPTEOL
from gemify.paper.tokens import Segment
from tiny_gems import make_gem

BOTH = 'say : "{text}" is:"'
AFTER = '{text} means:"'
TEXTS = ["hello", "a somewhat longer text than that", "", "x" * 40, "<|reserved_0|> {text} </s>"]


def spelled(words: str) -> list[int]:
    """Ids by the tiny tokenizer's own table: one a byte, a control token's name one."""
    ids: list[int] = tiny_models.tokenizer()(words)["input_ids"]
    return ids


def bos_base(directory: Path, name: str) -> Path:
    """A model whose tokenizer begins every text with <s>."""
    kernel = "eager" if name in tiny_models.EAGER_ONLY else "sdpa"
    tiny_models.save(directory, name, attn_implementation=kernel)
    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(directory)
    return directory


def made(base: Path, name: str = "llama", **settings: Any) -> GemModel:
    kernel = "eager" if name in tiny_models.EAGER_ONLY else "sdpa"
    return make_gem(base, attn_implementation=kernel, **settings)


def vector_of(gem: GemModel, ids: list[int], *, hidden: int = 0) -> torch.Tensor:
    """One row laid out by hand and run whole; the special tokens do not see the first ``hidden`` columns."""
    T, k, shared = len(ids), gem.config.k, gem.config.shared_position
    segments = [Segment.HIDDEN] * hidden + [Segment.TEXT] * (T - hidden) + [Segment.SPECIAL] * k
    segments_1T = torch.tensor([[int(s) for s in segments]])
    positions = [*range(T), *([T] * k if shared else range(T, T + k))]
    with torch.no_grad(), gate(segments_1T == Segment.SPECIAL), gem_mask(segments_1T, shared_position=shared):
        hidden_TD = gem.lm.get_decoder()(
            input_ids=torch.tensor([[*ids, *gem.special_ids]]), position_ids=torch.tensor([positions]), use_cache=False
        ).last_hidden_state[0]
    last = hidden_TD[T:]
    return last.mean(0) if gem.config.pooling == "mean" else last.flatten()


def row(gem: GemModel, text: str, template: str, *, head: tuple[int, ...] = ()) -> list[int]:
    """What should run for a text: the special token's name in it is read as bytes, other control tokens are not."""
    name = gem.config.special_tokens[0]
    before, after = template.split("{text}")
    own = spelled(text) if name not in text else tiny_models.tokenizer()(text, split_special_tokens=True)["input_ids"]
    return [*head, *spelled(before), *own, *spelled(after)]


@pytest.mark.parametrize("template", [BOTH, AFTER])
@pytest.mark.parametrize(("k", "pooling", "shared"), [(1, "mean", True), (3, "mean", True), (3, "concat", False)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral-window", "qwen3"])
def test_encode_runs_head_words_text_words_and_special_tokens(
    tmp_path: Path, name: str, k: int, pooling: Any, shared: bool, template: str
) -> None:
    base = bos_base(tmp_path / name, name)
    gem = made(base, name, special_tokens=k, pooling=pooling, shared_position=shared, template=template)
    got = gem.encode(TEXTS, batch_size=2, convert_to_tensor=True)
    for text, vector in zip(TEXTS, got, strict=True):
        expected = vector_of(gem, row(gem, text, template, head=(1,)))
        torch.testing.assert_close(vector, expected, atol=2e-5, rtol=1e-5)
    prompted = vector_of(gem, row(gem, "find: cats", template, head=(1,)))
    torch.testing.assert_close(gem.encode("cats", prompt="find: ", convert_to_tensor=True), prompted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_without_words_nothing_changes(base_dir: Path, k: int, tmp_path: Path) -> None:
    gem, plain = made(base_dir, special_tokens=k), made(base_dir, special_tokens=k, template="{text}")
    assert (gem.encode(TEXTS) == plain.encode(TEXTS)).all()
    assert gem.fingerprint == plain.fingerprint
    assert gem.max_seq_length == 512 - k
    assert gem.text_tokenizer(["a text"], max_tokens=None) == [gem.tokenizer("a text")["input_ids"]]
    gem.save_pretrained(tmp_path / "gem")
    assert "template" not in json.loads((tmp_path / "gem" / CONFIG_FILE).read_text())  # files as they always were
    again = GemModel.from_pretrained(tmp_path / "gem")
    assert again.config.template == "{text}"
    assert (again.encode(TEXTS) == gem.encode(TEXTS)).all()


def test_a_template_is_saved_shown_and_part_of_the_name(base_dir: Path, tmp_path: Path) -> None:
    gem = made(base_dir, template=BOTH)
    gem.save_pretrained(tmp_path / "gem")
    again = GemModel.from_pretrained(tmp_path / "gem")
    assert again.config == gem.config
    assert again.config.template == BOTH
    assert (again.encode(TEXTS) == gem.encode(TEXTS)).all()
    assert again.fingerprint == gem.fingerprint
    assert len({made(base_dir, template=t).fingerprint for t in ("{text}", BOTH, AFTER)}) == 3
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "gem")])
    assert f"{'template':20} {BOTH}\n" in shown.stdout
    made(base_dir).save_pretrained(tmp_path / "plain")
    assert "template" not in CliRunner().invoke(app, ["info", str(tmp_path / "plain")]).stdout


def test_the_text_is_cut_and_never_the_words(tmp_path: Path) -> None:
    gem = made(bos_base(tmp_path / "base", "llama"), special_tokens=2, max_length=32, template=BOTH)
    around = len(spelled(BOTH)) - len(spelled("{text}"))
    assert gem.max_seq_length == 32 - 2 - around
    room = gem.max_seq_length - 1  # <s>
    long = "abcdefghijklmnopqrstuvwxyz"[: room + 5]
    (ids,) = gem.text_tokenizer([long], max_tokens=gem.config.max_text_tokens)
    assert ids == row(gem, long[:room], BOTH, head=(1,))
    assert len(ids) == 30
    assert (gem.encode(long) == gem.encode(long[:room])).all()
    assert not (gem.encode(long) == gem.encode(long[: room - 1])).all()
    torch.testing.assert_close(gem.encode(long, convert_to_tensor=True), vector_of(gem, ids), atol=2e-5, rtol=0)


def test_a_texts_ids_are_its_own(base_dir: Path) -> None:
    """Merges across the seam would change a text's tokens. A special token's name is text in the template too."""
    gem = made(base_dir, template="<|reserved_0|> {text}<|reserved_1|>")
    assert gem.config.special_tokens == ("<|reserved_0|>",)
    (ids,) = gem.text_tokenizer(["a {text} <|reserved_0|>"], max_tokens=None)
    assert not set(ids) & set(gem.special_ids)
    own = gem.text_tokenizer.tokenize_plain(["a {text} <|reserved_0|>"])[0]
    assert own == tiny_models.tokenizer()("a {text} <|reserved_0|>", split_special_tokens=True)["input_ids"]
    before = tiny_models.tokenizer()("<|reserved_0|> ", split_special_tokens=True)["input_ids"]
    assert ids == [*before, *own, 4]  # the other control token in the template is that token


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral-window"])
def test_a_text_that_has_run_is_embedded_with_the_words_after_it(tmp_path: Path, name: str, k: int) -> None:
    gem = made(bos_base(tmp_path / name, name), name, special_tokens=k, template=AFTER)
    texts = ["a prompt", "another, longer prompt", "c"]
    prefill = gem.prefill(texts)
    kept = [layer.keys.clone() for layer in prefill.text.cache.layers]
    torch.testing.assert_close(gem.embed(prefill), torch.tensor(gem.encode(texts)), atol=2e-5, rtol=1e-5)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, prefill.text.cache.layers, strict=True))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert gem.generate(prefill, **options) == gem.generate(texts, **options)  # no words where a text is continued
    assert gem.recover(prefill, max_new_tokens=6) == gem.recover(texts, max_new_tokens=6)
    one = gem.prefill(texts[1])
    ids = [1, *spelled(texts[1] + ' means:"')]
    torch.testing.assert_close(gem.embed(one), vector_of(gem, ids), atol=2e-5, rtol=1e-5)
    if "window" not in name and name != "gemma3":  # the oracle's windows are measured with hidden columns in them
        torch.testing.assert_close(gem.embed(one, start=9), vector_of(gem, ids, hidden=9), atol=2e-5, rtol=1e-5)


def test_words_before_a_text_are_not_in_its_cache(base_dir: Path) -> None:
    gem = made(base_dir, template=BOTH)
    prefill = gem.prefill("a text")
    for use in (gem.embed, gem.recover):
        with pytest.raises(ValueError, match=r"has words before the text, .* to embed use encode"):
            use(prefill)
    assert gem.generate(prefill, max_new_tokens=3) is not None


def test_recovery_starts_behind_the_words(base_dir: Path) -> None:
    gem = made(base_dir, template=BOTH, special_tokens=2)
    plain = made(base_dir, special_tokens=2)
    words = BOTH.split("{text}")
    assert gem.recover(TEXTS[:2], max_new_tokens=6) == plain.recover(
        [words[0] + t + words[1] for t in TEXTS[:2]], max_new_tokens=6
    )  # bytes: here a row is the same, tokenised at once or in parts


@pytest.mark.parametrize("template", ["", "no place", "{text} and {text}", "{ text }", 7, None])
def test_what_is_no_template_is_refused(base_dir: Path, tmp_path: Path, template: Any) -> None:
    with pytest.raises(ValueError, match=r"template must hold \{text\} exactly once, got "):
        GemModel.from_base(str(base_dir), template=template)
    made(base_dir).save_pretrained(tmp_path / "gem")
    path = tmp_path / "gem" / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template": template}))
    with pytest.raises(ValueError, match="exactly once"):
        GemConfig.from_directory(tmp_path / "gem")


def test_what_has_no_room_or_no_reader_is_refused(base_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"leaves no room for a text in 20 tokens \(max_length\): shorten it"):
        GemModel.from_base(str(base_dir), template="words " * 5 + "{text}", max_length=20)
    with pytest.raises(ValueError, match="needs special tokens to read it, there are 0"):
        GemModel.from_base(str(base_dir), template=AFTER, special_tokens=0, tune="lora")


def test_a_baselines_template_gives_its_row(base_dir: Path) -> None:
    """PromptEOL of the bare base, and a GEM's row with the same words, differ in the last column alone."""
    from gemify.evaluation.baselines import BaselineEncoder

    gem = made(base_dir, template=PROMPTEOL)
    baseline = BaselineEncoder(gem.lm, gem.tokenizer, "prompteol")
    (ids,) = gem.text_tokenizer(["some text"], max_tokens=None)
    assert baseline._rows(["some text"], None) == [(ids, len(spelled('This sentence : "')))]
    with torch.no_grad():
        expected = gem.lm.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
    np.testing.assert_allclose(baseline.encode(["some text"])[0], expected, atol=1e-5)
