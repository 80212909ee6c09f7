"""GGUF files through the cache of conversions: the same bits, and no process harms another."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gemify.cli.main import app
from gemify.model import gguf_cache
from gemify.model.base import STARTER_PACKAGE, load_base
from gemify.model.pretrained import weights_fingerprint

TEXTS = ["a cat", "ab  ba\n", "<|im_start|>user\nabc<|im_end|>", "<|special|>a<|special|>", "Ünïcode 漢字 🙂", ""]
MESSAGES = [{"role": "user", "content": "abc"}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A tiny Llama in 4 bits, as llama.cpp writes it, with a byte-level BPE tokenizer."""
    width, inner, layers = 32, 64, 2
    letters = sorted({chr(c) for c in range(33, 127)} | {"Ġ", "Ċ", "Ã", "ľ", "¯"})
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|special|>"]
    merges = ["a b", "Ġ a", "ab c"]
    tokens = [*controls, *letters, *(merge.replace(" ", "") for merge in merges)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(controls) + [1] * (len(tokens) - len(controls)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(seed)

    def add(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", 1 + 0.1 * rng.standard_normal(width, dtype=np.float32))

    add("token_embd", len(tokens), width)
    for layer in range(layers):
        add_norm(f"blk.{layer}.attn_norm")
        add_norm(f"blk.{layer}.ffn_norm")
        for name, rows in (("attn_q", width), ("attn_k", width // 2), ("attn_v", width // 2), ("attn_output", width)):
            add(f"blk.{layer}.{name}", rows, width)
        for name, shape in (("ffn_gate", (inner, width)), ("ffn_up", (inner, width)), ("ffn_down", (width, inner))):
            add(f"blk.{layer}.{name}", *shape)
    add_norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def own_home() -> Path:
    return gguf_cache.cache_directory().parent


@pytest.fixture(autouse=True)
def home(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMIFY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def entries(home: Path) -> list[Path]:
    return sorted((home / "gguf").iterdir())


def require_same(
    path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | str, times: int = 2
) -> None:
    """The model and the tokenizer of a GGUF file are the same read directly, converted, and from the cache."""
    monkeypatch.setenv("GEMIFY_HOME", "/dev/null")
    direct, direct_tokenizer = load_base(str(path), dtype=dtype, device="cpu")
    monkeypatch.setenv("GEMIFY_HOME", str(home))
    for _ in range(times):  # converted now, and found
        lm, tokenizer = load_base(str(path), dtype=dtype, device="cpu")
        assert lm.dtype == direct.dtype
        for kind in ("named_parameters", "named_buffers"):
            expected, found = (dict(getattr(m, kind)()) for m in (direct, lm))
            assert {name: t.dtype for name, t in expected.items()} == {name: t.dtype for name, t in found.items()}
            assert all(torch.equal(t, found[name]) for name, t in expected.items())
        assert weights_fingerprint(lm) == weights_fingerprint(direct)
        assert lm.generation_config.to_dict() == direct.generation_config.to_dict()
        assert lm.config.tie_word_embeddings == direct.config.tie_word_embeddings
        assert lm.config.max_position_embeddings == direct.config.max_position_embeddings
        assert lm.config._attn_implementation == direct.config._attn_implementation
        for added in (True, False):
            ids = [t(TEXTS, add_special_tokens=added)["input_ids"] for t in (direct_tokenizer, tokenizer)]
            assert ids[0] == ids[1]
        assert [tokenizer.decode(row) for row in ids[0]] == [direct_tokenizer.decode(row) for row in ids[0]]
        chats = [t.apply_chat_template(MESSAGES, add_generation_prompt=True) for t in (direct_tokenizer, tokenizer)]
        assert dict(chats[0]) == dict(chats[1])
        for name in ("special_tokens_map", "all_special_ids", "padding_side", "truncation_side", "model_max_length"):
            assert getattr(tokenizer, name) == getattr(direct_tokenizer, name), name
        assert tokenizer.get_vocab() == direct_tokenizer.get_vocab()
        assert {i: (t.content, t.special) for i, t in tokenizer.added_tokens_decoder.items()} == {
            i: (t.content, t.special) for i, t in direct_tokenizer.added_tokens_decoder.items()
        }


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_a_conversion_has_the_files_bits(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | str
) -> None:
    require_same(model, home, monkeypatch, dtype)
    assert len(entries(home)) == 1


@pytest.mark.real
def test_a_conversion_of_the_starter_has_its_bits(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That which every other test of the starter reads."""
    spec = importlib.util.find_spec(STARTER_PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("the starter model is not installed")
    require_same(next(Path(spec.origin).parent.glob("*.gguf")), own_home, monkeypatch, "auto", times=1)


def test_another_file_is_another_entry(model: Path, home: Path, tmp_path: Path) -> None:
    first = load_base(str(model), device="cpu")[0]
    other = write_gguf(tmp_path / "tiny.gguf", seed=1)
    assert weights_fingerprint(load_base(str(other), device="cpu")[0]) != weights_fingerprint(first)
    other.write_bytes(model.read_bytes())  # another name and time, the same bytes
    assert weights_fingerprint(load_base(str(other), device="cpu")[0]) == weights_fingerprint(first)
    assert len(entries(home)) == 2


def test_a_damaged_entry_does_no_harm(model: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = weights_fingerprint(load_base(str(model), device="cpu")[0])
    (entries(home)[0] / "model.safetensors").write_bytes(b"nothing")
    assert weights_fingerprint(load_base(str(model), device="cpu")[0]) == expected
    assert "`gemify cache clear` removes it" in caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMIFY_HOME", str(tmp_path / "file"))
    assert load_base(str(model), device="cpu")[0].num_parameters() > 0
    assert gguf_cache.list_entries() == []


LOAD = "import sys; from gemify.model.base import load_base; load_base(sys.argv[1], device='cpu')"
SLOW = (
    "import sys, time; from pathlib import Path; from gemify.model import gguf_cache\n"
    "def save(stage):\n"
    "    (stage / 'config.json').write_text('{}'); (stage / 'model').write_bytes(bytes(10**6))\n"
    "    print('half', flush=True)\n"
    "    time.sleep(float(sys.argv[2]))\n"
    "print(gguf_cache.store_entry(gguf_cache.cache_directory() / sys.argv[1], save), flush=True)"
)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_convert_the_same_file(model: Path, home: Path) -> None:
    both = [start(LOAD, model) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
    assert len(entries(home)) == 1
    assert load_base(str(model), device="cpu")[0].num_parameters() > 0


def test_a_killed_conversion_is_no_entry(home: Path) -> None:
    path = home / "gguf" / "entry"
    killed = start(SLOW, "entry", 300)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "half\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not gguf_cache.open_entry(path)
    (part,) = entries(home)
    assert part.name.endswith(".part")
    assert start(SLOW, "entry", 0).communicate(timeout=60)[0] == "half\nTrue\n"
    assert gguf_cache.open_entry(path)
    assert part in entries(home)  # it could be another process's
    os.utime(part, (time.time() - 7200,) * 2)
    gguf_cache.evict()
    assert entries(home) == [path]


def test_the_least_recently_used_go_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(stage: Path) -> None:
        (stage / "config.json").write_text("x" * 1000)

    directory = home / "gguf"
    for number in range(gguf_cache.MAX_ENTRIES):
        assert gguf_cache.store_entry(directory / str(number), save)
        os.utime(directory / str(number), (100 + number,) * 2)
    assert gguf_cache.open_entry(directory / "0")
    assert gguf_cache.store_entry(directory / "new", save)
    assert {path.name for path in entries(home)} == {"0", "2", "new"}
    monkeypatch.setattr(gguf_cache, "MAX_BYTES", 1500)
    assert gguf_cache.store_entry(directory / "last", save)
    assert [path.name for path in entries(home)] == ["last"]


def test_the_command_shows_and_clears(model: Path, home: Path) -> None:
    load_base(str(model), device="cpu")
    shown = json.loads(CliRunner().invoke(app, ["cache", "--json"]).stdout)
    assert shown["path"] == str(home / "gguf")
    assert shown["bytes"] == sum(entry["bytes"] for entry in shown["entries"]) > 0
    assert "1 models" in CliRunner().invoke(app, ["cache"]).stdout
    cleared = CliRunner().invoke(app, ["cache", "clear"])
    assert (cleared.exit_code, entries(home)) == (0, [])
    assert CliRunner().invoke(app, ["cache", "empty"]).exit_code == 2
