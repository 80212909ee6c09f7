"""Embed with a ``vllm.LLM`` that also generates: one engine, one copy of the weights.

    from vllm import LLM
    from gemify.integrations.vllm_offline import embed, engine_options

    llm = LLM(**engine_options("my-gem"))
    llm.chat([{"role": "user", "content": "Name a colour."}])
    vectors = embed(llm, ["a cat on a mat"])
"""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemify.integrations.vllm_gem import MARK, engine_options, rows_of
from gemify.model.config import GemConfig
from gemify.model.pooling import pool
from gemify.model.texts import TextTokenizer

__all__ = ["Embedder", "embed", "engine_options"]

_AT_A_TIME = 1024  # requests, whose vectors the engine keeps until all are done


@dataclass(frozen=True)
class Embedder:
    """Texts to prompts, and the engine's rows to vectors: what is the same for every way to reach an engine."""

    config: GemConfig
    texts: TextTokenizer
    longest: int
    """Most tokens of a prompt that the engine takes."""

    @staticmethod
    def of(vllm_config: Any, tokenizer: Any) -> Embedder:
        """For an engine that `engine_options` configured."""
        if not any(e.name == "gemify" for e in importlib.metadata.entry_points(group="vllm.general_plugins")):
            raise RuntimeError(
                "vLLM does not find gemify's plugin: install gemify into vLLM's environment, `pip install --no-deps gemify`"
            )
        own = (vllm_config.additional_config or {}).get(MARK)
        if own is None:
            raise ValueError("this engine knows of no GEM: make it with LLM(**engine_options(GEM))")
        config = GemConfig.from_directory(Path(own["gem"]))
        plain = getattr(tokenizer, "tokenizer", tokenizer)
        texts = TextTokenizer(plain, frozenset(config.special_ids), config.template)
        return Embedder(config, texts, int(vllm_config.model_config.max_model_len))

    def prompts(self, texts: Sequence[str], before: str) -> list[list[int]]:
        """Token ids for the engine: each text with each special token, which see the text and not each other."""
        room = min(self.config.room, self.longest - 2)  # the special token, and the one token vLLM must generate
        rows = self.texts([before + text for text in texts], max_tokens=room)
        return [[*row, special] for row in rows for special in self.config.special_ids]

    def vectors(self, rows_ND: Tensor, *, normalize: bool, truncate_dim: int | None) -> Tensor:
        """[N * k, D] -> [N, D or k * D]."""
        pooled = pool(rows_ND.view(-1, self.config.k, rows_ND.shape[-1]), self.config.pooling)[:, :truncate_dim]
        return F.normalize(pooled, dim=-1) if normalize else pooled


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
    from vllm import SamplingParams

    embedder = Embedder.of(llm.llm_engine.vllm_config, llm.get_tokenizer())
    llm.collective_rpc("gemify_open")
    listed = [texts] if isinstance(texts, str) else list(texts)
    prompts = embedder.prompts(listed, embedder.config.chosen_prompt(prompt_name, prompt))
    rows: list[Tensor] = []
    for first in range(0, len(prompts), _AT_A_TIME):
        some = prompts[first : first + _AT_A_TIME]
        keys = [uuid.uuid4().hex for _ in some]
        llm.generate(
            [{"prompt_token_ids": ids} for ids in some],
            [SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args={MARK: key}) for key in keys],
            use_tqdm=use_tqdm,
        )
        rows.append(rows_of(llm.collective_rpc("gemify_take", args=(keys,)), keys))
    width = int(llm.llm_engine.vllm_config.model_config.get_hidden_size())
    rows_ND = torch.cat(rows) if rows else torch.empty(0, width)
    vectors = embedder.vectors(rows_ND, normalize=normalize_embeddings, truncate_dim=truncate_dim)
    return vectors[0] if isinstance(texts, str) else vectors
