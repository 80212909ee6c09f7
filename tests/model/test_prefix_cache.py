"""Prefixes that have run: the longest one is found, KV is that of the same tokens, memory and clients stay apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemify import GemModel
from gemify.model.kv_cache import PrefixCache, common_prefix_length, empty_text, key_values, size_in_bytes, take_prefix
from gemify.model.prefill import run_prefill


@pytest.fixture(scope="module")
def shared_gem(base_dir: Path) -> GemModel:
    return GemModel.from_base(str(base_dir))


rows = st.lists(st.integers(0, 2), max_size=8)


def ran(gem: GemModel, ids: list[int]):  # type: ignore[no-untyped-def]
    ids_BT = torch.tensor([ids])
    return run_prefill(gem.lm, ids_BT, torch.ones_like(ids_BT).bool(), single=True).text


@given(rows, rows)
def test_a_common_prefix_is_all_that_both_begin_with(a: list[int], b: list[int]) -> None:
    n = common_prefix_length(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(kept=st.lists(st.lists(st.integers(10, 12), min_size=1, max_size=6), max_size=5), wanted=rows)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_longest_prefix_is_found(shared_gem: GemModel, kept: list[list[int]], wanted: list[int]) -> None:
    ids = [10 + i for i in wanted] or [10]
    cache = PrefixCache(shared_gem.lm, min_tokens=1)
    for row in kept:
        cache.insert(row, ran(shared_gem, row))
    found = cache.match(ids)
    length = found.mask_BT.shape[1]
    assert length == max((common_prefix_length(row, ids[:-1]) for row in kept), default=0)
    if length:
        for got, own in zip(key_values(found.cache), key_values(ran(shared_gem, ids[:length]).cache), strict=True):
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


def test_memory_and_salts_are_kept_apart(shared_gem: GemModel) -> None:
    one, two = ran(shared_gem, list(range(10, 30))), ran(shared_gem, list(range(40, 60)))
    cache = PrefixCache(shared_gem.lm, size_in_bytes(one.cache) + 1)
    cache.insert(range(10, 30), one, "ann")
    assert cache.match([*range(10, 30), 5], "bob").mask_BT.shape[1] == 0
    assert cache.match([*range(10, 30), 5], "ann").mask_BT.shape[1] == 20
    cache.insert(range(40, 60), two, "ann")
    assert len(cache) == 1
    assert cache.match([*range(10, 30), 5], "ann").mask_BT.shape[1] == 0
    assert cache.nbytes == size_in_bytes(two.cache)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_prefix_of_a_text_goes_on_as_its_own_run(shared_gem: GemModel, length: int) -> None:
    ids = list(range(10, 20))
    prefix = take_prefix(shared_gem.lm, ran(shared_gem, ids), length)
    assert prefix.mask_BT.shape == (1, length)
    own = ran(shared_gem, ids[:length]) if length else empty_text(shared_gem.lm)
    for got, oracle in zip(key_values(prefix.cache), key_values(own.cache), strict=True):
        torch.testing.assert_close(got, oracle, rtol=1e-4, atol=1e-5)
