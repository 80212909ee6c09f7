"""Bases that do not load: one line that says what is wrong and what helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

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
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True, "group_size": 32}
    (copy / "config.json").write_text(json.dumps(config))
    error = error_of(copy)
    if "pip install" not in error:  # the package is there, the weights are not of its format
        pytest.skip(error)
    assert f"stored as {method}, which needs {package}: pip install {package}" in error


@pytest.mark.parametrize("share", [0.0, 1e-4, 1e-3, 0.5, 0.99])
def test_cut_off_weights(copy: Path, share: float) -> None:
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw[: int(share * len(raw))])
    assert "damaged or cut off, get it again" in error_of(copy)


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
