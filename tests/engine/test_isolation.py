"""What one request asks for harms no other, and the engine's memory follows what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_engine import greedy, some_ids

import tiny_models
from engine_client import GREEDY, running
from gemify import GemModel
from gemify.engine import running_batch
from gemify.engine.requests import Failed, QueueFullError
from gemify.engine.sampling import Sampler, SamplingParams
from gemify.model.kv_cache import RunningCache
from tiny_gems import make_gem

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gem(tmp_path_factory: pytest.TempPathFactory) -> GemModel:
    return make_gem(tiny_models.save(tmp_path_factory.mktemp("base")), special_tokens=2)


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40, 5e-324])
def test_next_to_no_temperature_is_greedy(gem: GemModel, temperature: float) -> None:
    with running(gem) as asker:
        cold = asker.write(some_ids(1, 9), SamplingParams(max_tokens=12, temperature=temperature))
        assert cold.text() == greedy(gem, some_ids(1, 9), 12)


def test_an_answer_that_fails_ends_alone(gem: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlucky(Sampler):
        def sample(self, logits_V: torch.Tensor) -> int:
            if self.sampling.seed == 13:
                raise RuntimeError("no number")
            return super().sample(logits_V)

    monkeypatch.setattr(running_batch, "Sampler", Unlucky)
    with running(gem) as asker:
        with asker.engine.paused():
            before = asker.write(some_ids(1, 9))
            broken = asker.write(some_ids(2, 9), SamplingParams(max_tokens=12, seed=13), n=3)
            after = asker.write(some_ids(3, 30))
        assert [before.text(), after.text()] == [greedy(gem, some_ids(1, 9), 12), greedy(gem, some_ids(3, 30), 12)]
        (failed,) = broken.wait().of(Failed)
        assert str(failed.error) == "no number"
        stats = asker.engine.stats()
        assert (stats.num_running_seqs, stats.failed_requests) == (0, 1)


def test_what_a_step_has_taken_in_still_waits(gem: GemModel) -> None:
    with running(gem, max_queue_size=4) as asker, asker.engine.paused():
        asker.embed([some_ids(i, 4) for i in range(9)])
        while asker.engine.embedding_worker._new:
            pass  # its thread takes it in, and waits for its turn
        assert asker.engine.stats().num_waiting_texts == 9
        with pytest.raises(QueueFullError):
            asker.embed([some_ids(1, 4)])


def test_buffers_have_room_for_rows_that_may_come_and_no_more(gem: GemModel) -> None:
    cache = RunningCache(gem.lm)

    def text(length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.ones(1, 2, length, 8), torch.ones(1, 2, length, 8)) for _ in cache.layers]

    def shape() -> tuple[int, ...]:
        return tuple(cache.layers[0].buffers[0].shape)

    for length in (10, 20, 5):
        cache.add_row(text(length))
    for _ in range(2000):
        for index in range(len(cache.layers)):
            cache.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8), index)
    assert shape()[0] <= 4
    cache.add_row(text(4000))
    assert shape()[0] <= 6
    assert shape()[2] <= 6000
    cache.remove_row(3)
    cache.trim_left(cache.length - 2020)
    assert shape()[2] <= 3030
    assert cache.copy_row(0, 2010)[0][0].eq(1).all()


def test_what_a_row_left_behind_is_not_what_another_is_padded_with(gem: GemModel) -> None:
    cache = RunningCache(gem.lm)
    for length, value in ((30, 1.0), (30, float("nan"))):
        cache.add_row([(torch.full((1, 2, length, 8), value),) * 2 for _ in cache.layers])
    cache.remove_row(1)
    cache.add_row([(torch.ones(1, 2, 4, 8),) * 2 for _ in cache.layers])
    assert all(layer.keys.isfinite().all() and layer.values.isfinite().all() for layer in cache.layers)


def test_rows_after_a_trim_go_on_as_before(gem: GemModel) -> None:
    with running(gem, max_num_seqs=3) as asker:
        prompts = [(some_ids(1, 400), 2), (some_ids(2, 20), 40), (some_ids(3, 9), 60), (some_ids(4, 90), 30)]
        heard = [asker.write(ids, SamplingParams(max_tokens=new, temperature=0.0)) for ids, new in prompts]
        assert [h.text() for h in heard] == [greedy(gem, ids, new) for ids, new in prompts]


def test_answers_that_could_never_fit_are_refused(gem: GemModel) -> None:
    a_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    with running(gem, kv_cache_bytes=100 * a_token) as asker:
        asker.write(some_ids(1, 9)).wait()
        asker.write(some_ids(1, 9), n=4).wait()
        asker.write(some_ids(1, 300)).wait()
        with pytest.raises(ValueError, match="5 answers of 21 tokens with their prompt may need 26,880 bytes"):
            asker.write(some_ids(1, 9), n=5)


def test_what_is_remembered_has_its_limit_too(gem: GemModel) -> None:
    with running(gem) as asker, pytest.raises(ValueError, match=r"500 tokens .* may have 600"):
        asker.recover(some_ids(1, 500), max_tokens=600)


def test_without_special_tokens_an_empty_text_harms_nobody(tmp_path: Path) -> None:
    plain = GemModel.from_base(str(tiny_models.save(tmp_path)), special_tokens=0, tune="full", pooling="mean")
    with running(plain) as asker:
        with asker.engine.paused():
            empty, other = asker.embed([[]]), asker.embed([some_ids(1, 5)])
        assert other.vectors().shape == (1, 32)
        assert not empty.vectors().any()
        assert asker.write(some_ids(1, 5), GREEDY).text() == greedy(plain, some_ids(1, 5), 12)
