"""Which vectors and caches a model gives: the names by which stores of them know the model that wrote them."""

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
    """A short hash of the weights: of every tensor its name, shape and up to 1,024 evenly spaced values in bfloat16.

    Loading the same file in another precision keeps it; other weights, or another quantisation of them, change it.
    """
    digest = hashlib.sha256()
    for name, p in sorted(lm.named_parameters()):
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024]
        digest.update(f"{name} {tuple(p.shape)} ".encode())
        digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def embedding_fingerprint(lm: PreTrainedModel, config: GemConfig, adapter: Adapter | None) -> str:
    """A short hash of the base's fingerprint, the adapter, and every setting that shapes a vector.

    Weights count in bfloat16: loading the same GEM in another precision keeps it. Without an adapter (``full``) the
    weights themselves are hashed.
    """
    settings = [
        config.base_fingerprint if adapter is not None else weights_fingerprint(lm),
        list(config.special_ids),
        config.pooling,
        config.shared_position,
        config.max_length,
        dict(sorted(config.prompts.items())),
        config.default_prompt_name,
        *([config.template] if config.template != PLAIN else []),  # without one the name is what it always was
        *([config.layer] if config.layer is not None else []),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(adapter.state().items()) if adapter is not None else ():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.to(torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_fingerprint(lm: PreTrainedModel, config: GemConfig, adapter: Adapter | None) -> str:
    """A short name for the KV caches a model computes: other than vectors, they depend on its precision to the bit.

    The weights are the loaded ones, which ``base=`` may have made others than the GEM was trained on.
    """
    settings = [embedding_fingerprint(lm, config, adapter), weights_fingerprint(lm), str(lm.dtype)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
