"""Streaming: the pieces are the text, stop strings, threads, errors, and an end when nobody reads on."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_models
from gemify import GemModel
from gemify.model.streaming import stream, stream_chat
from tiny_gems import make_gem

pytestmark = pytest.mark.usefixtures("one_thread")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared_gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir)


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "gemify-stream"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in workers():
        thread.join(timeout=20)
    assert not workers()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(min_size=1, max_size=20), sample=st.booleans(), seed=st.integers(0, 999))
def test_pieces_join_to_what_generate_writes(shared_gem: GemModel, prompt: str, sample: bool, seed: int) -> None:
    """Random bytes, so broken and many-byte characters too."""
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": sample, "top_k": 0}
    torch.manual_seed(seed)
    expected = shared_gem.generate(prompt, **options)
    state = torch.get_rng_state()
    assert "".join(stream(shared_gem, prompt, seed=seed, **options)) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_a_handle_and_a_chat(shared_gem: GemModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    prefill = shared_gem.prefill("some text")
    streamed = stream(shared_gem, prefill, **options)
    assert "".join(streamed) == shared_gem.generate("some text", **options)
    assert (streamed.prompt_tokens, streamed.new_tokens) == (9, 12)
    assert streamed.finish_reason == "length"
    assert "".join(stream_chat(shared_gem, MESSAGES, **options)) == shared_gem.chat(MESSAGES, **options)
    vector = shared_gem.embed(prefill)
    assert torch.equal(vector, shared_gem.embed(shared_gem.prefill("some text")))


class Forced:
    """A stand-in for sampling: `generate` writes these tokens, whatever the model says."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.at = ids, -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[self.at]] = 0.0
        return forced


def write(gem: GemModel, text: str | list[int], **options: Any) -> Any:
    ids = gem.tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
    return stream(gem, "a", do_sample=False, max_new_tokens=len(ids), logits_processor=[Forced(ids)], **options)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, "one\n\ntwo END three"),
        ("END", "one\n\ntwo "),
        (["zzz", "two", "END"], "one\n\n"),
        (["\n\n"], "one"),
        (["o", "one"], ""),
        (["END of it"], "one\n\ntwo END three"),
        ([], "one\n\ntwo END three"),
    ],
)
def test_the_text_ends_before_a_stop_string(shared_gem: GemModel, stop: Any, expected: str) -> None:
    text = "one\n\ntwo END three"
    streamed = write(shared_gem, text, stop=stop)
    pieces = list(streamed)
    assert "".join(pieces) == expected
    assert all(pieces)
    if expected != text:
        assert streamed.finish_reason == "stop"
        stops = [stop] if isinstance(stop, str) else stop
        ends = min(text.find(s) + len(s) for s in stops if s in text)
        assert streamed.new_tokens == ends  # not one token more: a token is a byte here


def test_characters_come_whole_and_early(shared_gem: GemModel) -> None:
    pieces = list(write(shared_gem, "né 你好🙂 x"))
    assert pieces == ["n", "é", " ", "你", "好", "🙂", " ", "x"]


def test_an_end_token_is_counted_and_not_shown(shared_gem: GemModel) -> None:
    ids = shared_gem.tokenizer("ab", add_special_tokens=False)["input_ids"]
    streamed = write(shared_gem, [*ids, shared_gem.tokenizer.eos_token_id])
    assert list(streamed) == ["a", "b"]
    assert streamed.new_tokens == 3
    assert streamed.finish_reason == "stop"


def test_words_that_begin_with_their_space(tmp_path: Path) -> None:
    """SentencePiece-like tokenizers, whose decoder drops the first space of whatever it gets."""
    words = ["<unk>", "<s>", "</s>", "\n", "▁", "▁the", "▁cat", "▁sat", "s", "<0xE4>", "<0xBD>", "<0xA0>", "<|r|>"]
    core = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|r|>"]})
    tiny_models.build("llama").save_pretrained(tmp_path / "sp")
    tokenizer.save_pretrained(tmp_path / "sp")
    gem = GemModel.from_base(str(tmp_path / "sp"), special_tokens=["<|r|>"])
    ids = [5, 6, 3, 5, 8, 1, 6, 9, 10, 11, 3, 3, 7]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected == "the cat\n thes cat你\n\n sat"
    assert "".join(write(gem, ids)) == expected


def test_an_error_reaches_the_caller(shared_gem: GemModel) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        list(stream(shared_gem, "a", nonsense=1))
    assert "".join(stream(shared_gem, "a", max_new_tokens=3, do_sample=False))  # and the turn is free again


def test_the_callers_context_is_seen(shared_gem: GemModel) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    seen = []

    def look(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(variable.get())
        return scores

    variable.set("set by the caller")
    list(stream(shared_gem, "a", max_new_tokens=2, do_sample=False, logits_processor=[look]))
    assert set(seen) == {"set by the caller"}


@pytest.mark.parametrize("how", ["close", "drop"])
def test_generation_stops_when_nobody_reads_on(shared_gem: GemModel, how: str) -> None:
    steps, allowed = [], threading.Semaphore(3)

    def count(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed.acquire(timeout=20)
        steps.append(1)
        return scores

    streamed = stream(
        shared_gem, "a", max_new_tokens=500, min_new_tokens=500, do_sample=False, logits_processor=[count]
    )
    allowed.release()
    next(streamed)
    if how == "close":
        streamed.close()
    else:
        del streamed
        gc.collect()
    done = len(steps)
    allowed.release(500)
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not workers()
    assert len(steps) <= max(done, 4) + 1


def test_nothing_runs_before_the_first_piece(shared_gem: GemModel) -> None:
    streamed = stream(shared_gem, "a", max_new_tokens=500)
    assert not workers()
    streamed.close()
    assert list(streamed) == []


def test_a_reader_may_use_the_model_while_it_reads(shared_gem: GemModel) -> None:
    pieces = []
    for piece in stream(shared_gem, "a", max_new_tokens=20, do_sample=False):
        with shared_gem.lock:
            shared_gem.encode(piece)
        pieces.append(piece)
    assert "".join(pieces) == shared_gem.generate("a", max_new_tokens=20, do_sample=False)


def test_dropping_a_stream_that_waits_for_its_turn(shared_gem: GemModel) -> None:
    streamed = stream(shared_gem, "a", max_new_tokens=5)
    reader = threading.Thread(target=lambda: list(streamed), daemon=True)
    with shared_gem.lock:
        reader.start()
        while not workers():
            time.sleep(0.01)
        shared_gem.encode("the turn is taken, and taken again")
    reader.join(timeout=20)
    assert not reader.is_alive()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (["a", "b"], {}, "one prompt can be streamed, got a list"),
        ("a", {"num_beams": 2}, "num_beams=2"),
        ("a", {"num_return_sequences": 2}, "num_return_sequences=2"),
        ("a", {"stop": ["x", ""]}, "at least one character, got ''"),
    ],
)
def test_what_cannot_be_streamed(shared_gem: GemModel, prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(shared_gem, prompt, **options)
    with pytest.raises(ValueError, match="a prefill of 2"):
        stream(shared_gem, shared_gem.prefill(["a", "b"]))
