"""`gemify bench gpu`: how much of a device's FLOP/s training and encoding use, and how memory grows with row length.

Models have a real one's shape and random weights. The FLOPs of a step are those of a plain language model's step on as
many tokens, counted by torch on the model's shape alone (attention in full, not the causal half; nothing for what
checkpointing computes twice). Two denominators: the device's peak by its maker's sheet (`PEAKS`; MFU), and what a large
matrix product reaches here (the ceiling).
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gemify.bench.timing import Report, make_report, rows_table, run_in_turn, synchronize
from gemify.model.attention import require_kernel
from gemify.model.base import enable_activation_checkpointing
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


def _llama(width: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": Shape(_llama(64, 96, 2, (4, 2), 128, True)),
    "1b": Shape(_llama(2048, 8192, 16, (32, 8), 128256, True)),
    # AdamW's two copies of the weights do not fit on 80 GB.
    "8b": Shape(_llama(4096, 14336, 32, (32, 8), 128256, False), optimizer="sgd", checkpointing=True),
}


@dataclass(frozen=True)
class GpuSettings:
    """What to measure, and on what."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"
    tokens: int = 16384
    """Tokens of a batch."""
    train_length: int = 2048
    encode_length: int = 512
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of the one row whose memory is measured."""
    rounds: int = 5
    matmul_size: int = 8192
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


def bench_gpu(shapes: Sequence[str], settings: GpuSettings) -> Report:
    """Measure shapes (names of `SHAPES`): rates by kind of work, and memory by row length."""
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise ValueError(f"unknown shape {unknown[0]!r}: choose one of {', '.join(SHAPES)}")
    ceiling = matmul_tflops(settings)
    peak = settings.peak_tflops or known_peak(settings.device)
    rows, memory, facts = [], [], {}
    for name in shapes:
        bench = Bench(SHAPES[name], settings)
        shape_rows = _measure_rates(bench, ceiling, peak)
        shape_memory = _measure_memory(bench)
        rows += [{"name": f"{name}, {row['work']}", "shape": name, **row} for row in shape_rows]
        memory += [{"shape": name, **row} for row in shape_memory]
        facts[name] = {
            "parameters": bench.lm.num_parameters(),
            "optimizer": bench.shape.optimizer,
            "checkpointing": bench.shape.checkpointing,
            "memory_growth": {kind: memory_growth(shape_memory, f"{kind}_bytes") for kind in ("train", "encode")},
        }
    used = {
        **vars(settings),
        "device": device_name(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
    }
    used |= {"ceiling_tflops": ceiling, "peak_tflops": peak}
    return make_report(used, rows, memory=memory, shapes=facts)


def _measure_rates(bench: Bench, ceiling: float, peak: float | None) -> list[dict[str, Any]]:
    """Rates of the plain and the GEM training step and of encoding; only the error of what does not fit."""
    settings, sizes = bench.settings, bench.shape.sizes

    def time_jobs(jobs: Mapping[str, Callable[[], object]], per_run: int, tokens: int) -> list[dict[str, Any]]:
        runs = _time(jobs, settings)
        return [{"work": work, **rates(per_run, tokens, seconds, ceiling, peak)} for work, seconds in runs.items()]

    try:
        per_step = flops(sizes, bench.rows, settings.train_length, training=True)
        rows = time_jobs({"plain step": bench.plain_step, "GEM step": bench.gem_step}, per_step, bench.tokens)
    except torch.OutOfMemoryError:
        rows = [{"work": "training", "error": OUT_OF_MEMORY}]
    try:
        count = max(1, settings.tokens // settings.encode_length)
        texts = bench.random_ids(count, settings.encode_length - 1)
        per_pass = flops(sizes, count, settings.encode_length, training=False)
        rows += time_jobs({"encode": lambda: bench.encode(texts)}, per_pass, count * settings.encode_length)
    except torch.OutOfMemoryError:
        rows.append({"work": "encode", "error": OUT_OF_MEMORY})
    return rows


def _measure_memory(bench: Bench) -> list[dict[str, Any]]:
    device = bench.settings.device
    return [
        {
            "tokens": length,
            "train_bytes": peak_bytes(device, lambda n=length: bench.one_row_step(n)),  # type: ignore[misc]
            "encode_bytes": peak_bytes(device, lambda n=length: bench.encode(bench.random_ids(1, n - 1))),  # type: ignore[misc]
        }
        for length in sorted(bench.settings.lengths)
    ]


class Bench:
    """A random model of a shape on the device, and the steps that are timed."""

    def __init__(self, shape: Shape, settings: GpuSettings) -> None:
        self.shape, self.settings = shape, settings
        torch.manual_seed(0)
        with settings.device:
            self.lm = random_model(shape.sizes, dtype=settings.dtype, attention=settings.attention)
        self.lm.train()
        if shape.checkpointing:
            enable_activation_checkpointing(self.lm)
        self.special = self.lm.config.vocab_size - 1
        self.config = GemConfig("full", special_tokens=("<special>",), special_ids=(self.special,))
        self.objective = Objective(self.lm, None, self.config, group_tokens=settings.tokens)
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[shape.optimizer]
        self.optimizer = optimizer(self.lm.parameters(), lr=1e-6, fused=True)
        self.rows = max(1, settings.tokens // settings.train_length)
        self.tokens = self.rows * settings.train_length
        self.texts = self.random_ids(self.rows, settings.train_length)
        self.ids_BT = torch.tensor(self.texts, device=settings.device)

    def random_ids(self, rows: int, length: int) -> list[list[int]]:
        """Random token ids of texts."""
        return torch.randint(3, self.special, (rows, length)).tolist()

    def plain_step(self) -> None:
        """A language model's step, as transformers computes its loss."""
        self._step(self.lm(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss)

    def gem_step(self) -> None:
        """GEM's step on as many tokens: each text is cut in two halves, with the special token between."""
        self._gem_step(self.texts)

    def one_row_step(self, length: int) -> None:
        """GEM's step on one row of ``length`` tokens."""
        self._gem_step(self.random_ids(1, length))

    def encode(self, texts: list[list[int]]) -> None:
        """Encode texts of token ids."""
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
        finally:  # also out of memory: the next measurement must not count these
            self.optimizer.zero_grad(set_to_none=True)


def random_model(sizes: Mapping[str, Any], *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A Llama of these sizes with random weights, on the current default device."""
    config = LlamaConfig(**sizes, max_position_embeddings=131072, rope_theta=500000.0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def flops(sizes: Mapping[str, Any], rows: int, length: int, *, training: bool) -> int:
    """FLOPs of a step forward and backward, or (``training`` False) of the decoder's forward pass without the head."""
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
    operations: int, tokens: int, seconds: Sequence[float], ceiling: float, peak: float | None
) -> dict[str, float | None]:
    """Rates of one run from its FLOPs, its tokens and the seconds of several."""
    median = statistics.median(seconds)
    tflops = operations / median / 1e12
    return {
        "seconds": median,
        "tokens_per_second": tokens / median,
        "tflops": tflops,
        "share_of_ceiling": tflops / ceiling,
        "mfu": tflops / peak if peak else None,
    }


def matmul_tflops(settings: GpuSettings) -> float:
    """TFLOP/s of a square matrix product, the median of several."""
    n = settings.matmul_size
    a, b = (torch.randn(n, n, device=settings.device, dtype=settings.dtype) for _ in range(2))
    seconds = _time({"matmul": lambda: torch.mm(a, b)}, settings)["matmul"]
    return 2 * n**3 / statistics.median(seconds) / 1e12


def _time(jobs: Mapping[str, Callable[[], object]], settings: GpuSettings) -> dict[str, list[float]]:
    runs = run_in_turn(
        {name: lambda _, job=job: job() for name, job in jobs.items()},  # type: ignore[misc]
        rounds=settings.rounds,
        warmup=2,
        device=settings.device,
    )
    return {name: run.seconds for name, run in runs.items()}


def peak_bytes(device: torch.device, job: Callable[[], Any]) -> int | str | None:
    """Maximum memory while the job runs: on the device, or of this process (None where the system does not count)."""
    gc.collect()
    try:
        if device.type != "cuda":
            return _resident_peak(job)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        job()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY


def _resident_peak(job: Callable[[], Any]) -> int | None:
    """The job's maximum resident memory by Linux, whose count can be reset."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")
    except OSError:
        job()
        return None
    job()
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def memory_growth(memory: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Bytes per token between the two longest rows, divided by those between the two shortest: 1 is linear growth."""
    points = [(m["tokens"], m[name]) for m in memory if isinstance(m[name], int)]
    if len(points) < 3:
        return None
    (n0, b0), (n1, b1), (n2, b2), (n3, b3) = *points[:2], *points[-2:]
    first, last = (b1 - b0) / (n1 - n0), (b3 - b2) / (n3 - n2)
    return last / first if first > 0 else None


def known_peak(device: torch.device) -> float | None:
    """TFLOP/s of a device by its name, of `PEAKS`."""
    name = device_name(device)
    return next((tflops for known, tflops in PEAKS.items() if known in name), None)


def device_name(device: torch.device) -> str:
    """Name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


COLUMNS = {
    "shape": ("shape", ""),
    "work": ("work", ""),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "tflops": ("TFLOP/s", ".3g"),
    "share_of_ceiling": ("share of the ceiling", ".0%"),
    "mfu": ("MFU", ".0%"),
    "error": ("error", ""),
}
MEMORY_COLUMNS = {
    "shape": ("shape", ""),
    "tokens": ("tokens of a row", ",d"),
    "train_mb": ("training (MB)", ",.0f"),
    "encode_mb": ("encoding (MB)", ",.0f"),
}


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    s = report["settings"]
    peak = f" of {s['peak_tflops']:g} on paper" if s["peak_tflops"] else ""
    head = f"{s['device']}, {s['dtype']}, {s['attention']}: a matrix product reaches {s['ceiling_tflops']:.3g} TFLOP/s"
    head += peak
    memory = [
        {**m, **{f"{kind}_mb": _megabytes(m[f"{kind}_bytes"]) for kind in ("train", "encode")}}
        for m in report["memory"]
    ]
    growth = [
        f"{name}: growth of memory per token (1: linear): "
        + ", ".join(f"{kind} {value:.2f}" for kind, value in facts["memory_growth"].items() if value is not None)
        for name, facts in report["shapes"].items()
    ]
    tables = rows_table(report["rows"], COLUMNS), rows_table(memory, MEMORY_COLUMNS)
    return "\n\n".join([head, *tables, *growth])


def _megabytes(found: int | str | None) -> float | str | None:
    return found / 2**20 if isinstance(found, int) else found
