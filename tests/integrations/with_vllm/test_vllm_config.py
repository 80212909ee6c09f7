"""vLLM's plugin without vLLM: what it makes of a GEM's directory, whom it refuses, and how light it is."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load_file

from gemify import GemModel
from gemify.integrations.vllm.config import EngineGem, engine_options
from gemify.integrations.vllm.embedder import Embedder, stack_vectors
from gemify.integrations.vllm.server import GemEndpoint, VectorSlots, parse_body, render_response, serve_arguments
from gemify.integrations.vllm.worker import MAX_KEPT_VECTORS, HiddenStateTap, embedding_key
from gemify.model.config import CONFIG_FILE
from tiny_gems import make_gem


def saved(base_dir: Path, directory: Path, **options: Any) -> GemModel:
    gem = make_gem(base_dir, **options)
    gem.save_pretrained(directory)
    return gem


def test_it_needs_neither_transformers_nor_peft() -> None:
    """vLLM's environment has an older transformers and no peft."""
    code = (
        "import sys, importlib\n"
        "for name in ('transformers', 'peft', 'tqdm', 'typer', 'vllm', 'accelerate'): sys.modules[name] = None\n"
        "for name in ('config', 'worker', 'plugin', 'embedder', 'offline', 'server'):\n"
        "    importlib.import_module(f'gemify.integrations.vllm.{name}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tune", ["gated", "tokens"])
def test_the_adapter_becomes_a_plain_lora_that_gives_the_trained_rows(
    tune: str, k: int, base_dir: Path, tmp_path: Path
) -> None:
    settings = {"adapter": {"rank": 8, "lora_alpha": 24.0}} if tune == "gated" else {}
    gem = saved(base_dir, tmp_path / "gem", tune=tune, special_tokens=k, **settings)
    assert gem.adapter is not None
    found = EngineGem.of(tmp_path / "gem")
    assert found.base == str(base_dir)
    table = gem.lm.get_input_embeddings().weight.detach()
    out = tmp_path / "lora"
    out.mkdir()
    found.write_lora(out, rows_KD=table[gem.special_ids], vocabulary=table.shape[0])
    config, state = json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")
    assert config["r"] == 8
    assert not config.get("alora_invocation_tokens")
    a_RV, b_DR = (state.pop(f"base_model.model.model.embed_tokens.lora_embedding_{x}") for x in "AB")
    delta_VD = (b_DR @ a_RV).T * config["lora_alpha"] / config["r"]
    rows = table + delta_VD
    torch.testing.assert_close(rows[gem.special_ids], gem.adapter.rows.rows_KD.detach())
    others = [i for i in range(table.shape[0]) if i not in gem.special_ids]
    assert torch.equal(rows[others], table[others])
    learned = {n: t for n, t in gem.adapter.state().items() if ".lora_" in n}
    assert state.keys() == learned.keys()
    assert all(torch.equal(state[name], learned[name]) for name in learned)
    assert "embed_tokens" in found.targets
    assert ("q_proj" in found.targets) == (tune == "gated")


def test_options_of_an_engine(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    saved(base_dir, tmp_path / "gem")
    options = engine_options(tmp_path / "gem", "elsewhere", max_model_len=99, additional_config={"other": 1})
    assert options["model"] == "elsewhere"
    assert options["max_model_len"] == 99
    assert (options["enable_lora"], options["max_loras"], options["max_lora_rank"]) == (True, 1, 16)
    assert options["additional_config"] == {"other": 1, "gemify": {"gem": str(tmp_path / "gem")}}
    shared = engine_options(tmp_path / "gem", enable_lora=True, max_loras=2, max_lora_rank=64)
    assert (shared["max_loras"], shared["max_lora_rank"]) == (3, 64)  # the user's own adapters, and this one
    assert "lora_target_modules" not in shared
    argv = serve_arguments(str(tmp_path / "gem"), None, ["--port", "1"])
    assert argv[:2] == ["--model", str(base_dir)]
    assert argv[-2:] == ["--port", "1"]
    at = argv.index("--additional-config")
    assert json.loads(argv[at + 1])["gemify"]["gem"] == str(tmp_path / "gem")
    saved(base_dir, tmp_path / "whole", tune="full")
    whole = engine_options(tmp_path / "whole")
    assert whole["model"] == str(tmp_path / "whole")
    assert "enable_lora" not in whole


def test_those_it_cannot_run_are_refused_in_one_line(base_dir: Path, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        saved(base_dir, directory, **options)
        with pytest.raises(ValueError) as error:
            engine_options(directory)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "gemify export" in refused(tune="lora")
    assert "no special tokens" in refused(tune="full", special_tokens=0)
    assert "shared position" in refused(tune="gated", special_tokens=2, shared_position=False)
    assert "rank 2 and 3 special tokens" in refused(special_tokens=3, adapter={"rank": 2})


def test_prompts_are_the_librarys_columns(base_dir: Path, tmp_path: Path) -> None:
    gem = saved(base_dir, tmp_path / "gem", special_tokens=2, max_length=12, pooling="concat")
    embedder = Embedder(gem.config, gem.text_tokenizer, max_model_len=100, width=32)
    texts = ["ab", "", "a text that is cut", "<|reserved_0|>"]
    prompts = embedder.prompts(texts, "")
    rows = gem.text_tokenizer(texts, max_tokens=gem.config.max_text_tokens)
    assert prompts == [[*row, special] for row in rows for special in gem.special_ids]
    assert max(map(len, Embedder(gem.config, gem.text_tokenizer, 6, 32).prompts(texts, ""))) == 5
    vectors = embedder.vectors(torch.arange(12.0).view(4, 3), normalize=False, truncate_dim=None)
    assert vectors.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert embedder.dimensions == 64
    with pytest.raises(ValueError, match=r"1\.\.64"):
        embedder.require_dimensions(65)
    mean = dataclasses.replace(embedder, config=dataclasses.replace(gem.config, pooling="mean"))
    assert mean.vectors(torch.tensor([[3.0, 0.0], [3.0, 8.0]]), normalize=True, truncate_dim=None).tolist() == [
        pytest.approx([0.6, 0.8])
    ]


class Step(SimpleNamespace):
    """What vLLM's scheduler says of a step."""


def step(new: Sequence[tuple[str, int, int, str | None]], old: dict[str, int], scheduled: dict[str, int]) -> Step:
    return Step(
        finished_req_ids=set(),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                num_computed_tokens=done,
                prompt_token_ids=[0] * length,
                sampling_params=SimpleNamespace(extra_args={"gemify": key} if key else None),
            )
            for name, length, done, key in new
        ],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(old), num_computed_tokens=list(old.values())),
        num_scheduled_tokens=scheduled,
    )


def test_the_adapter_goes_to_the_last_token_of_a_prompt_that_ends() -> None:
    """A long prompt that is run in pieces is embedded in the step of its last one."""
    import numpy as np

    batch = SimpleNamespace(req_ids=["chat", "long", "short"], lora_id_to_lora_request={})
    batch.make_lora_inputs = lambda scheduled, sampled: ((0,) * 3, (0,) * int(scheduled.sum()), set())
    model = SimpleNamespace(compute_logits=lambda hidden: hidden.sum())
    runner = SimpleNamespace(input_batch=batch, get_model=lambda: model, execute_model=lambda step: "ran")
    tap = HiddenStateTap(runner, "adapter")
    first = step(
        [("chat", 9, 0, None), ("long", 9, 0, "L"), ("short", 4, 2, "S")], {}, {"chat": 4, "long": 5, "short": 2}
    )
    assert runner.execute_model(first) == "ran"
    _, tokens, _ = batch.make_lora_inputs(np.array([4, 5, 2]), np.array([1, 1, 1]))
    assert [at for at, adapter in enumerate(tokens) if adapter] == [10]
    assert list(batch.lora_id_to_lora_request.values()) == ["adapter"]
    model.compute_logits(torch.tensor([[1.0], [2.0], [3.0]]))
    assert {key: v.tolist() for key, v in tap.vectors.items()} == {"S": [3.0]}
    batch.req_ids = ["long", "chat"]
    runner.execute_model(step([], {"long": 5, "chat": 4}, {"long": 4, "chat": 5}))
    _, tokens, _ = batch.make_lora_inputs(np.array([4, 5]), np.array([1, 1]))
    assert [at for at, adapter in enumerate(tokens) if adapter] == [3]
    model.compute_logits(torch.tensor([[7.0], [8.0]]))
    assert tap.vectors["L"].tolist() == [7.0]
    runner.execute_model(step([], {"chat": 9}, {"chat": 1}))
    _, tokens, adapters = batch.make_lora_inputs(np.array([1]), np.array([1]))
    assert (set(tokens), adapters, batch.lora_id_to_lora_request) == ({0}, set(), {})


def test_marks_are_strings() -> None:
    assert embedding_key(SimpleNamespace(extra_args={"gemify": "key"})) == "key"
    assert embedding_key(SimpleNamespace(extra_args={"gemify": ["key"]})) is None
    assert embedding_key(SimpleNamespace(extra_args=None)) is None
    assert embedding_key(None) is None


def test_rows_come_from_whichever_worker_has_them() -> None:
    a, b = (torch.tensor([x, x + 1.0]) for x in (1.0, 5.0))
    workers = [{}, {"b": b.numpy().tobytes()}, {"a": a.numpy().tobytes()}]
    assert torch.equal(stack_vectors(workers, ["a", "b"]), torch.stack([a, b]))
    with pytest.raises(RuntimeError, match="no vector for 1 of 2"):
        stack_vectors(workers, ["a", "c"])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"input": "\\ud800"}', "lone surrogate"),
        (b'{"input": ["a", "\\ud83d\\ude00", "b\\udfff"]}', "lone surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b'{"input": "\xff"}', "not JSON"),
    ],
)
def test_bodies_that_no_tokenizer_takes_are_refused(body: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        parse_body(body, ["tiny"])
    assert "\n" not in str(refused.value)
    assert parse_body(b'{"input": "\\ud83d\\ude00"}', ["tiny"])["input"] == ["\U0001f600"]


class Engine:
    """As vLLM's with the plugin: it keeps vectors until they are taken, and so many of them."""

    def __init__(self) -> None:
        self.vectors: OrderedDict[str, bytes] = OrderedDict()
        self.most = 0

    async def generate(self, asked: dict[str, list[int]], sampling: SimpleNamespace, name: str) -> AsyncIterator[int]:
        await asyncio.sleep(0)
        self.vectors[sampling.extra_args["gemify"]] = (
            torch.tensor(asked["prompt_token_ids"][-2:]).float().numpy().tobytes()
        )
        self.most = max(self.most, len(self.vectors))
        while len(self.vectors) > MAX_KEPT_VECTORS:
            self.vectors.popitem(last=False)
        yield 0

    async def collective_rpc(self, name: str, args: tuple[list[str]]) -> list[dict[str, bytes]]:
        await asyncio.sleep(0)
        return [{key: self.vectors.pop(key) for key in args[0] if key in self.vectors}]


async def test_requests_together_are_no_more_than_the_engine_keeps(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 1,024 texts, at 4 special tokens a text, and a small one that does not wait for their end."""
    words = {"vllm": SimpleNamespace(SamplingParams=SimpleNamespace), "vllm.inputs": SimpleNamespace(TokensPrompt=dict)}
    for name, module in words.items():
        monkeypatch.setitem(sys.modules, name, module)
    gem = saved(base_dir, tmp_path / "gem", special_tokens=4, pooling="concat")
    engine, app = Engine(), FastAPI()
    app.state.gemify = Embedder(gem.config, gem.text_tokenizer, max_model_len=100, width=2)
    app.state.gemify_engine, app.state.gemify_names = engine, ["tiny"]
    app.state.gemify_slots = VectorSlots(2048)
    GemEndpoint().attach_router(app)
    texts = [chr(97 + n % 26) for n in range(1024)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        asked = [client.post("/v1/embeddings", json={"input": some}) for some in (texts, texts[1:], texts[2:], "x")]
        replies = await asyncio.gather(*asked)
        refused = await client.post("/v1/embeddings", content=b'{"input": "\\ud800"}')
    assert (refused.status_code, "lone surrogate" in refused.json()["error"]["message"]) == (400, True)
    for some, reply in zip((texts, texts[1:], texts[2:], ["x"]), replies, strict=True):
        ids = gem.text_tokenizer(some, max_tokens=9)
        wanted = [[token for special in gem.special_ids for token in (row[-1], special)] for row in ids]
        found = torch.tensor([row["embedding"] for row in reply.json()["data"]])
        torch.testing.assert_close(found, torch.nn.functional.normalize(torch.tensor(wanted).float(), dim=-1))
    assert 1024 < engine.most <= 2048, "several requests at once, and never too many vectors"
    assert not engine.vectors


def test_the_routes_words() -> None:
    assert parse_body(b'{"input": "x"}', ["tiny"]) == {"input": ["x"], "encoding_format": "float", "dimensions": None}
    for body in (b"[]", b"{", b'{"input": 3}', b'{"input": "x", "model": "y"}', b"\xff"):
        with pytest.raises(ValueError):
            parse_body(body, ["tiny"])
    answer = render_response(torch.tensor([[1.0, 2.0]]), {"encoding_format": "float"}, "tiny", 7)
    assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": [1.0, 2.0]}]
    assert answer["usage"]["total_tokens"] == 7


def test_vllm_finds_the_plugin_by_these_names() -> None:
    found = {e.group: e.load() for e in importlib.metadata.distribution("gemify").entry_points if "vllm" in e.group}
    if not found:
        pytest.skip("gemify was installed before it had the plugin: install it again")
    assert found["vllm.endpoint_plugins"] is GemEndpoint
    assert found["vllm.general_plugins"].__name__ == "register"


def test_configurations_are_read_as_the_library_reads_them(base_dir: Path, tmp_path: Path) -> None:
    gem = saved(base_dir, tmp_path / "gem", template='Say "{text}":')
    assert EngineGem.of(tmp_path / "gem").config == gem.config
    (tmp_path / "gem" / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match="it is no GEM"):
        EngineGem.of(tmp_path / "gem")
