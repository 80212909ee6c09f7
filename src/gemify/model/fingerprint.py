"""Fingerprints: short hashes of weights and settings, by which stores recognise the model that wrote them."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

from gemify.model.adapter import Adapter
from gemify.model.config import GemConfig
from gemify.model.tokenization import PLAIN


@torch.no_grad()
def weights_fingerprint(lm: PreTrainedModel) -> str:
    """Return a short hash of a model's weights.

    It covers every tensor's name, shape and up to 1,024 evenly spaced values in bfloat16. Loading the same file in
    another precision keeps it. Other weights, or another quantisation of them, change it.
    """
    digest = hashlib.sha256()
    for name, p in sorted(lm.named_parameters()):
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024]
        digest.update(f"{name} {tuple(p.shape)} ".encode())
        digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def embedding_fingerprint(lm: PreTrainedModel, config: GemConfig, adapter: Adapter | None) -> str:
    """Return a short hash of everything that shapes a vector: base, adapter and settings.

    Weights count in bfloat16, so that loading the same GEM in another precision keeps it. Without an adapter (``full``)
    the weights themselves are hashed.
    """
    settings = [
        config.base_fingerprint if adapter is not None else weights_fingerprint(lm),
        list(config.special_ids),
        config.pooling,
        config.shared_position,
        config.max_length,
        dict(sorted(config.prompts.items())),
        config.default_prompt_name,
        *([config.template] if config.template != PLAIN else []),  # absent by default: older fingerprints stay equal
        *([config.layer] if config.layer is not None else []),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(adapter.state().items()) if adapter is not None else ():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.to(torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_fingerprint(lm: PreTrainedModel, config: GemConfig, adapter: Adapter | None) -> str:
    """Return a short hash of everything that shapes a KV cache, the model's precision included.

    It covers the loaded weights, which can differ from those the GEM was trained on (``from_pretrained(base=...)``).
    """
    settings = [embedding_fingerprint(lm, config, adapter), weights_fingerprint(lm), str(lm.dtype)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
