"""Bases that do not load: one line that says what is wrong and what helps."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gemify.model.base import load_base


@pytest.fixture
def copy(base_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "copy"))


def error_of(name: Path) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        load_base(str(name))
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "gptqmodel"),
        ("awq", "gptqmodel"),
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
        ("hqq", "hqq"),
    ],
)
def test_a_quantized_base_names_its_package(copy: Path, method: str, package: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    config["quantization_config"] |= {"load_in_4bit": True} if method == "bitsandbytes" else {}
    (copy / "config.json").write_text(json.dumps(config))
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is there")
    error = error_of(copy)
    assert f"stored as {method}, which needs {package}: pip install {package}" in error


@pytest.mark.parametrize("share", [0.0, 1e-4, 1e-3, 0.5, 0.99])
def test_cut_off_weights(copy: Path, share: float) -> None:
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw[: int(share * len(raw))])
    assert "damaged or cut off, get it again" in error_of(copy)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"hidden_size": 48}, "are not of the sizes in its config.json: the file is damaged"),
        ({"vocab_size": 9999}, "are not of the sizes in its config.json: the file is damaged"),
        ({"num_hidden_layers": 3}, r"lack model.layers.2.input_layernorm.weight \(of 9\): the file is damaged"),
        ({"num_attention_heads": 7}, r"hidden size \(32\) is not a multiple of the number of attention heads \(7\)"),
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "stored as modelopt, which transformers does not read"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "are not of the sizes in its config.json"),
        ({"quantization_config": {"quant_method": "higgs", "bits": 4}}, "only supported on GPU"),
    ],
)
def test_weights_that_are_not_those_of_the_config(copy: Path, changes: dict[str, Any], error: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    assert re.search(error, error_of(copy))


def test_a_weight_that_is_missing_is_not_made_up(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "lack model.layers.1.mlp.up_proj.weight (of 1)" in error_of(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle that may run code: convert them to safetensors" in error_of(copy)


@pytest.mark.parametrize("size", [0, 3, 8, 24, 200])
def test_cut_off_gguf(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    head = b"GGUF" + bytes([3, 0, 0, 0]) + (10).to_bytes(8, "little") * 2
    path.write_bytes((head + b"\x05" * 400)[:size])
    assert "model.gguf" in error_of(path)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[]"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_broken_json(copy: Path, name: str, text: str) -> None:
    (copy / name).write_text(text)
    error_of(copy)
