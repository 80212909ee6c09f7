"""Texts to an engine's prompts, and its rows to vectors: what is the same for every way to reach a vLLM engine."""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemify.integrations.vllm.config import MARK
from gemify.model.config import GemConfig
from gemify.model.pooling import pool
from gemify.model.tokenization import TextTokenizer


@dataclass(frozen=True)
class Embedder:
    """For one engine: its GEM's configuration and tokenizer."""

    config: GemConfig
    texts: TextTokenizer
    longest: int
    """Most tokens of a prompt that the engine takes."""
    width: int
    """Of its hidden states."""

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
        model = vllm_config.model_config
        return Embedder(config, texts, int(model.max_model_len), int(model.get_hidden_size()))

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return self.width * (self.config.k if self.config.pooling == "concat" else 1)

    def require_dimensions(self, wanted: int | None) -> None:
        """Refuse to cut vectors to a length they do not have."""
        if wanted is not None and not 1 <= wanted <= self.dimensions:
            raise ValueError(f"dimensions must lie in 1..{self.dimensions}, got {wanted}")

    def prompts(self, texts: Sequence[str], before: str) -> list[list[int]]:
        """Token ids for the engine: each text with each special token, which see the text and not each other."""
        room = min(
            self.config.max_text_tokens, self.longest - 2
        )  # the special token, and the one token vLLM must generate
        rows = self.texts([before + text for text in texts], max_tokens=room)
        return [[*row, special] for row in rows for special in self.config.special_ids]

    @staticmethod
    def requests(prompts: Sequence[Sequence[int]]) -> tuple[list[str], list[Any], list[Any]]:
        """Of each prompt its key, what the engine calls a prompt, and its sampling parameters."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        keys = [uuid.uuid4().hex for _ in prompts]
        return (
            keys,
            [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
            [SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args={MARK: key}) for key in keys],
        )

    def vectors(self, rows_ND: Tensor, *, normalize: bool, truncate_dim: int | None) -> Tensor:
        """[N * k, D] -> [N, D or k * D]."""
        pooled = pool(rows_ND.view(-1, self.config.k, rows_ND.shape[-1]), self.config.pooling)[:, :truncate_dim]
        return F.normalize(pooled, dim=-1) if normalize else pooled


def rows_of(vectors: Sequence[Mapping[str, bytes]], keys: Sequence[str]) -> Tensor:
    """The vectors [len(keys), D] that a call of ``gemify_take`` on all workers gave; a worker may have none."""
    found: dict[str, bytes] = {}
    for worker in vectors:
        found |= worker
    if missing := [key for key in keys if key not in found]:
        raise RuntimeError(f"the engine gave no vector for {len(missing)} of {len(keys)} texts: start it again")
    return torch.stack([torch.frombuffer(bytearray(found[key]), dtype=torch.float32) for key in keys])
