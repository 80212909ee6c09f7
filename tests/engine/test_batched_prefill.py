"""Prompts read in one pass: each as if it were alone, and none that another one's run would have spared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_engine import some_ids

import tiny_models
from engine_client import running
from gemify import GemModel
from gemify.engine.running_batch import prefill_batch, supports_batched_prefill
from gemify.engine.sampling import SamplingParams
from gemify.model.kv_cache import CachedText, key_values, new_full_cache
from tiny_gems import make_gem

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", sorted(tiny_models.ARCHITECTURES))
@torch.no_grad()
def test_together_is_as_alone(name: str) -> None:
    lm = tiny_models.build(name, "eager" if name in tiny_models.EAGER_ONLY else "sdpa")
    if not supports_batched_prefill(lm):
        assert "window" in name or name in ("gemma2", "gemma3", "cohere2", "gpt_oss")
        return
    empty = CachedText(new_full_cache(lm), torch.ones(1, 0, dtype=torch.bool))
    before = [prefill_batch(lm, [empty], [some_ids(i, n)])[0][0] if n else empty for i, n in enumerate((7, 0, 2, 7))]
    rows = [some_ids(10 + i, n) for i, n in enumerate((1, 9, 4, 3))]
    together = prefill_batch(lm, before, rows)
    for text, row, (got, logits_1V) in zip(before, rows, together, strict=True):
        ((alone, expected_1V),) = prefill_batch(lm, [text], [row])
        torch.testing.assert_close(logits_1V, expected_1V, atol=1e-4, rtol=1e-4)
        assert got.mask_BT.shape == alone.mask_BT.shape
        for (k, v), (ek, ev) in zip(key_values(got.cache), key_values(alone.cache), strict=True):
            torch.testing.assert_close(k, ek, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(v, ev, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def shared_gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir)


def passes(gem: GemModel, prompts: list[list[int]], **options: int) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Shapes of the passes that read, of all prompts asked at once; what each reused; tokens run."""
    seen: list[tuple[int, ...]] = []
    hook = gem.lm.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with running(gem, **options) as asker:
        with asker.engine.paused():
            jobs = []
            for ids in prompts:
                heard = asker.write(ids, SamplingParams(max_tokens=1, temperature=0.0))
                jobs.append((asker.request, heard))
        for _, heard in jobs:
            heard.wait()
        hook.remove()
        asker.engine.stop()  # the counts are those of whole steps
        return seen, [job.cached_tokens for job, _ in jobs], asker.engine.stats().prompt_tokens


def test_prompts_that_wait_are_read_in_one_pass(shared_gem: GemModel) -> None:
    seen, reused, run = passes(shared_gem, [some_ids(i, 5 + i) for i in range(6)], max_num_batched_tokens=100)
    assert seen == [(6, 10)]
    assert reused == [0] * 6
    assert run == sum(range(5, 11))


def test_a_shared_beginning_is_run_once_all_the_same(shared_gem: GemModel) -> None:
    start = some_ids(99, 30)
    seen, reused, run = passes(shared_gem, [start + some_ids(i, 4) for i in range(6)], max_num_batched_tokens=400)
    assert seen == [(1, 34), (5, 4)]
    assert reused == [0, *[30] * 5]
    assert run == 34 + 5 * 4


def test_a_pass_reads_no_more_than_a_step_may(shared_gem: GemModel) -> None:
    seen, _, run = passes(shared_gem, [some_ids(i, 8) for i in range(5)] + [some_ids(7, 50)], max_num_batched_tokens=20)
    assert run == 90
    assert all(rows * columns <= 20 for rows, columns in seen)


def test_a_pass_reads_no_more_rows_than_there_are(shared_gem: GemModel) -> None:
    seen, _, _ = passes(shared_gem, [some_ids(i, 8) for i in range(5)], max_num_seqs=2, max_num_batched_tokens=100)
    assert [rows for rows, _ in seen] == [2, 2, 1]
