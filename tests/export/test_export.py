"""`gemify export` for every kind of GEM: what it writes, and the library's results from it by transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny_models
from gemify import GemModel
from gemify.cli.main import app, main
from gemify.model.export import export
from tiny_gems import make_gem

TEXTS = ["a cat on a mat", "x", "the river is long and red " * 3]
PROMPT = "the cat sat"


def made(base_dir: Path, tune: Any, **settings: Any) -> GemModel:
    return make_gem(base_dir, tune=tune, **settings)


def last_states(lm: Any, tokenizer: Any, texts: list[str], special: int) -> np.ndarray:
    """What an engine that knows nothing of gemify computes: text, special token, last hidden state."""
    rows = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], special]])
        with torch.no_grad():
            rows.append(lm(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy())
    return np.stack(rows)


def continued(lm: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = lm.generate(**inputs, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("reserved", [4, 0], ids=["reserved-token", "added-token"])
@pytest.mark.parametrize("tune", ["tokens", "lora", "full", "gated"])
def test_plain_engines_get_the_librarys_vectors_and_text(tmp_path: Path, tune: str, reserved: int) -> None:
    gem = made(tiny_models.save(tmp_path / "base", reserved=reserved), tune)
    vectors, text, special = (
        gem.encode(TEXTS),
        gem.generate(PROMPT, max_new_tokens=12, do_sample=False),
        gem.special_ids[0],
    )
    export(gem, tmp_path / "out")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert continued(lm, tokenizer) == text
    if tune == "gated":
        assert np.abs(last_states(lm, tokenizer, TEXTS, special) - vectors).max() > 0.1  # untrained without its adapter
        lm = PeftModel.from_pretrained(lm, tmp_path / "out" / "adapter")
    np.testing.assert_allclose(last_states(lm, tokenizer, TEXTS, special), vectors, atol=2e-5)


@pytest.mark.parametrize("tune", ["tokens", "gated"])
def test_plain_engines_are_told_of_the_template(base_dir: Path, tmp_path: Path, tune: str) -> None:
    gem = made(base_dir, tune, template='say : "{text}" is:"')
    vectors, special = gem.encode(TEXTS), gem.special_ids[0]
    export(gem, tmp_path / "out")
    lm, tokenizer = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForCausalLM, AutoTokenizer))
    if tune == "gated":
        lm = PeftModel.from_pretrained(lm, tmp_path / "out" / "adapter")
    filled = [f'say : "{text}" is:"' for text in TEXTS]  # bytes: the same ids, tokenised at once or in parts
    np.testing.assert_allclose(last_states(lm, tokenizer, filled, special), vectors, atol=2e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert r'- Template: "say : \"" before every text and "\" is:\"" after it, then the special token.' in card
    assert "get the text in its template with the special token's name appended" in card


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "qwen2"])
def test_a_tied_head_keeps_its_rows(tmp_path: Path, arch: str) -> None:
    """The special token's trained row is an input: logits stay the base's to the bit where head and table were one."""
    base = tiny_models.build(arch)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    gem = made(tmp_path / "base", "tokens")
    export(gem, tmp_path / "out")
    ids = torch.tensor([[1, 20, 30, 40]])
    base, lm = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "out"))
    with torch.no_grad():
        assert torch.equal(base(ids).logits, lm(ids).logits)


def test_an_added_token_is_not_likely_to_be_written(tmp_path: Path) -> None:
    """A trained input row would be a loud output row, in an engine that does not know which tokens to leave out."""
    base = tiny_models.build("qwen2")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    added = tiny_models.tokenizer(reserved=0)
    added.add_tokens([f"word{i}" for i in range(tiny_models.VOCABULARY - len(added))])  # no row of the table is free
    added.save_pretrained(tmp_path / "base")
    gem = made(tmp_path / "base", "gated")
    (special,) = gem.special_ids
    assert special >= tiny_models.VOCABULARY
    export(gem, tmp_path / "out")
    heads = [AutoModelForCausalLM.from_pretrained(tmp_path / name).get_output_embeddings() for name in ("base", "out")]
    before, after = (head.weight.detach() for head in heads)
    assert torch.equal(after[: tiny_models.VOCABULARY], before)
    torch.testing.assert_close(after[special], before.mean(0))


@pytest.mark.parametrize("pooling", ["mean", "concat"])
@pytest.mark.parametrize("tune", ["full", "gated"])
def test_several_special_tokens_are_several_texts(base_dir: Path, tmp_path: Path, tune: str, pooling: Any) -> None:
    gem = made(base_dir, tune, special_tokens=3, pooling=pooling)
    vectors, ids = gem.encode(TEXTS), gem.special_ids
    written = export(gem, tmp_path / "out")
    assert (written.adapters if tune == "gated" else written.embedding)[0].endswith("-1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = []
    for n, special in enumerate(ids, start=1):
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        if tune == "gated":
            lm = PeftModel.from_pretrained(lm, tmp_path / "out" / f"adapter-{n}")
        parts.append(last_states(lm, tokenizer, TEXTS, special))
    joined = np.mean(parts, axis=0) if pooling == "mean" else np.concatenate(parts, axis=1)
    np.testing.assert_allclose(joined, vectors, atol=2e-5)


@pytest.mark.parametrize("tune", ["tokens", "lora", "full"])
def test_gemify_loads_what_it_exported(base_dir: Path, tmp_path: Path, tune: str) -> None:
    gem = made(base_dir, tune)
    vectors = gem.encode(TEXTS)
    export(gem, tmp_path / "out")
    np.testing.assert_allclose(GemModel.from_pretrained(tmp_path / "out").encode(TEXTS), vectors, atol=2e-5)


def test_one_file_of_weights_and_a_card(base_dir: Path, tmp_path: Path) -> None:
    gem = made(base_dir, "full", prompts={"query": "find: "})
    export(gem, tmp_path / "out")
    ours, theirs = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "embedding" / "model.safetensors"
    assert ours.samefile(theirs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "special-token:<|reserved_0|>" in card
    assert 'Prompt `query`: "find: "' in card
    config = json.loads((tmp_path / "out" / "embedding" / "config_sentence_transformers.json").read_text())
    assert config["prompts"] == {"query": "find: "}


def test_the_precision_asked_for(base_dir: Path, tmp_path: Path) -> None:
    gem = made(base_dir, "lora")
    vectors = gem.encode(TEXTS)
    export(gem, tmp_path / "out", dtype="bfloat16")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    other = GemModel.from_pretrained(tmp_path / "out").encode(TEXTS)
    cosines = (other * vectors).sum(1) / np.linalg.norm(other, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > 0.99
    with pytest.raises(ValueError, match="unknown dtype 'int3': choose one of float32, bfloat16, float16"):
        export(made(base_dir, "full"), tmp_path / "other", dtype="int3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune": "embedding_lora", "special_tokens": 2}, "see each other"),
        ({"special_tokens": 2, "shared_position": False}, "positions of their own"),
    ],
)
def test_what_no_other_engine_can_do_is_refused(
    base_dir: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    gem = GemModel.from_base(str(base_dir), **{"tune": "full", **settings})
    with pytest.raises(ValueError, match=message):
        export(gem, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(gem: GemModel, tmp_path: Path) -> None:
    gem.save_pretrained(tmp_path / "gem")
    done = CliRunner().invoke(app, ["export", "-m", str(tmp_path / "gem"), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["adapters"] == ["adapter"]
    assert facts["embedding"] == []
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "embedding").exists()


def test_the_command_does_not_write_over_the_model(
    gem: GemModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gem.save_pretrained(tmp_path / "gem")
    monkeypatch.setattr("sys.argv", ["gemify", "export", "-m", str(tmp_path / "gem"), "-o", str(tmp_path / "gem")])
    with pytest.raises(SystemExit):
        main()
    assert "holds files: give a new --output" in capsys.readouterr().err
