"""``gemify bench gpu``: how much of a device's arithmetic training and encoding use, and how memory grows with length.

Models have a real one's shape and random weights: what they compute means nothing, how fast does. The operations of a
step are those of a plain language model's step on the same columns, counted by torch on the model's shape alone
(attention in full, not the causal half; nothing for what checkpointing computes twice). Two denominators: the device's
peak by its maker's sheet (`PEAKS`; MFU), and what a large matrix product reaches here ("ceiling").
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gemify.model.attention import require_kernel
from gemify.model.config import GemConfig
from gemify.model.encode import encode_ids
from gemify.paper.tokens import Row
from gemify.training.objective import MicroBatch, Objective, target_count

PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0, "MI300X": 1307.0}
"""Dense bfloat16 TFLOP/s by name, as their makers give them (the SXM forms)."""
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and how it is trained on one device."""

    sizes: Mapping[str, Any]
    optimizer: str = "adamw"
    checkpointing: bool = False


SHAPES = {
    "tiny": Shape(
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "tie_word_embeddings": True,
        }
    ),
    "1b": Shape(
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        }
    ),
    "8b": Shape(  # AdamW's two copies of it leave no room on 80 GB
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        optimizer="sgd",
        checkpointing=True,
    ),
}


@dataclass(frozen=True)
class Setup:
    """On what, and how much at a time."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"
    tokens: int = 16384
    """Columns of a batch."""
    train_length: int = 2048
    encode_length: int = 512
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Of the one row whose memory is measured."""
    rounds: int = 5
    matmul: int = 8192
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        require_kernel(self.attention)
        if self.attention == "flex_attention" and self.device.type == "cpu":
            raise ValueError("flex_attention cannot train on a CPU (it has no backward pass there): use sdpa")
        if not self.lengths or min(self.lengths) < 2 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths must differ and be at least 2, got {', '.join(map(str, self.lengths))}")


def require_device(name: str | None) -> torch.device:
    """The named device, or the GPU. ValueError if there is none."""
    if name is not None:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"unknown device {name!r}: give cpu, cuda, cuda:1, mps or another of torch's") from error
    if not torch.cuda.is_available():
        raise ValueError("no GPU is at hand: run this on one, or try it out with --device cpu --shape tiny")
    return torch.device("cuda")


def bench_gpu(shapes: Sequence[str], setup: Setup) -> dict[str, Any]:
    """Measure each shape in turn."""
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise ValueError(f"unknown shape {unknown[0]!r}: choose one of {', '.join(SHAPES)}")
    ceiling = matmul_tflops(setup)
    peak = setup.peak_tflops or known_peak(setup.device)
    return {
        "device": device_name(setup.device),
        "torch": torch.__version__,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "attention": setup.attention,
        "ceiling_tflops": ceiling,
        "peak_tflops": peak,
        "shapes": {name: _shape_report(SHAPES[name], setup, ceiling, peak) for name in shapes},
    }


def _shape_report(shape: Shape, setup: Setup, ceiling: float, peak: float | None) -> dict[str, Any]:
    bench = Bench(shape, setup)
    report: dict[str, Any] = {
        "parameters": bench.lm.num_parameters(),
        "optimizer": shape.optimizer,
        "checkpointing": shape.checkpointing,
    }
    try:
        steps = paired({"plain": bench.plain_step, "gem": bench.gem_step}, setup)
        per_step = flops(shape.sizes, bench.rows, setup.train_length, training=True)
        training = {name: rates(per_step, bench.columns, took, ceiling, peak) for name, took in steps.items()}
        report["training"] = training | {"gem_over_plain": _median(steps["gem"]) / _median(steps["plain"])}
    except torch.OutOfMemoryError:
        report["training"] = OUT_OF_MEMORY
    try:
        rows = max(1, setup.tokens // setup.encode_length)
        texts = bench.ids(rows, setup.encode_length - 1)
        took = paired({"encode": lambda: bench.encode(texts)}, setup)["encode"]
        operations = flops(shape.sizes, rows, setup.encode_length, training=False)
        report["encoding"] = rates(operations, rows * setup.encode_length, took, ceiling, peak)
    except torch.OutOfMemoryError:
        report["encoding"] = OUT_OF_MEMORY
    report["memory"] = [
        {
            "tokens": length,
            "train_bytes": peak_bytes(setup.device, lambda n=length: bench.one_row_step(n)),  # type: ignore[misc]
            "encode_bytes": peak_bytes(setup.device, lambda n=length: bench.encode(bench.ids(1, n - 1))),  # type: ignore[misc]
        }
        for length in sorted(setup.lengths)
    ]
    report["bend"] = {name: bend(report["memory"], f"{name}_bytes") for name in ("train", "encode")}
    return report


class Bench:
    """A random model of a shape on the device, and the steps that are timed."""

    def __init__(self, shape: Shape, setup: Setup) -> None:
        self.setup = setup
        torch.manual_seed(0)
        with setup.device:
            self.lm = random_model(shape.sizes, dtype=setup.dtype, attention=setup.attention)
        self.lm.train()
        if shape.checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.special = self.lm.config.vocab_size - 1
        self.config = GemConfig("full", special_tokens=("<special>",), special_ids=(self.special,))
        self.objective = Objective(
            self.lm,
            None,
            special_ids=[self.special],
            frozen_base=False,
            shared_position=True,
            pooling="mean",
            group_tokens=setup.tokens,
        )
        made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[shape.optimizer]
        self.optimizer = made(self.lm.parameters(), lr=1e-6, fused=True)
        self.rows = max(1, setup.tokens // setup.train_length)
        self.columns = self.rows * setup.train_length
        self.texts = self.ids(self.rows, setup.train_length)
        self.ids_BT = torch.tensor(self.texts, device=setup.device)

    def ids(self, rows: int, length: int) -> list[list[int]]:
        """Random texts."""
        return torch.randint(3, self.special, (rows, length)).tolist()

    def plain_step(self) -> None:
        """A language model's step, as transformers computes its loss."""
        self._step(self.lm(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss)

    def gem_step(self) -> None:
        """GEM's step on as many columns: each text is cut in two halves, with the special token between."""
        self._gem_step(self.texts)

    def one_row_step(self, length: int) -> None:
        self._gem_step(self.ids(1, length))

    def encode(self, texts: list[list[int]]) -> None:
        self.lm.eval()
        try:
            with torch.inference_mode():
                encode_ids(self.lm, self.config, texts)
        finally:  # a model that is not in training checkpoints nothing
            self.lm.train()

    def _gem_step(self, texts: list[list[int]]) -> None:
        rows = []
        for ids in texts:
            cut = len(ids) // 2
            rows.append(Row("split", tuple(ids[:cut]), tuple(ids[cut:-1])))
        targets = sum(target_count(row, frozen_base=False) for row in rows)
        self._step(self.objective(MicroBatch(0.0, rows=rows, step_targets=targets)).total)

    def _step(self, loss: Tensor) -> None:
        try:
            torch.autograd.backward(loss)
            self.optimizer.step()
        finally:  # out of memory or not: what is measured next must not count these
            self.optimizer.zero_grad(set_to_none=True)


def random_model(sizes: Mapping[str, Any], *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A Llama of these sizes with random weights, on the current default device."""
    config = LlamaConfig(**sizes, max_position_embeddings=131072, rope_theta=500000.0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def flops(sizes: Mapping[str, Any], rows: int, length: int, *, training: bool) -> int:
    """Operations of a step forward and backward, or (``training`` False) of the decoder's forward pass without the head."""
    with torch.device("meta"):
        lm = random_model(sizes, dtype=torch.bfloat16, attention="eager")
        seen = torch.zeros(rows, 1, length, length, dtype=torch.bfloat16)  # made here, as no value can be asked for
        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long), "attention_mask": seen, "use_cache": False}
        with FlopCounterMode(display=False) as counter:
            if training:
                lm(**inputs).logits.sum().backward()
            else:
                with torch.no_grad():
                    lm.get_decoder()(**inputs)
    return int(counter.get_total_flops())


def rates(
    operations: int, columns: int, took: Sequence[float], ceiling: float, peak: float | None
) -> dict[str, float | None]:
    """Of one step's operations and seconds."""
    seconds = _median(took)
    tflops = operations / seconds / 1e12
    return {
        "seconds": seconds,
        "tokens_per_second": columns / seconds,
        "tflops": tflops,
        "share_of_ceiling": tflops / ceiling,
        "mfu": tflops / peak if peak else None,
    }


def matmul_tflops(setup: Setup) -> float:
    """What a square matrix product reaches, the median of several."""
    n = setup.matmul
    a, b = (torch.randn(n, n, device=setup.device, dtype=setup.dtype) for _ in range(2))
    took = paired({"matmul": lambda: torch.mm(a, b)}, setup)["matmul"]
    return 2 * n**3 / _median(took) / 1e12


def paired(jobs: Mapping[str, Callable[[], Any]], setup: Setup) -> dict[str, list[float]]:
    """Seconds of each job, in turns (A B A B), after two rounds that do not count."""
    took: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(setup.rounds + 2):
        for name, job in jobs.items():
            _wait(setup.device)
            begin = time.perf_counter()
            job()
            _wait(setup.device)
            if number >= 2:
                took[name].append(time.perf_counter() - begin)
    return took


def peak_bytes(device: torch.device, job: Callable[[], Any]) -> int | str | None:
    """Most memory held while the job runs: on the device, or of this process (None where nobody counts)."""
    gc.collect()
    try:
        if device.type != "cuda":
            return _resident_peak(job)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        job()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY


def _resident_peak(job: Callable[[], Any]) -> int | None:
    """By Linux, which can be told to count afresh."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")
    except OSError:
        job()
        return None
    job()
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def bend(memory: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Bytes a token between the two longest rows, over those between the two shortest: 1 is a straight line."""
    points = [(m["tokens"], m[name]) for m in memory if isinstance(m[name], int)]
    if len(points) < 3:
        return None
    (n0, b0), (n1, b1), (n2, b2), (n3, b3) = *points[:2], *points[-2:]
    first, last = (b1 - b0) / (n1 - n0), (b3 - b2) / (n3 - n2)
    return last / first if first > 0 else None


def known_peak(device: torch.device) -> float | None:
    name = device_name(device)
    return next((tflops for known, tflops in PEAKS.items() if known in name), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    peak = report["peak_tflops"]
    lines = [
        f"{report['device']}, {report['dtype']}, {report['attention']}: a matrix product reaches"
        f" {report['ceiling_tflops']:.3g} TFLOP/s" + (f" of {peak:g} on paper" if peak else ""),
        "",
        "| shape | work | tokens/s | TFLOP/s | share of the ceiling | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in report["shapes"].items():
        training = shape["training"]
        works = {"training": training}
        if training != OUT_OF_MEMORY:
            works = {"plain step": training["plain"], "GEM step": training["gem"]}
        for work, r in {**works, "encode": shape["encoding"]}.items():
            if r == OUT_OF_MEMORY:
                lines.append(f"| {name} | {work} | {OUT_OF_MEMORY} | | | |")
                continue
            mfu = "" if r["mfu"] is None else f"{r['mfu']:.0%}"
            lines.append(
                f"| {name} | {work} | {r['tokens_per_second']:,.0f} | {r['tflops']:.3g} |"
                f" {r['share_of_ceiling']:.0%} | {mfu} |"
            )
    lines += ["", "| shape | tokens of a row | training, MB | encoding, MB |", "|---|---|---|---|"]
    for name, shape in report["shapes"].items():
        lines += [
            f"| {name} | {m['tokens']:,} | {_megabytes(m['train_bytes'])} | {_megabytes(m['encode_bytes'])} |"
            for m in shape["memory"]
        ]
        bends = ", ".join(f"{work} {b:.2f}" for work, b in shape["bend"].items() if b is not None)
        lines.append(f"| {name} | bend (1: a straight line) | {bends} | |")
    return "\n".join(lines)


def _megabytes(found: int | str | None) -> str:
    return f"{found / 2**20:,.0f}" if isinstance(found, int) else str(found or "")
