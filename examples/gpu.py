"""What a GPU is asked, in one JSON file: the tests of tests/gpu, rates, and vectors and losses beside the CPU's.

Run by `make gpu` on a bare machine: PyTorch with CUDA, transformers, PEFT, pytest; no network, no set-up. It is meant
to end within ten minutes. `make gpu DEVICE=cpu` tries it where there is no GPU. Without the starter's weights a random
model of its shape takes its place. A part that fails is recorded, and the others run; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from demo import docstring_sentences

import tiny_models
from gemify import GemModel
from gemify.bench.gpu import GpuSettings, bench_gpu, device_name, random_model, require_device
from gemify.bench.timing import synchronize
from gemify.engine.engine import Engine
from gemify.engine.requests import Completion, Done, Failed
from gemify.engine.sampling import SamplingParams
from gemify.model.base import STARTER, BaseNotFoundError, load_base
from gemify.model.encode import encode_ids
from gemify.paper.tokens import split_row
from gemify.paper.views import full_view
from gemify.training.objective import MicroBatch, Objective
from gemify.training.recipe import Recipe
from gemify.training.trainer import train
from tiny_gems import make_gem

ROOT = Path(__file__).parents[1]
STARTER_SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
FLOAT32_LIMIT, BFLOAT16_LIMIT = 1e-4, 1e-2


class Check:
    """The parts, which share a device, a model and texts."""

    def __init__(self, device: torch.device, work: Path) -> None:
        self.device, self.work, self.on_gpu = device, work, device.type != "cpu"
        self.texts = docstring_sentences()[:: 7 if self.on_gpu else 97][: 1024 if self.on_gpu else 48]
        (work / "texts.txt").write_text("\n".join(docstring_sentences()[:4000]) + "\n", encoding="utf-8")
        self.base = STARTER
        try:
            load_base(STARTER, device="cpu")
            self.gem = STARTER
        except BaseNotFoundError:
            self.base, self.gem = str(work / "base"), str(work / "gem")
            torch.manual_seed(0)
            random_model(STARTER_SIZES, dtype=torch.float32, attention="sdpa").save_pretrained(self.base)
            tiny_models.tokenizer().save_pretrained(self.base)
            make_gem(self.base, device="cpu").save_pretrained(self.gem)

    def load(self, dtype: torch.dtype, device: Any = None) -> GemModel:
        return GemModel.from_pretrained(self.gem, dtype=dtype, device=device or self.device)

    def tests(self) -> dict[str, Any]:
        """The tests of tests/gpu, by pytest."""
        report = self.work / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/gpu"]
        environment = {**os.environ, "GEMIFY_GPU_TESTS_DEVICE": str(self.device)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=360)
        suite = next(iter(ElementTree.parse(report).getroot()))
        failed = {
            f"{case.get('classname')}::{case.get('name')}": problem.get("message", "")[:600]
            for case in suite.iter("testcase")
            for problem in [*case.findall("failure"), *case.findall("error")]
        }
        skipped = collections.Counter(s.get("message", "") for s in suite.iter("skipped"))
        return {"ok": done.returncode == 0, "tests": suite.get("tests"), "failed": failed, "skipped": skipped}

    def rates(self) -> dict[str, Any]:
        """`gemify bench gpu` at the shape of Llama-3.2-1B, in short."""
        if self.on_gpu:
            return bench_gpu(["1b"], GpuSettings(self.device, lengths=(1024, 2048, 4096, 8192), rounds=3))
        sizes = {"tokens": 256, "train_length": 64, "encode_length": 32, "lengths": (64, 128), "matmul_size": 128}
        return bench_gpu(["tiny"], GpuSettings(self.device, torch.float32, rounds=1, **sizes))

    def vectors(self) -> dict[str, Any]:
        """The model's vectors on the device beside the CPU's in float32."""
        expected = self.load(torch.float32, "cpu").encode(self.texts, normalize_embeddings=True)
        found: dict[str, Any] = {"texts": len(self.texts)}
        for dtype, limit in ((torch.float32, FLOAT32_LIMIT), (torch.bfloat16, BFLOAT16_LIMIT)):
            gem = self.load(dtype)
            gem.encode(self.texts)
            vectors = gem.encode(self.texts, normalize_embeddings=True)
            worst = float(np.abs(vectors - expected).max())
            cosine = float((vectors * expected).sum(1).min())
            within = cosine >= 1 - limit and (dtype != torch.float32 or worst <= limit)
            figures = {"max_difference": worst, "min_cosine": cosine, "ok": within, **gem.meter.report()}
            found[str(dtype).removeprefix("torch.")] = figures
        return found | {"ok": found["float32"]["ok"] and found["bfloat16"]["ok"]}

    def language(self) -> dict[str, Any]:
        """The gate: logits and greedy tokens are the base's to the bit. Then the engine, with 16 chats at once."""
        found: dict[str, Any] = {}
        prompt = "Once upon a time there was a"
        for dtype in (torch.float32, torch.bfloat16):
            gem, (base, _) = self.load(dtype), load_base(self.base, dtype=dtype, device=self.device)
            ids_1T = torch.tensor([gem.tokenizer(prompt)["input_ids"]], device=self.device)
            options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
            start = time.perf_counter()
            ours = gem.generate_ids(None, ids_1T, torch.ones_like(ids_1T).bool(), **options)
            seconds = time.perf_counter() - start
            theirs = base.generate(
                ids_1T, attention_mask=torch.ones_like(ids_1T), suppress_tokens=gem.special_ids, **options
            )
            with torch.no_grad():
                same = torch.equal(gem.lm(ids_1T).logits, base(ids_1T).logits)
            rates = {"one_stream_tokens_per_second": round(64 / seconds, 1), **self._engine(gem)}
            found[str(dtype).removeprefix("torch.")] = {"ok": same and torch.equal(ours, theirs), **rates}
        return found | {"ok": all(part["ok"] for part in found.values())}

    def _engine(self, gem: GemModel) -> dict[str, float]:
        """Tokens a second of 16 chats, alone and while texts are embedded."""
        engine, rates = Engine(gem), {}
        engine.start()
        try:
            rows = gem.text_tokenizer(self.texts, max_tokens=gem.config.max_text_tokens)
            for name in ("warm-up", "chats", "chats_beside_embedding"):
                listeners = [_Listener() for _ in range(16)]
                start = time.perf_counter()
                for at, listener in enumerate(listeners):
                    ids = gem.tokenizer(self.texts[at])["input_ids"]
                    engine.generate(ids, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True), listener)
                beside = _Listener()
                if name == "chats_beside_embedding":
                    engine.embed(rows, beside)
                tokens = sum(listener.wait() for listener in listeners)
                rates[f"{name}_tokens_per_second"] = round(tokens / (time.perf_counter() - start), 1)
                if name == "chats_beside_embedding":
                    beside.wait()
        finally:
            engine.stop()
        return rates

    def training(self) -> dict[str, Any]:
        """Steps of the starter's recipe: losses beside the CPU's, and what a step takes in bfloat16."""
        values = Recipe.read_yaml(ROOT / "recipes" / "starter-gated.yaml")
        values |= {"base": self.base, "data": str(self.work / "texts.txt"), "max_steps": 3, "ntp_steps": 1}
        values |= {"precision": "fp32"} | ({} if self.on_gpu else {"batch_size": 4, "contrastive_batch_size": 6})
        losses = {}
        for name, device in (("device", str(self.device)), ("cpu", "cpu")):
            train(Recipe.from_dict(values), self.work / name, device=device, show_progress_bar=False)
            losses[name] = [row["loss"] for row in self._metrics(name)]
        pairs = zip(losses["device"], losses["cpu"], strict=True)
        worst = max(abs(a - b) / max(b, 0.1) for a, b in pairs)  # random weights contrast almost without loss
        steps = 30 if self.on_gpu else 2
        timed = Recipe.from_dict(values | {"precision": "bf16", "max_steps": steps, "ntp_steps": steps // 2})
        train(timed, self.work / "timed", device=str(self.device), show_progress_bar=False)
        seconds = [row["seconds"] for row in self._metrics("timed")]
        halves = {"ntp": seconds[: steps // 2], "contrastive": seconds[steps // 2 :]}
        medians = {f"{name}_step_seconds": float(np.median(some)) for name, some in halves.items()}
        return {"ok": worst <= FLOAT32_LIMIT, "losses": losses, "max_relative_difference": worst, **medians}

    def _metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.work / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    def synchronisations(self) -> dict[str, Any]:
        """Lines that wait for the device, with how often: an encode pass, training passes, and tokens of four chats."""
        gem = self.load(torch.bfloat16)
        rows = gem.text_tokenizer(self.texts[:32], max_tokens=gem.config.max_text_tokens)
        objective = Objective(gem.lm, gem.adapter, gem.config)
        views = [(full_view(row), full_view(row[: max(2, len(row) // 2)])) for row in rows]
        cut = [split_row(row, len(row) // 2) for row in rows]
        engine = Engine(gem)

        def write() -> None:
            listeners = [_Listener() for _ in range(4)]
            for row, listener in zip(rows, listeners, strict=False):
                sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
                engine.generation_worker.scheduler.waiting.append(_request(row, sampling, listener))
            while engine.generation_worker.scheduler.busy:
                engine.generation_worker.scheduler.step()

        def forward(alpha: float) -> Callable[[], object]:
            return lambda: objective(MicroBatch(alpha, cut, views, step_targets=99)).total.backward()

        with torch.inference_mode():
            found = {
                "encode": _count_waits(self.device, lambda: encode_ids(gem.lm, gem.config, rows)),
                "write 4 x 8 tokens": _count_waits(self.device, write),
            }
        found |= {
            "next-token pass": _count_waits(self.device, forward(0.0)),
            "contrastive pass": _count_waits(self.device, forward(1.0)),
        }
        return {"ok": True, **found}


class _Listener:
    """Counts the tokens of a request, and waits for its end."""

    def __init__(self) -> None:
        self.tokens, self.failed, self.ended = 0, None, threading.Event()

    def __call__(self, event: Any) -> None:
        if isinstance(event, Completion):
            self.tokens += event.completion_tokens
        if isinstance(event, Failed):
            self.failed = event
        if isinstance(event, Done):
            self.ended.set()

    def wait(self) -> int:
        self.ended.wait(120)
        if self.failed is not None:
            raise RuntimeError(str(self.failed))
        return self.tokens


def _request(ids: Any, sampling: SamplingParams, listener: _Listener) -> Any:
    from gemify.engine.requests import GenerationRequest

    return GenerationRequest(ids, sampling, listener, n=1)


def _count_waits(device: torch.device, job: Callable[[], object]) -> dict[str, int]:
    """Source lines at which a job waits for a CUDA device, and how often; nothing is counted elsewhere."""
    job()
    synchronize(device)
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return dict(collections.Counter(lines).most_common())


@contextmanager
def _record(report: dict[str, Any], name: str, output: Path) -> Iterator[None]:
    """Write the report after each part, so that a run that is cut off leaves what it has found."""
    start = time.perf_counter()
    print(f"{name} ...", flush=True)
    try:
        yield
    except Exception as error:
        logging.exception("%s failed", name)
        report[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    report[name]["total_seconds"] = round(time.perf_counter() - start, 1)
    output.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(
        f"{name}: {'ok' if report[name].get('ok', True) else 'FAILED'}, {report[name]['total_seconds']} s", flush=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--parts", default="tests,vectors,language,training,synchronisations,rates")
    arguments = parser.parse_args()
    device = require_device(None if arguments.device == "cuda" else arguments.device)
    torch.set_float32_matmul_precision("highest")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        check = Check(device, Path(work))
        model = "starter" if check.base == STARTER else "random weights of the starter's shape"
        machine = {"device": device_name(device), "torch": torch.__version__, "model": model}
        report: dict[str, Any] = {"machine": machine}
        for name in arguments.parts.split(","):
            with _record(report, name, arguments.output):
                report[name] = getattr(check, name)()
    failed = [name for name, part in report.items() if not part.get("ok", True)]
    print(f"{arguments.output}: {'failed: ' + ', '.join(failed) if failed else 'everything ran'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
