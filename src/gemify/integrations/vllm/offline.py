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
from gemify.integrations.vllm.embedder import Embedder, stack_vectors

_MAX_PROMPTS = 1024  # at a time: the engine keeps their vectors until all are done


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
    """Embed texts as `GemModel.encode` does.

    What a chat or another text has run already of a text's beginning does not run again, as far as whole blocks go:
    that is vLLM's prefix cache. Texts are cut to the GEM's max_length and to the engine's max_model_len.

    Args:
        llm: A ``vllm.LLM`` made with `engine_options`.
        texts: One text, or several.
        prompt_name: Name of a prompt of the GEM to put before every text.
        prompt: The prompt itself.
        normalize_embeddings: Scale vectors to length 1.
        truncate_dim: Keep only the first dimensions.
        use_tqdm: Show vLLM's progress bar.

    Returns:
        float32 vectors on the CPU: [D] for one text, [N, D] for N texts.
    """
    embedder = Embedder.of(llm.llm_engine.vllm_config, llm.get_tokenizer())
    embedder.require_dimensions(truncate_dim)
    llm.collective_rpc("gemify_open")
    listed = [texts] if isinstance(texts, str) else list(texts)
    prompts = embedder.prompts(listed, embedder.config.resolve_prompt(prompt_name, prompt))
    rows: list[Tensor] = []
    for first in range(0, len(prompts), _MAX_PROMPTS):
        some = prompts[first : first + _MAX_PROMPTS]
        keys, asked, sampling = embedder.requests(some)
        llm.generate(asked, sampling, use_tqdm=use_tqdm)
        rows.append(stack_vectors(llm.collective_rpc("gemify_take", args=(keys,)), keys))
    rows_ND = torch.cat(rows) if rows else torch.empty(0, embedder.width)
    vectors = embedder.vectors(rows_ND, normalize=normalize_embeddings, truncate_dim=truncate_dim)
    return vectors[0] if isinstance(texts, str) else vectors
