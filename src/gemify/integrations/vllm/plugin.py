"""gemify's entry in ``vllm.general_plugins``: vLLM calls `register` in each of its processes.

It makes two changes. An engine without a GEM notices neither.

- The KV-cache block that holds the special token of a text being embedded has a name of its own in the prefix cache.
  The adapter acts on that token, so no chat may use the block, even if it spells the same text and then the special
  token. The blocks before it keep their names: chat and embedding share them.
- The embedding table of every model accepts an adapter. vLLM has the layer for it, but uses it for some models only.
"""

from __future__ import annotations

from typing import Any

from gemify.integrations.vllm.config import MARK
from gemify.integrations.vllm.worker import embedding_key


def register() -> None:
    """Make the two changes, once per process."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    if not getattr(kv_cache_utils.generate_block_hash_extra_keys, MARK, False):
        _name_special_blocks()
        _adapt_tables(LoRAModelRunnerMixin)


def _name_special_blocks() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils

    plain = kv_cache_utils.generate_block_hash_extra_keys

    def named(request: Any, start: int, end: int, at: int) -> tuple[tuple[Any, ...] | None, int]:
        keys, at = plain(request, start, end, at)
        if embedding_key(request.sampling_params) and end >= request.num_prompt_tokens:
            keys = (*(keys or ()), (MARK, "special"))
        return keys, at

    setattr(named, MARK, True)
    kv_cache_utils.generate_block_hash_extra_keys = named
    block_pool.generate_block_hash_extra_keys = named


def _adapt_tables(runner: Any) -> None:
    plain = runner.load_lora_model

    def load_lora_model(self: Any, model: Any, vllm_config: Any, *args: Any) -> Any:
        if MARK in (vllm_config.additional_config or {}):
            model.embedding_modules = {"embed_tokens": "input_embeddings", **model.embedding_modules}
        return plain(self, model, vllm_config, *args)

    runner.load_lora_model = load_lora_model
