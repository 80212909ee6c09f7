"""`gemify bench gpu`: its arithmetic against a formula, and the whole of it at a tiny shape on the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gemify.bench.gpu import (
    PEAKS,
    SHAPES,
    Bench,
    GpuSettings,
    bench_gpu,
    flops,
    memory_growth,
    rates,
    require_device,
    to_markdown,
)
from gemify.bench.timing import rows_by_name
from gemify.cli.main import app


def by_formula(name: str, rows: int, length: int, *, training: bool) -> float:
    """2 operations a weight and token, and 4 a pair of columns and hidden value in each layer; three times to train."""
    s = SHAPES[name].sizes
    width, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    kv = width * s["num_key_value_heads"] // s["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    tokens = rows * length
    head = s["vocab_size"] * width if training else 0
    once = 2 * (weights + head) * tokens + 4 * layers * width * rows * length**2
    return 3 * once if training else once


@pytest.mark.parametrize(("name", "rows", "length"), [("tiny", 3, 64), ("1b", 2, 2048), ("8b", 1, 512)])
@pytest.mark.parametrize("training", [True, False])
def test_operations_are_those_of_the_formula(name: str, rows: int, length: int, training: bool) -> None:
    counted = flops(SHAPES[name].sizes, rows, length, training=training)
    assert counted == pytest.approx(by_formula(name, rows, length, training=training), rel=0.005)


def test_the_shapes_are_the_models_they_are_called_after() -> None:
    def parameters(name: str) -> float:
        s = SHAPES[name].sizes
        table = s["vocab_size"] * s["hidden_size"] * (1 if s["tie_word_embeddings"] else 2)
        head_only = by_formula(name, 1, 1, training=False) / 2 - 2 * s["num_hidden_layers"] * s["hidden_size"]
        return (table + head_only) / 1e9

    assert parameters("1b") == pytest.approx(1.2358, rel=1e-3)  # of Llama-3.2-1B
    assert parameters("8b") == pytest.approx(8.0303, rel=1e-3)  # of Llama-3-8B


def test_rates_and_memory_growth() -> None:
    found = rates(8 * 10**12, 100, [5.0, 2.0, 1.0], ceiling=8.0, peak=16.0)
    assert found == {"seconds": 2.0, "tokens_per_second": 50.0, "tflops": 4.0, "share_of_ceiling": 0.5, "mfu": 0.25}
    assert rates(1, 1, [1.0], ceiling=1.0, peak=None)["mfu"] is None

    def memory(function: str) -> list[dict[str, int]]:
        return [{"tokens": n, "bytes": eval(function, {"n": n})} for n in (1024, 2048, 4096, 8192)]

    assert memory_growth(memory("10**9 + 5 * n"), "bytes") == pytest.approx(1.0)
    assert memory_growth(memory("10**9 + n * n"), "bytes") == pytest.approx(4.0)
    assert memory_growth(memory("n")[:2], "bytes") is None
    assert memory_growth([*memory("n")[:2], {"tokens": 1, "bytes": "out of memory"}], "bytes") is None  # type: ignore[dict-item]


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu --shape tiny") as refused:
        require_device(None)
    assert "\n" not in str(refused.value)
    assert require_device("cpu").type == "cpu"
    assert PEAKS["H100"] == 989.0


@pytest.mark.usefixtures("one_thread")
def test_all_of_it_runs_at_a_tiny_shape_on_the_cpu(tmp_path: Path) -> None:
    flags = (
        "--device cpu --shape tiny --batch-tokens 256 --train-length 64 --encode-length 32 --rounds 2 --matmul-size 128"
    )
    more = ["--lengths", "64,128,256,512", "--dtype", "float32", "--peak-tflops", "0.5", "-o", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, ["bench", "gpu", *flags.split(), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "| tiny | GEM step |" in done.output
    record = json.loads((tmp_path / "r.json").read_text())
    rows = rows_by_name(record)
    assert list(rows) == ["tiny, plain step", "tiny, GEM step", "tiny, encode"]
    for work in rows.values():
        assert work["tflops"] > 0
        assert work["mfu"] == pytest.approx(work["tflops"] / 0.5)
        assert work["share_of_ceiling"] == pytest.approx(work["tflops"] / record["settings"]["ceiling_tflops"])
    plain = rows["tiny, plain step"]
    formula = by_formula("tiny", 4, 64, training=True)
    assert plain["tflops"] * plain["seconds"] * 1e12 == pytest.approx(formula, rel=0.01)
    assert plain["tokens_per_second"] * plain["seconds"] == pytest.approx(256)
    assert [m["tokens"] for m in record["memory"]] == [64, 128, 256, 512]


@pytest.mark.usefixtures("one_thread")
def test_what_does_not_fit_is_said_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    settings = GpuSettings(
        cpu, torch.float32, tokens=64, train_length=16, encode_length=16, lengths=(8,), rounds=1, matmul_size=8
    )
    modes: list[bool] = []

    def fail(lm: torch.nn.Module, *_: object) -> None:
        modes.append(lm.training)
        raise torch.OutOfMemoryError

    monkeypatch.setattr("gemify.bench.gpu.encode_ids", fail)
    report = bench_gpu(["tiny"], settings)
    rows = rows_by_name(report)
    assert rows["tiny, encode"]["error"] == report["memory"][0]["encode_bytes"] == "out of memory"
    assert rows["tiny, GEM step"]["tflops"] > 0
    assert re.search(r"\| tiny \| encode \|.*\| out of memory \|", to_markdown(report))
    assert modes == [False, False]
    monkeypatch.setattr(Bench, "_step", lambda *_: fail(torch.nn.Module()))
    assert re.search(r"\| tiny \| training \|.*\| out of memory \|", to_markdown(bench_gpu(["tiny"], settings)))


def test_a_model_that_could_not_encode_trains_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of training it would checkpoint nothing, and take more memory than is said."""
    bench = Bench(SHAPES["tiny"], GpuSettings(torch.device("cpu"), dtype=torch.float32, tokens=32, train_length=16))
    monkeypatch.setattr("gemify.bench.gpu.encode_ids", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.encode([[3, 4]])
    assert bench.lm.training


def test_wrong_words_are_refused() -> None:
    done = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--shape", "huge", "--matmul-size", "8"])
    assert isinstance(done.exception, ValueError)
    assert "choose one of tiny, 1b, 8b" in str(done.exception)
    assert CliRunner().invoke(app, ["bench", "gpu", "--lengths", "long", "--device", "cpu"]).exit_code == 2


def test_what_cannot_be_measured_is_refused() -> None:
    cpu = torch.device("cpu")
    for lengths in ((8, 8, 16), (1, 8), ()):
        with pytest.raises(ValueError, match="lengths must differ and be at least 2"):
            GpuSettings(cpu, lengths=lengths)
    with pytest.raises(ValueError, match="flex_attention cannot train on a CPU"):
        GpuSettings(cpu, attention="flex_attention")
    with pytest.raises(ValueError, match="foo"):
        GpuSettings(cpu, attention="foo")
    with pytest.raises(ValueError, match="unknown device 'foo'"):
        require_device("foo")


def test_a_step_that_fails_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would count as memory of what is measured next."""
    bench = Bench(SHAPES["tiny"], GpuSettings(torch.device("cpu"), dtype=torch.float32, tokens=32, train_length=16))

    def fail() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench.optimizer, "step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        bench.gem_step()
    assert all(p.grad is None for p in bench.lm.parameters())
