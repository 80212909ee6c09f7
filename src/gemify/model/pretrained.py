"""A GEM's parts: made from a base model, loaded from a directory, saved to one.

Fingerprints are short hashes of weights and settings, by which stores recognise the model that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemify.io.atomic import atomic_directory
from gemify.io.tables import first_line
from gemify.model.adapter import (
    ADAPTER_FILE,
    Adapter,
    AdapterSettings,
    attach_adapter,
    read_adapter_settings,
)
from gemify.model.attention import require_kernel, require_maskable
from gemify.model.base import (
    Loading,
    choose_special_tokens,
    grow_table,
    hide_progress_bars,
    initial_rows,
    load_base,
    max_positions,
    pop_quantization,
    special_token_ids,
)
from gemify.model.config import (
    CONFIG_FILE,
    Attention,
    GemConfig,
    Pooling,
    Tune,
    require_attention,
    require_special_tokens,
    resolve_directory,
)
from gemify.model.projection import Projection
from gemify.model.quantization import quantize_layers, require_unquantized
from gemify.model.sentence_transformers_files import write_sentence_transformers_files
from gemify.model.tokenization import PLAIN, require_template

logger = logging.getLogger(__name__)


class GemParts(NamedTuple):
    """What a `gemify.model.gem.GemModel` is made of."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GemConfig
    adapter: Adapter | None
    projection: Projection | None = None


def prepare_base(
    base: str,
    *,
    tune: Tune,
    special_tokens: int | Sequence[str],
    pooling: Pooling,
    shared_position: bool,
    max_length: int,
    prompts: Mapping[str, str],
    template: str,
    layer: int | None,
    attention: Attention,
    adapter: AdapterSettings,
    **loading: Unpack[Loading],
) -> GemParts:
    """Load a base model, choose its special tokens and attach untrained weights: see `GemModel.from_base`."""
    names_given = None if isinstance(special_tokens, int) else list(special_tokens)
    k = special_tokens if isinstance(special_tokens, int) else len(special_tokens)
    require_special_tokens(k, tune=tune, pooling=pooling)
    require_template(template, k=k)
    require_attention(attention, tune=tune)
    require_kernel(loading.get("attn_implementation"))
    quantization = pop_quantization(loading)
    lm, tokenizer = load_base(base, **loading)
    require_maskable(lm)
    ends = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    excluded_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    names = choose_special_tokens(tokenizer, k, names=names_given, excluded_ids=excluded_ids)
    ids = special_token_ids(tokenizer, names)
    config = GemConfig(
        tune=tune,
        base=base,
        base_revision=loading.get("revision"),
        base_fingerprint=weights_fingerprint(lm),
        special_tokens=tuple(names),
        special_ids=tuple(ids),
        pooling=pooling,
        shared_position=shared_position,
        max_length=min(max_length, max_positions(lm) or max_length),
        prompts=dict(prompts),
        template=template,
        layer=layer,
        attention=attention,
    )
    rows = initial_rows(lm, ids)
    if tune in ("lora", "full"):
        grow_table(lm, ids, rows)
    attached = attach_adapter(lm, config, rows, adapter)
    quantize_layers(lm, quantization)
    return GemParts(lm, tokenizer, config, attached)


def load_pretrained(path: str | Path, *, base: str | None, **loading: Unpack[Loading]) -> GemParts:
    """Load a saved GEM: see `GemModel.from_pretrained`."""
    directory = _find_directory(path, loading)
    config = GemConfig.from_directory(directory)
    full = config.tune == "full" or not (directory / ADAPTER_FILE).is_file()
    if full and not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} holds neither {ADAPTER_FILE} nor a model: restore the missing file or train again"
        )
    require_kernel(loading.get("attn_implementation"))
    if not full and base is None and config.base_revision is not None:
        loading.setdefault("revision", config.base_revision)
    quantization = pop_quantization(loading)
    lm, tokenizer = load_base(str(directory) if full else base or config.base, **loading)
    projection = None
    if config.projection_dim is not None:
        width = lm.config.get_text_config().hidden_size * (config.k if config.pooling == "concat" else 1)
        projection = Projection.load(directory, dim=config.projection_dim, width=width).to(lm.device)
    if full:
        quantize_layers(lm, quantization)
        return GemParts(lm, tokenizer, config, None, projection)
    if (found := weights_fingerprint(lm)) != config.base_fingerprint:
        logger.warning(
            "%s was trained on other base weights (fingerprint %s) than those loaded from %s (%s): another"
            " quantisation or precision moves embeddings a little, another model makes them meaningless",
            directory,
            config.base_fingerprint,
            base or config.base,
            found,
        )
    if (directory / "tokenizer_config.json").is_file():  # the shipped ones use their base's
        tokenizer = type(tokenizer).from_pretrained(str(directory))
    rows = initial_rows(lm, config.special_ids)
    if config.tune == "lora":
        grow_table(lm, config.special_ids, rows)
    adapter = attach_adapter(lm, config, rows, read_adapter_settings(directory))
    assert adapter is not None
    try:
        adapter.load(directory)
    except SafetensorError as error:
        raise ValueError(f"{directory / ADAPTER_FILE} is damaged: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load the adapter in {directory}: {first_line(error)}") from error
    quantize_layers(lm, quantization)
    lm.eval()
    return GemParts(lm, tokenizer, config, adapter, projection)


def _find_directory(path: str | Path, loading: Loading) -> Path:
    """Find a GEM's directory. ``revision`` is taken out of the options where it is the GEM's, not its base's."""
    directory = resolve_directory(path, revision=loading.get("revision"), token=loading.get("token"))
    if directory != Path(path):
        loading.pop("revision", None)
    return directory


def save_parts(parts: GemParts, path: str | Path, *, merge: bool, weights: dict[str, torch.Tensor] | None) -> None:
    """Write a GEM's directory: see `GemModel.save_pretrained`."""
    target = Path(path)
    if merge and parts.config.tune != "lora":
        raise ValueError(f"only a `lora` GEM can be merged, this one is {parts.config.tune!r}: train with --tune lora")
    if merge or parts.adapter is None:
        require_unquantized(parts.lm)
    with atomic_directory(target, last=CONFIG_FILE) as stage:
        if parts.adapter is not None and not merge:
            parts.adapter.save(stage)
        else:
            lm = parts.adapter.merge() if parts.adapter is not None else parts.lm
            with hide_progress_bars():
                lm.save_pretrained(stage, state_dict=weights)
        if parts.projection is not None:
            parts.projection.save(stage)
        parts.tokenizer.save_pretrained(stage)
        write_sentence_transformers_files(stage, parts.config)
        (stage / CONFIG_FILE).write_text(parts.config.to_json(), encoding="utf-8")


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


def embedding_fingerprint(
    lm: PreTrainedModel, config: GemConfig, adapter: Adapter | None, projection: Projection | None = None
) -> str:
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
        *([config.attention] if config.attention != "causal" else []),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    trained = {} if adapter is None else adapter.state()
    if projection is not None:
        trained["projection"] = projection.weight_PD.detach().cpu()
    for name, tensor in sorted(trained.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.to(torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_fingerprint(lm: PreTrainedModel, config: GemConfig, adapter: Adapter | None) -> str:
    """Return a short hash of everything that shapes a KV cache, the model's precision included.

    It covers the loaded weights, which can differ from those the GEM was trained on (``from_pretrained(base=...)``).
    """
    settings = [embedding_fingerprint(lm, config, adapter), weights_fingerprint(lm), str(lm.dtype)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
