"""What a GPU is waited for, counted on the pretended device: a fixed number of times a pass, never in a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_gpu_training import batch

import pretend_device
import tiny_models
from gemify import GemModel
from gemify.engine.requests import GenerationRequest
from gemify.engine.sampling import SamplingParams
from gemify.engine.scheduler import GenerationScheduler
from gemify.model.encode import encode_ids
from gemify.model.projection import ridge
from gpu_device import DEVICE, KINDS, NEEDS_GPU
from tiny_gems import make_gem, make_objective

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.skipif(DEVICE != pretend_device.NAME, reason="counted on the pretended device (tests/model starts it)"),
]


def gem_of(directory: Path, kind: str, layers: int) -> GemModel:
    base = tiny_models.save(directory / f"base-{layers}", num_hidden_layers=layers)
    return make_gem(base, **KINDS[kind], device=DEVICE, dtype=torch.float32)


def waits(job: Callable[[], object]) -> Counter[str]:
    job()  # what is done once
    pretend_device.WAITS.clear()
    job()
    return Counter(pretend_device.WAITS)


def test_where_cpu_and_device_meet_is_an_error() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device, found pretend and cpu"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device, found pretend and cpu"):
        torch.nn.Linear(3, 4).to(DEVICE)(torch.ones(2, 3))
    assert (x + torch.tensor(1.0)).device.type == DEVICE  # a number
    assert sum(waits(lambda: [bool(x.any()), x[x > 0], x.cpu(), x.sum() + 1]).values()) == 3
    assert ridge(torch.randn(9, 3).to(DEVICE), torch.randn(9, 2).to(DEVICE)).device.type == DEVICE


@pytest.mark.parametrize(
    ("kind", "most"),
    [("gated", 10), ("lora", 10), ("full", 8), ("embedding-lora-mean", 3)],
)
def test_an_encode_pass(tmp_path: Path, kind: str, most: int) -> None:
    """Inputs, the gate's index, the special tokens' rows, transformers' look at the padding: before the first layer."""
    rows = [[40, 41, 42], [50, 51, 52, 53, 54]]
    found = []
    for layers in (2, 4):
        gem = gem_of(tmp_path, kind, layers)
        with torch.inference_mode():
            found.append(waits(lambda gem=gem: encode_ids(gem.lm, gem.config, rows)))
    assert found[0] == found[1], "a layer waits"
    assert sum(found[0].values()) <= most, dict(found[0])


def test_a_written_token(tmp_path: Path) -> None:
    """A step gives its inputs to the device and gets the tokens back, for all of its rows and layers at once."""
    found = {}
    for layers, rows, tokens in ((2, 2, 6), (2, 2, 12), (2, 5, 12), (2, 5, 6), (4, 5, 6)):
        gem = gem_of(tmp_path / f"{rows}-{tokens}", "gated", layers)
        scheduler = GenerationScheduler(
            gem, max_num_seqs=8, kv_cache_bytes=1 << 30, prefix_cache_bytes=0, max_num_batched_tokens=512
        )

        def write(scheduler=scheduler, rows=rows, tokens=tokens) -> None:
            sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            for row in range(rows):
                scheduler.waiting.append(GenerationRequest([40 + row, 50, 60], sampling, lambda _: None, n=1))
            with torch.inference_mode():
                while scheduler.busy:
                    scheduler.step()

        found[layers, rows, tokens] = sum(waits(write).values())
    assert (found[2, 2, 12] - found[2, 2, 6]) / 6 == 3  # the third: transformers looks whether all of a mask is True
    assert (found[2, 5, 12] - found[2, 5, 6]) / 6 == 3
    assert found[2, 5, 6] == found[4, 5, 6]


@pytest.mark.parametrize("kind", ["gated", "full", "embedding-lora-mean"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_training_pass(tmp_path: Path, kind: str, alpha: float) -> None:
    if kind.startswith("embedding") and not alpha:
        pytest.skip("it has no next-token loss")
    found = []
    for layers in (2, 4):
        gem = gem_of(tmp_path, kind, layers)
        objective = make_objective(gem, frozen=gem.config.frozen_base).to(DEVICE)
        made = batch(alpha)
        if gem.config.frozen_base:
            made = type(made)(alpha, rows=made.rows[:3], views=made.views, step_targets=40)
        found.append(waits(lambda objective=objective, made=made: objective(made).total.backward()))
    assert found[0] == found[1], "a layer waits"
    assert sum(found[0].values()) <= 24, dict(found[0])
