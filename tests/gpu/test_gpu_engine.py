"""The engine on a GPU: chats and vectors side by side against the library, one thing at a time."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import tiny_models
from engine_client import Heard, running
from gemify import GemModel
from gemify.engine.engine import Engine
from gemify.engine.requests import PrefillOutput, PromptStart
from gemify.engine.sampling import SamplingParams
from gemify.model.encode import encode_ids
from gemify.model.prefill import run_prefill
from gpu_device import DEVICE, KINDS, NEEDS_GPU, TEXTS
from tiny_gems import make_gem

pytestmark = NEEDS_GPU


def gem_of(directory: Path, name: str, kind: str, dtype: torch.dtype = torch.float32) -> GemModel:
    kernel = "eager" if name in tiny_models.EAGER_ONLY else "sdpa"
    base = tiny_models.save(directory / "base", name, attn_implementation=kernel)
    return make_gem(base, **KINDS[kind], attn_implementation=kernel, device=DEVICE, dtype=dtype)


def some_ids(seed: int, length: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(10, 260) for i in range(length)]


def greedy(gem: GemModel, ids: list[int], new: int) -> str:
    """transformers' own `generate`."""
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        suppress_tokens=list(gem.config.special_ids) or None,
    )
    with torch.no_grad():
        out = gem.lm.generate(torch.tensor([ids], device=DEVICE), generation_config=config)
    return gem.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def one_vector(gem: GemModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return encode_ids(gem.lm, gem.config, [ids])[0].cpu().numpy()


def one_recovery(gem: GemModel, ids: list[int], new: int) -> str:
    ids_1T = torch.tensor([ids], device=DEVICE)
    return str(
        gem.recover(run_prefill(gem.lm, ids_1T, torch.ones_like(ids_1T).bool(), single=True), max_new_tokens=new)
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral-window", "gpt2", "gemma2"])
def test_rows_that_come_and_go_write_what_generate_writes(tmp_path: Path, name: str) -> None:
    gem = gem_of(tmp_path, name, "gated-2")
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
    np.testing.assert_allclose(vectors, np.stack([one_vector(gem, ids) for ids in texts]), atol=1e-4)
    assert remembered == [one_recovery(gem, texts[i + 1], 6) for i in range(3)]


@pytest.mark.parametrize("kind", ["embedding-lora-mean", "embedding-lora-token-causal"])
def test_chats_and_an_embedding_pass_of_its_own_in_turn(tmp_path: Path, kind: str) -> None:
    gem = gem_of(tmp_path, "llama", kind)
    ids = gem.tokenizer("the cat sat")["input_ids"]
    expected, text = gem.encode(TEXTS), gem.generate("the cat sat", max_new_tokens=24, do_sample=False)
    rows = gem.text_tokenizer(TEXTS, max_tokens=gem.config.max_text_tokens)
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    with running(gem) as asker:
        for _ in range(4):
            chats = [asker.write(ids, sampling) for _ in range(3)]
            vectors = asker.embed(rows)
            assert [chat.text() for chat in chats] == [text] * 3
            np.testing.assert_allclose(vectors.vectors(), expected, atol=1e-4)


def test_a_prompt_goes_on_from_what_has_run(tmp_path: Path) -> None:
    gem = gem_of(tmp_path, "llama", "gated")
    first, rest = some_ids(1, 30), some_ids(2, 9)
    with running(gem, max_num_batched_tokens=8) as asker:
        heard = Heard()
        asker.engine.prefill(first, heard, embed_from=4)
        (output,) = heard.wait().of(PrefillOutput)
        ids_1T = torch.tensor([first], device=DEVICE)
        handle = run_prefill(gem.lm, ids_1T, torch.ones_like(ids_1T).bool(), single=True)
        np.testing.assert_allclose(heard.vectors()[0], gem.embed(handle, start=4), atol=1e-4)
        both = asker.write(first + rest, start=PromptStart(output.text, cached_tokens=3, is_exact=True), n=2)
        assert [both.text(0), both.text(1)] == [greedy(gem, first + rest, 12)] * 2
        again = asker.write(first + rest, embed_prompt=True)  # from the prefix cache
        assert again.text() == both.text()
        np.testing.assert_allclose(again.vectors()[0], one_vector(gem, first + rest), atol=1e-4)
        assert asker.request.cached_tokens


def test_parameters_of_sampling(tmp_path: Path) -> None:
    gem = gem_of(tmp_path, "llama", "gated")
    ids = some_ids(6, 9)
    drawn = SamplingParams(max_tokens=10, temperature=1.2, top_k=50, top_p=0.9, min_p=0.01, seed=7)
    changed = SamplingParams(
        max_tokens=10, temperature=0.0, presence_penalty=1.0, repetition_penalty=1.1, logit_bias={77: 3.0}, min_tokens=3
    )
    with running(gem) as asker:
        first, again = asker.write(ids, drawn, n=3), asker.write(ids, drawn, n=3)
        assert [first.text(i) for i in range(3)] == [again.text(i) for i in range(3)]
        assert asker.write(ids, changed).text() == asker.write(ids, changed).text()
        scored = SamplingParams(max_tokens=4, temperature=0.0, top_logprobs=3, prompt_logprobs=2)
        tokens = asker.write(ids, scored).tokens()
    with torch.no_grad():
        logits = gem.lm(torch.tensor([ids], device=DEVICE)).logits[0, -1].cpu()
    logits[list(gem.special_ids)] = -torch.inf
    best = torch.log_softmax(logits, -1).topk(3)
    assert [t.id for t in tokens[0].top] == best.indices.tolist()
    assert [t.logprob for t in tokens[0].top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_bfloat16_runs_to_its_end(tmp_path: Path) -> None:
    gem = gem_of(tmp_path, "llama", "gated", torch.bfloat16)
    with running(gem, max_num_seqs=8) as asker:
        chats = [asker.write(some_ids(i, 3 + i), SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(12)]
        vectors = asker.embed([some_ids(i, 1 + i) for i in range(20)]).vectors()
        assert [chat.finished()[0].completion_tokens for chat in chats] == [20] * 12
    expected = np.stack([one_vector(gem, some_ids(i, 1 + i)) for i in range(20)])
    assert (
        (vectors * expected).sum(1) > 0.99 * np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    ).all()


def test_an_accelerator_gets_larger_batches(tmp_path: Path) -> None:
    engine = Engine(gem_of(tmp_path, "llama", "gated"))
    scheduler = engine.embedding_worker.scheduler
    assert scheduler._max_num_batched_tokens == (512 if DEVICE == "cpu" else 8192)
