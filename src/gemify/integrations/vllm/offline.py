"""Embed with a ``vllm.LLM`` that also generates: one engine, one copy of the weights.

from vllm import LLM
from gemify.integrations.vllm.offline import embed, engine_options

llm = LLM(**engine_options("my-gem"))
llm.chat([{"role": "user", "content": "Name a colour."}])
vectors = embed(llm, ["a cat on a mat"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemify.integrations.vllm.config import engine_options as engine_options
from gemify.integrations.vllm.embedder import Embedder, rows_of

_AT_A_TIME = 1024  # requests, whose vectors the engine keeps until all are done


def embed(
    llm: Any,
    texts: str | Sequence[str],
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    use_tqdm: bool = False,
) -> Tensor:
    """Vectors [N, D] of texts ([D] of one string), float32 on the CPU, as `GemModel.encode` gives them.

    A text whose beginning a chat, or another text, has run already is not run again as far as whole blocks go: that is
    vLLM's prefix cache. Texts are cut to the GEM's max_length, and to the engine's max_model_len.
    """
    embedder = Embedder.of(llm.llm_engine.vllm_config, llm.get_tokenizer())
    embedder.require_dimensions(truncate_dim)
    llm.collective_rpc("gemify_open")
    listed = [texts] if isinstance(texts, str) else list(texts)
    prompts = embedder.prompts(listed, embedder.config.resolve_prompt(prompt_name, prompt))
    rows: list[Tensor] = []
    for first in range(0, len(prompts), _AT_A_TIME):
        some = prompts[first : first + _AT_A_TIME]
        keys, asked, sampling = embedder.requests(some)
        llm.generate(asked, sampling, use_tqdm=use_tqdm)
        rows.append(rows_of(llm.collective_rpc("gemify_take", args=(keys,)), keys))
    rows_ND = torch.cat(rows) if rows else torch.empty(0, embedder.width)
    vectors = embedder.vectors(rows_ND, normalize=normalize_embeddings, truncate_dim=truncate_dim)
    return vectors[0] if isinstance(texts, str) else vectors
