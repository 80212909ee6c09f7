"""Texts to an engine's prompts, and its hidden states to vectors: shared by every way to reach a vLLM engine."""

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
from gemify.model.config import GemConfig, pool, require_finite
from gemify.model.tokenization import TextTokenizer


@dataclass(frozen=True)
class Embedder:
    """Prompts and vectors for one engine."""

    config: GemConfig
    texts: TextTokenizer
    """The GEM's text tokenizer."""
    max_model_len: int
    """Most tokens of a prompt that the engine takes."""
    width: int
    """Width of its hidden states."""

    @staticmethod
    def of(vllm_config: Any, tokenizer: Any) -> Embedder:
        """Make one for an engine that `engine_options` configured."""
        if not any(e.name == "gemify" for e in importlib.metadata.entry_points(group="vllm.general_plugins")):
            raise RuntimeError(
                "vLLM does not find gemify's plugin: install gemify into vLLM's environment,"
                " `pip install --no-deps gemify`"
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

    def prompts(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
        """Build the engine's prompts: each text with each special token, k prompts per text.

        Args:
            texts: The texts.
            prompt: What stands before every text.

        Returns:
            Token ids of each prompt.
        """
        # Besides the text: the special token, and the one token that vLLM must generate.
        max_tokens = min(self.config.max_text_tokens, self.max_model_len - 2)
        rows = self.texts([prompt + text for text in texts], max_tokens=max_tokens)
        return [[*row, special] for row in rows for special in self.config.special_ids]

    @staticmethod
    def requests(prompts: Sequence[Sequence[int]]) -> tuple[list[str], list[Any], list[Any]]:
        """Return for each prompt its key, vLLM's prompt object and its sampling parameters."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        keys = [uuid.uuid4().hex for _ in prompts]
        return (
            keys,
            [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
            [SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args={MARK: key}) for key in keys],
        )

    def vectors(self, rows_ND: Tensor, *, normalize: bool, truncate_dim: int | None) -> Tensor:
        """Pool the engine's hidden states [N * k, D] to vectors [N, D] or [N, k * D]."""
        whole = require_finite(pool(rows_ND.view(-1, self.config.k, rows_ND.shape[-1]), self.config.pooling))
        pooled = whole[:, :truncate_dim]
        return F.normalize(pooled, dim=-1) if normalize else pooled


def stack_vectors(vectors: Sequence[Mapping[str, bytes]], keys: Sequence[str]) -> Tensor:
    """Stack the results of ``gemify_take`` on all workers to [len(keys), D]. RuntimeError if a vector is missing."""
    found: dict[str, bytes] = {}
    for worker in vectors:
        found |= worker
    if missing := [key for key in keys if key not in found]:
        raise RuntimeError(f"the engine gave no vector for {len(missing)} of {len(keys)} texts: start it again")
    return torch.stack([torch.frombuffer(bytearray(found[key]), dtype=torch.float32) for key in keys])
