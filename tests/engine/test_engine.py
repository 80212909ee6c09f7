"""The engine against the library alone: `generate`, `encode`, `recover`, one thing at a time."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import tiny_models
from engine_client import GREEDY, Heard, running
from gemify import GemModel
from gemify.engine.engine import Engine
from gemify.engine.requests import (
    Done,
    EngineStoppingError,
    Failed,
    PrefillOutput,
    PromptStart,
    QueueFullError,
    TokenDelta,
)
from gemify.engine.sampling import SamplingParams
from gemify.model.encode import encode_ids
from gemify.model.prefill import run_prefill
from gemify.model.rope_shift import has_dynamic_rope
from tiny_gems import make_gem, randomize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared_gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir, special_tokens=2)


def some_ids(seed: int, length: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(10, 260) for i in range(length)]


def greedy(gem: GemModel, ids: list[int], new: int) -> str:
    """transformers' own `generate`."""
    never = list(gem.config.special_ids)
    with torch.no_grad():
        out = gem.lm.generate(
            torch.tensor([ids]),
            generation_config=GenerationConfig(
                max_new_tokens=new, do_sample=False, eos_token_id=2, pad_token_id=0, suppress_tokens=never
            ),
        )
    return gem.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", sorted(tiny_models.ARCHITECTURES))
def test_rows_that_come_and_go_write_what_generate_writes(name: str, tmp_path: Path) -> None:
    kernel = "eager" if name in tiny_models.EAGER_ONLY else "sdpa"
    tune = "tokens" if name == "deepseek_v3" else "gated"  # PEFT's LoRA cannot adapt its low-rank layers
    gem = make_gem(tiny_models.save(tmp_path, name, attn_implementation=kernel), attn_implementation=kernel, tune=tune)
    asked = [(some_ids(i, 1 + i * 7 % 30), 1 + i * 5 % 14) for i in range(12)]
    texts = [some_ids(100 + i, i * 3) for i in range(9)]
    with running(gem, max_num_seqs=4, max_num_batched_tokens=16) as asker:
        written, embedded, recovered = [], [], []
        for at, (ids, new) in enumerate(asked):
            written.append(asker.write(ids, SamplingParams(max_tokens=new, temperature=0.0)))
            if at % 4 == 0:
                embedded.append(asker.embed(texts[at // 4 * 3 : at // 4 * 3 + 3]))
                recovered.append(asker.recover(texts[at // 4 + 1], max_tokens=6))
        got = [heard.text() for heard in written]
        vectors = np.concatenate([heard.vectors() for heard in embedded])
        remembered = [heard.text() for heard in recovered]
    assert got == [greedy(gem, ids, new) for ids, new in asked]
    for row, ids in enumerate(texts):
        assert np.allclose(vectors[row], one_vector(gem, ids), atol=1e-5)
    assert remembered == [one_recovery(gem, texts[i + 1], 6) for i in range(3)]


def one_vector(gem: GemModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return encode_ids(gem.lm, gem.config, [ids])[0].numpy()


def one_recovery(gem: GemModel, ids: list[int], new: int) -> str:
    ids_1T = torch.tensor([ids])
    return gem.recover(run_prefill(gem.lm, ids_1T, torch.ones_like(ids_1T).bool(), single=True), max_new_tokens=new)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_a_template_is_in_texts_and_behind_prompts(name: str, tmp_path: Path) -> None:
    base = str(tiny_models.save(tmp_path, name))
    around, behind, plain = (
        GemModel.from_base(base, special_tokens=2, max_length=64, template=t)
        for t in ('say : "{text}" is:"', '{text} is:"', "{text}")
    )
    for made in (around, behind, plain):
        randomize(made)
    texts = ["a text", "x" * 99, ""]
    rows = around.text_tokenizer(texts, max_tokens=around.config.max_text_tokens)
    assert len(rows[1]) == 62
    with running(around) as asker:
        np.testing.assert_allclose(asker.embed(rows).vectors(), around.encode(texts), atol=1e-5)
        assert asker.recover(rows[0], max_tokens=6).text() == around.recover(texts[0], max_new_tokens=6)
        with pytest.raises(ValueError, match="has words before the text"):
            asker.write(some_ids(1, 9), embed_prompt=True)
        assert asker.write(some_ids(1, 9)).text() == greedy(plain, some_ids(1, 9), 12)
        with pytest.raises(ValueError, match="63 tokens, this model embeds up to 62"):
            asker.embed([some_ids(1, 63)])
    words = plain.tokenizer(' is:"')["input_ids"]
    with running(behind, max_num_batched_tokens=8) as asker:
        for _ in range(2):  # the second time from the cache of the first
            heard = asker.write(some_ids(1, 21), embed_prompt=True)
            assert heard.text() == greedy(plain, some_ids(1, 21), 12)
            np.testing.assert_allclose(heard.vectors()[0], one_vector(plain, [*some_ids(1, 21), *words]), atol=1e-5)
        with pytest.raises(ValueError, match="1018 tokens and its embedding takes 7 more, this model takes 1024"):
            asker.write(some_ids(1, 1018), SamplingParams(max_tokens=1), embed_prompt=True)


def test_a_prefix_is_run_once_and_changes_nothing(shared_gem: GemModel) -> None:
    start = some_ids(1, 40)
    asked = [start + some_ids(2, 5), start + some_ids(3, 9), start + some_ids(2, 5)]
    with running(shared_gem) as asker:
        texts, reused = [], []
        for ids in asked:
            texts.append(asker.write(ids).text())
            reused.append(asker.request.cached_tokens)
        other = asker.write(asked[0], cache_salt="somebody else")
        assert other.text() == texts[0]
        assert asker.request.cached_tokens == 0
    assert texts == [greedy(shared_gem, ids, 12) for ids in asked]
    assert reused == [0, 40, 44]


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_prompt_goes_on_from_what_has_run(tmp_path: Path, name: str, exact: bool) -> None:
    gem = make_gem(tiny_models.save(tmp_path, name))
    first, rest = some_ids(1, 30), some_ids(2, 9)
    with running(gem, max_num_batched_tokens=8) as asker:
        heard = Heard()
        request = asker.engine.prefill(first, heard, embed_from=4)
        (output,) = heard.wait().of(PrefillOutput)
        handle = run_prefill(gem.lm, torch.tensor([first]), torch.ones(1, 30).bool(), single=True)
        np.testing.assert_allclose(heard.vectors()[0], gem.embed(handle, start=4), atol=1e-5)
        torch.testing.assert_close(output.logits_BV, handle.logits_BV, rtol=1e-4, atol=1e-4)
        assert (request.prompt_tokens, request.cached_tokens) == (30, 0)
        start = PromptStart(output.text, cached_tokens=3, is_exact=exact)
        with asker.engine.paused():
            beside = asker.write(some_ids(3, 12))
            both = asker.write(first + rest, start=start, n=2, cache_salt="ann")
        assert [both.text(0), both.text(1)] == [greedy(gem, first + rest, 12)] * 2
        assert beside.text() == greedy(gem, some_ids(3, 12), 12)
        assert asker.request.cached_tokens == 3
        assert asker.engine.stats().prompt_tokens == 30 + 9 + 12
        assert asker.write(first + rest, cache_salt="ann").text() == both.text()
        assert asker.request.cached_tokens == (38 if exact else 0)  # other KV is shared with nobody
        with pytest.raises(ValueError, match="1024 tokens and the answer may have 1"):
            asker.engine.prefill(some_ids(1, 1024), Heard())


def test_the_next_turn_of_a_chat_goes_on_from_the_answer(shared_gem: GemModel) -> None:
    with running(shared_gem) as asker:
        heard = asker.write(some_ids(1, 30), SamplingParams(max_tokens=8, temperature=0.0, top_logprobs=0))
        answer = [token.id for token in heard.tokens()]
        longer = some_ids(1, 30) + answer + some_ids(5, 4)
        assert asker.write(longer).text() == greedy(shared_gem, longer, 12)
        assert asker.request.cached_tokens == 30 + len(answer) - 1


def test_prefixes_stay_within_their_budget(shared_gem: GemModel) -> None:
    one = 2 * 2 * 2 * 8 * 4 * 60  # layers, keys and values, heads, width, bytes, tokens
    with running(shared_gem, prefix_cache_bytes=3 * one) as asker:
        for seed in range(12):
            asker.write(some_ids(seed, 50)).wait()
            assert asker.engine.stats().prefix_cache_bytes <= 3 * one
        assert asker.engine.generation_worker.scheduler.prefix_cache.nbytes > one
    with running(shared_gem, prefix_cache_bytes=0) as asker:
        for _ in range(2):
            asker.write(some_ids(1, 50)).wait()
        assert asker.request.cached_tokens == 0


def test_a_prompts_embedding_comes_from_its_own_run(shared_gem: GemModel) -> None:
    ids = some_ids(4, 33)
    with running(shared_gem, max_num_batched_tokens=8) as asker:
        heard = asker.write(ids, embed_prompt=True)
        assert heard.text() == greedy(shared_gem, ids, 12)
        assert np.allclose(heard.vectors()[0], one_vector(shared_gem, ids), atol=1e-5)
        assert asker.engine.stats().prompt_tokens == 33


def test_several_answers_and_seeds(shared_gem: GemModel) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.5, seed=7, stop=())
    ids = some_ids(6, 9)
    with running(shared_gem) as asker:
        first = asker.write(ids, params, n=4)
        again = asker.write(ids, params, n=4)
        beside = [asker.write(some_ids(i, 12), SamplingParams(max_tokens=9)) for i in range(5)]
        answers = [first.text(i) for i in range(4)]
        assert answers == [again.text(i) for i in range(4)]
        assert len(set(answers)) == 4
        assert [event.index for event in first.finished()] == [0, 1, 2, 3]
        for heard in beside:
            heard.wait()


def test_drawn_tokens_follow_the_probabilities(shared_gem: GemModel) -> None:
    ids = some_ids(6, 9)
    with running(shared_gem, max_num_seqs=500) as asker:
        with torch.no_grad():
            logits = shared_gem.lm(torch.tensor([ids])).logits[0, -1]
        logits[list(shared_gem.config.special_ids)] = -torch.inf
        p = torch.softmax(logits / 0.8, dim=-1)
        params = SamplingParams(max_tokens=1, temperature=0.8, seed=1, top_logprobs=0)
        heard = asker.write(ids, params, n=400)
        drawn = [token.id for i in range(400) for token in heard.tokens(i)]
        nucleus = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.5, seed=1, top_logprobs=0)
        heard = asker.write(ids, nucleus, n=400)
        inside = [token.id for i in range(400) for token in heard.tokens(i)]
    best = int(p.argmax())
    assert abs(drawn.count(best) / 400 - p[best].item()) < 4 * (0.25 / 400) ** 0.5
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(-1) < 0.5).sum()) + 1
    assert set(inside) <= set(order[:size].tolist())
    assert len(set(inside)) > size // 2


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {77: 100.0}},
        {"logit_bias": {77: 30.0, 78: 30.0}, "presence_penalty": 2.0},
        {"logit_bias": {77: 30.0, 78: 30.0}, "frequency_penalty": 1.5},
        {"presence_penalty": -2.0, "frequency_penalty": -1.0},
    ],
)
def test_penalties_and_bias(shared_gem: GemModel, params: dict[str, Any]) -> None:
    ids, expected = some_ids(8, 9), list[int]()
    for _ in range(12):
        with torch.no_grad():
            logits = shared_gem.lm(torch.tensor([ids + expected])).logits[0, -1]
        logits[list(shared_gem.config.special_ids)] = -torch.inf
        for token, bias in params.get("logit_bias", {}).items():
            logits[token] += bias
        for token in set(expected):
            logits[token] -= params.get("presence_penalty", 0.0)
            logits[token] -= params.get("frequency_penalty", 0.0) * expected.count(token)
        expected.append(int(logits.argmax()))
    with running(shared_gem) as asker:
        heard = asker.write(ids, SamplingParams(max_tokens=12, temperature=0.0, top_logprobs=0, **params))
        assert [token.id for token in heard.tokens()] == expected


def test_log_probabilities_are_the_models_own(shared_gem: GemModel) -> None:
    ids = some_ids(9, 14)
    with running(shared_gem) as asker:
        heard = asker.write(ids, SamplingParams(max_tokens=5, temperature=0.0, top_logprobs=3))
        tokens = heard.tokens()
    whole = ids + [token.id for token in tokens]
    with torch.no_grad():
        logits = shared_gem.lm(torch.tensor([whole])).logits[0]
    logits[:, list(shared_gem.config.special_ids)] = -torch.inf
    logprobs = torch.log_softmax(logits, dim=-1)
    for at, token in enumerate(tokens):
        row = logprobs[len(ids) - 1 + at]
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [t.id for t in token.top] == row.topk(3).indices.tolist()
        assert token.data == b"" or token.text == token.data.decode(errors="replace")


def test_special_tokens_are_never_written(shared_gem: GemModel) -> None:
    special = shared_gem.config.special_ids[0]
    with running(shared_gem) as asker:
        heard = asker.write(
            some_ids(1, 5), SamplingParams(temperature=0.0, logit_bias={special: 100.0}, top_logprobs=0)
        )
        assert special not in {token.id for token in heard.tokens()}


def test_stop_strings_and_reasons(shared_gem: GemModel) -> None:
    ids = some_ids(3, 11)
    whole = greedy(shared_gem, ids, 12)
    stop = next(c for c in whole[3:] if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    with running(shared_gem) as asker:
        heard = asker.write(ids, SamplingParams(max_tokens=12, temperature=0.0, stop=(stop,)))
        assert heard.text() == whole[: whole.index(stop)]
        assert [event.reason for event in heard.finished()] == ["stop"]
        assert asker.write(ids).finished()[0].reason == "length"
        ended = asker.write(ids, SamplingParams(max_tokens=12, temperature=0.0, logit_bias={2: 100.0}))
        assert ended.text() == ""
        assert ended.finished()[0].reason == "stop"
        assert ended.finished()[0].completion_tokens == 1


def test_a_cancelled_answer_is_gone_by_the_next_step(shared_gem: GemModel) -> None:
    endless = SamplingParams(max_tokens=900, temperature=0.0, logit_bias={77: 100.0})
    with running(shared_gem, max_num_seqs=1) as asker:
        held = Heard()
        begun, at_cancel = threading.Event(), []
        held.on_event = lambda event: begun.set()
        job = asker.engine.generate(some_ids(1, 5), endless, held)
        waiting = asker.write(some_ids(2, 5))
        assert begun.wait(60)
        with asker.engine.paused():  # between two steps
            at_cancel.append(len(held.of(TokenDelta)))
            job.cancel()
        held.wait()
        assert len(held.of(TokenDelta)) <= at_cancel[0]
        assert waiting.text() == greedy(shared_gem, some_ids(2, 5), 12)
        assert asker.engine.stats().cancelled_requests == 1


def test_waiting_requests_can_be_cancelled(shared_gem: GemModel) -> None:
    with running(shared_gem) as asker:
        with asker.engine.paused():
            gone = []
            for ask in (lambda: asker.write(some_ids(1, 5)), lambda: asker.embed([some_ids(2, 5)])):
                gone.append(ask())
                asker.request.cancel()
            kept = [asker.write(some_ids(3, 5)), asker.embed([some_ids(3, 5)])]
        for heard in kept:
            heard.wait()
        assert [heard.wait().events for heard in gone] == [[Done()], [Done()]]


def test_a_full_queue_says_so(shared_gem: GemModel) -> None:
    with running(shared_gem, max_queue_size=4) as asker:
        with asker.engine.paused():
            large = asker.embed([some_ids(i, 4) for i in range(9)])  # more than fits, but nothing else waits
            with pytest.raises(QueueFullError, match="waiting"):
                asker.embed([some_ids(1, 4)])
            with pytest.raises(QueueFullError):
                asker.write(some_ids(1, 4))
        assert large.vectors().shape == (9, 32)


def test_stopping_finishes_what_was_accepted(shared_gem: GemModel) -> None:
    engine = Engine(shared_gem, max_num_seqs=2)
    engine.start()
    heard = [Heard() for _ in range(6)]
    for at, listener in enumerate(heard):
        engine.generate(some_ids(at, 9), GREEDY, listener)
    assert engine.stop()
    assert [h.text() for h in heard] == [greedy(shared_gem, some_ids(at, 9), 12) for at in range(6)]
    with pytest.raises(EngineStoppingError):
        engine.embed([[10]], Heard())
    assert not engine.stats().alive


def test_stopping_in_time_tells_everybody(shared_gem: GemModel) -> None:
    engine = Engine(shared_gem, max_num_seqs=2)
    engine.start()
    heard = [Heard() for _ in range(4)]
    for at, listener in enumerate(heard):
        engine.generate(some_ids(at, 9), SamplingParams(max_tokens=900, logit_bias={77: 100.0}), listener)
    assert not engine.stop(timeout_s=0.05)
    for listener in heard:
        listener.wait()


def test_nobody_waits_for_a_bulk_request(shared_gem: GemModel) -> None:
    """Many texts at once: a single text and an answer that come later are done before them."""
    with running(shared_gem, max_num_batched_tokens=32) as asker:
        with asker.engine.paused():
            bulk = asker.embed([some_ids(i, 20) for i in range(600)])
            later = [asker.embed([some_ids(999, 7)]), asker.write(some_ids(1, 5), SamplingParams(max_tokens=5))]
            bulk_done: list[bool] = []
            for heard in later:
                heard.on_event = lambda event: bulk_done.append(bulk.closed.is_set())
        for heard in [*later, bulk]:
            heard.wait()
    assert bulk_done
    assert not any(bulk_done)


def test_a_model_whose_positions_adapt_takes_one_pass_at_a_time(shared_gem: GemModel, tmp_path: Path) -> None:
    assert not has_dynamic_rope(shared_gem.lm)
    config = AutoConfig.for_model(
        "llama", **tiny_models.COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    gem = GemModel.from_base(str(tmp_path))
    assert has_dynamic_rope(gem.lm)
    engine = Engine(gem)
    assert engine.generation_worker.lock is engine.embedding_worker.lock
    assert Engine(shared_gem).generation_worker.lock is not Engine(shared_gem).embedding_worker.lock


def test_a_listener_that_raises_harms_nobody_else(shared_gem: GemModel) -> None:
    def broken(event: object) -> None:
        raise OSError("gone")

    with running(shared_gem) as asker:
        asker.engine.generate(some_ids(1, 5), SamplingParams(max_tokens=500, logit_bias={77: 100.0}), broken)
        assert asker.write(some_ids(2, 5)).text() == greedy(shared_gem, some_ids(2, 5), 12)
        assert asker.engine.stats().num_running_seqs == 0


def test_an_error_in_a_pass_is_told_and_the_engine_goes_on(
    shared_gem: GemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(shared_gem) as asker:
        with asker.engine.paused():
            asked = [asker.write(some_ids(1, 5)), asker.embed([some_ids(2, 5)]), asker.recover(some_ids(2, 5))]
            body = shared_gem.lm.get_decoder()
            handle = body.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        for heard in asked:
            (failed,) = heard.wait().of(Failed)
            assert isinstance(failed.error, MemoryError)
        handle.remove()
        assert asker.write(some_ids(2, 5)).text() == greedy(shared_gem, some_ids(2, 5), 12)
        assert asker.engine.stats().failed_requests == 3


def test_little_memory_for_caches_means_fewer_at_a_time(shared_gem: GemModel) -> None:
    with running(shared_gem, kv_cache_bytes=1, max_num_batched_tokens=7) as asker:
        heard = [asker.write(some_ids(i, 20)) for i in range(4)]
        assert [h.text() for h in heard] == [greedy(shared_gem, some_ids(i, 20), 12) for i in range(4)]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda a: a.write([]), "no tokens"),
        (lambda a: a.write([5, 320]), "token id 320"),
        (lambda a: a.write([-1]), "token id -1"),
        (lambda a: a.write(some_ids(1, 1020)), "1020 tokens and the answer may have 12, this model takes 1024"),
        (lambda a: a.write([5], n=17), "n must lie in 1..16, got 17"),
        (lambda a: a.write([5], n=0), "n must lie"),
        (lambda a: a.write([5], SamplingParams(logit_bias={320: 1.0})), "logit_bias must name tokens 0..319, got 320"),
        (lambda a: a.embed([]), "no text"),
        (lambda a: a.embed([[5], [999]]), "text 1 has the token id 999"),
        (lambda a: a.embed([some_ids(1, 511)]), "511 tokens, this model embeds up to 510"),
        (lambda a: a.recover(some_ids(1, 511)), "511 tokens"),
    ],
)
def test_bad_requests_are_refused(shared_gem: GemModel, ask: Any, message: str) -> None:
    with running(shared_gem) as asker, pytest.raises(ValueError, match=message):
        ask(asker)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("inf")},
        {"top_logprobs": 21},
        {"stop": ("",)},
        {"logit_bias": {1: 101.0}},
    ],
)
def test_bad_sampling_params_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        SamplingParams(**params)
