"""Kept caches: exact, small, within their budget, and never wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

import tiny_models
from gemify import GemModel
from gemify.model.kv_cache import key_values
from gemify.rag.kv_store import KvStore
from gemify.rag.prompt_cache import ModelRunner, PromptCache

IDS = list(range(10, 40))


def ran(gem: GemModel, ids: list[int]):  # type: ignore[no-untyped-def]
    prompt = PromptCache(ModelRunner(gem))
    return prompt.extend_to(ids).text.cache


@pytest.mark.parametrize(("bits", "worst"), [(32, 0.0), (16, 1e-3), (8, 8e-3), (4, 0.08)])
def test_what_is_kept_comes_back(gem: GemModel, tmp_path: Path, bits: int, worst: float) -> None:
    store = KvStore(tmp_path / "kv", fingerprint="f", bits=bits)
    cache = ran(gem, IDS)
    assert store.get(gem.lm, IDS) is None
    store.put(IDS, cache)
    back = store.get(gem.lm, IDS)
    assert back is not None
    for (k, v), (k2, v2) in zip(key_values(cache), key_values(back.cache), strict=True):
        for was, got in ((k, k2), (v, v2)):
            assert got.dtype == was.dtype
            spread = float(was.max() - was.min())
            assert float((was - got).abs().max()) <= worst * spread
    prompt = PromptCache(ModelRunner(gem))
    prompt.load(IDS, back)
    oracle = PromptCache(ModelRunner(gem)).extend_to([*IDS, 50]).logits_BV
    got = prompt.extend_to([*IDS, 50]).logits_BV
    assert prompt.computed == 1
    if bits == 32:
        torch.testing.assert_close(got, oracle, rtol=1e-5, atol=1e-6)
    else:
        assert float((got - oracle).abs().max()) <= 5 * worst * float(oracle.max() - oracle.min())
    assert (store.hits, store.misses, len(store)) == (1, 1, 1)


def test_a_cache_longer_than_a_sliding_window_comes_back_whole(tmp_path: Path) -> None:
    gem = GemModel.from_base(str(tiny_models.save(tmp_path / "base", "mistral-window")))
    ids = IDS * 2
    store = KvStore(tmp_path / "kv", fingerprint="f", bits=32)
    store.put(ids, ran(gem, ids))
    back = store.get(gem.lm, ids)
    assert back is not None
    prompt = PromptCache(ModelRunner(gem))
    prompt.load(ids, back)
    more = [*ids, 50, 51]
    oracle = gem.lm(input_ids=torch.tensor([more])).logits[:, -1]
    torch.testing.assert_close(prompt.extend_to(more).logits_BV, oracle, rtol=1e-5, atol=1e-5)
    assert prompt.computed == 2


def test_fewer_bits_take_less_room(gem: GemModel, tmp_path: Path) -> None:
    cache, sizes = ran(gem, IDS * 8), []
    for bits in (32, 16, 8, 4):
        store = KvStore(tmp_path / str(bits), fingerprint="f", bits=bits)
        store.put(IDS * 8, cache)
        sizes.append(store.nbytes)
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.8 * sizes[1]
    assert sizes[3] < 0.8 * sizes[2]


def test_the_least_recently_used_go_first(gem: GemModel, tmp_path: Path) -> None:
    probe = KvStore(tmp_path / "probe", fingerprint="f")
    probe.put(IDS, ran(gem, IDS))
    store = KvStore(tmp_path / "kv", fingerprint="f", budget_bytes=int(2.5 * probe.nbytes))
    texts = [[i, *IDS[1:]] for i in (10, 11, 12)]
    for age, ids in enumerate(texts[:2]):
        store.put(ids, ran(gem, ids))
        path = max(store.directory.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.utime(path, (1000 + age, 1000 + age))
    assert store.get(gem.lm, texts[0]) is not None  # used now, so the second is the oldest
    store.put(texts[2], ran(gem, texts[2]))
    assert store.nbytes <= (store.budget_bytes or 0)
    assert [store.get(gem.lm, ids) is not None for ids in texts] == [True, False, True]
    tiny_store = KvStore(tmp_path / "none", fingerprint="f", budget_bytes=10)
    tiny_store.put(IDS, ran(gem, IDS))
    assert len(tiny_store) == 0


@pytest.mark.parametrize("harm", ["truncate", "noise", "empty", "another"])
def test_a_damaged_cache_is_computed_again(
    gem: GemModel, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = KvStore(tmp_path, fingerprint="f")
    store.put(IDS, ran(gem, IDS))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if harm == "another":  # a shorter text's file under this text's name
        other = KvStore(tmp_path / "other", fingerprint="f")
        other.put(IDS[:5], ran(gem, IDS[:5]))
        path.write_bytes(next(iter((tmp_path / "other").iterdir())).read_bytes())
    else:
        path.write_bytes({"truncate": whole[: len(whole) // 2], "noise": b"\xff" * 100, "empty": b""}[harm])
    with caplog.at_level(logging.WARNING):
        assert store.get(gem.lm, IDS) is None
    assert "computed again" in caplog.text
    assert not path.exists()


def test_other_weights_other_bits_other_texts_are_never_found(gem: GemModel, tmp_path: Path) -> None:
    KvStore(tmp_path, fingerprint="f").put(IDS, ran(gem, IDS))
    assert KvStore(tmp_path, fingerprint="g").get(gem.lm, IDS) is None
    assert KvStore(tmp_path, fingerprint="f", bits=8).get(gem.lm, IDS) is None
    assert KvStore(tmp_path, fingerprint="f").get(gem.lm, IDS[:-1]) is None
    assert KvStore(tmp_path, fingerprint="f").get(gem.lm, IDS) is not None


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bits must be one of 32, 16, 8, 4, got 5"):
        KvStore(tmp_path, fingerprint="f", bits=5)
    with pytest.raises(ValueError, match="budget_bytes"):
        KvStore(tmp_path, fingerprint="f", budget_bytes=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="it is a file"):
        KvStore(tmp_path / "file", fingerprint="f")
