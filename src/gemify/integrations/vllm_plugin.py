"""gemify's entry in ``vllm.general_plugins``: vLLM calls `register` in each of its processes.

It makes one change: the block of the KV cache that holds the special token of a text being embedded has a name of its own in
the prefix cache. The adapter acts on that token, so that no chat may take the block for one of its own, should it spell the
same text and then the special token. The blocks before it keep their names: chat and embedding share them.
"""

from __future__ import annotations

from typing import Any

from gemify.integrations.vllm_gem import MARK
from gemify.integrations.vllm_worker import marked


def register() -> None:
    """Do it once, however often vLLM calls."""
    from vllm.v1.core import block_pool, kv_cache_utils

    plain = kv_cache_utils.generate_block_hash_extra_keys
    if getattr(plain, "gemify", False):
        return

    def named(request: Any, start: int, end: int, at: int) -> tuple[tuple[Any, ...] | None, int]:
        keys, at = plain(request, start, end, at)
        if marked(request.sampling_params) and end >= request.num_prompt_tokens:
            keys = (*(keys or ()), (MARK, "special"))
        return keys, at

    named.gemify = True  # type: ignore[attr-defined]
    kv_cache_utils.generate_block_hash_extra_keys = named
    block_pool.generate_block_hash_extra_keys = named
