"""A GEM's configuration, `config_gemify.json`, where saved GEMs are found, and pooling (GEM, Section 3.1).

Pooling makes one vector per row of hidden states. B rows, T positions, K special tokens, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gemify.model.tokenization import PLAIN, require_template
from gemify.paper.tokens import Segment

Pooling = Literal["mean", "concat"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(hidden_BKD: Tensor, pooling: Pooling) -> Tensor:
    """Pool the special tokens' states [B, K, D] to [B, D] (``mean``) or [B, K * D] (``concat``)."""
    return hidden_BKD.mean(dim=1) if pooling == "mean" else hidden_BKD.flatten(1)


def require_finite(vectors: Tensor) -> Tensor:
    """Return vectors.

    Raises:
        FloatingPointError: One of them is not finite.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise FloatingPointError(
            "the model's vectors are not finite (do its activations overflow in float16?): load it with float32 or"
            " bfloat16 (--dtype)"
        )
    return vectors


def pool_hidden_states(hidden_BTD: Tensor, segments_BT: Tensor, pooling: Pooling) -> Tensor:
    """Pool the hidden states of whole rows.

    Args:
        hidden_BTD: Last hidden states.
        segments_BT: `Segment` codes.
        pooling: How to pool over the special tokens. Rows without any (the SimCSE baseline) give the mean over the
            text, in float32; a text without tokens gives zeros.

    Returns:
        [B, D] or [B, K * D].
    """
    special_BT = segments_BT == Segment.SPECIAL
    if bool(special_BT.any()):
        return pool(hidden_BTD[special_BT].view(hidden_BTD.shape[0], -1, hidden_BTD.shape[-1]), pooling)
    text_BT = segments_BT == Segment.TEXT
    total_BD = hidden_BTD.float().masked_fill(~text_BT[..., None], 0.0).sum(dim=1)
    return total_BD / text_BT.sum(dim=1, keepdim=True).clamp(min=1)


Tune = Literal["gated", "tokens", "embedding_lora", "lora", "full"]
"""Which weights are trained: LoRA at the special tokens and their rows, the rows alone, LoRA in an embedding pass of
its own, LoRA everywhere, or all weights. The first three leave the language model's outputs unchanged to the bit."""
Attention = Literal["causal", "bidirectional"]
"""What a token of the embedding pass sees: the tokens before it, or all of its text (``embedding_lora`` only)."""
TUNES: tuple[Tune, ...] = get_args(Tune)
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
CONFIG_FILE = "config_gemify.json"
FORMAT_VERSION = 1
LATER_FIELDS = ("template", "layer", "attention", "projection_dim", "teacher")
"""Fields of `GemConfig` that the first files lack."""
SHIPPED = ("starter", "starter-gated")
"""Names of the GEMs that come with gemify."""


@dataclass(frozen=True)
class GemConfig:
    """Everything needed to use a GEM beside its weights. An invalid value raises ValueError."""

    tune: Tune = "gated"
    """Which weights were trained."""
    base: str = ""
    """The base model: a path, a repo id or ``starter``."""
    base_revision: str | None = None
    base_fingerprint: str = ""
    special_tokens: tuple[str, ...] = ()
    special_ids: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    shared_position: bool = True
    max_length: int = 512
    """Most tokens of a text, template and special tokens included. Longer texts are cut at the end."""
    template: str = PLAIN
    """Words around every text that is embedded (`gemify.model.tokenization`)."""
    layer: int | None = None
    """The layer whose state, after the final norm, is the embedding. 1 is the first, None the last."""
    attention: Attention = "causal"
    projection_dim: int | None = None
    """Width of the linear map that is applied to the pooled state (`gemify.model.projection`). None: there is none."""
    teacher: str | None = None
    """The embedding model in whose space the projected vectors lie."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.tune not in TUNES:
            raise ValueError(f"unknown tune {self.tune!r}: choose one of {', '.join(get_args(Tune))}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}: choose one of {', '.join(get_args(Pooling))}")
        require_special_tokens(len(self.special_ids), tune=self.tune, pooling=self.pooling)
        require_template(self.template, k=len(self.special_ids))
        require_layer(self.layer)
        require_attention(self.attention, tune=self.tune)
        if len(set(self.special_ids)) != len(self.special_ids) or len(self.special_ids) != len(self.special_tokens):
            raise ValueError(
                f"special tokens must be distinct, got {list(self.special_tokens)} = {list(self.special_ids)}"
            )
        if self.max_length <= len(self.special_ids):
            raise ValueError(
                f"max_length must exceed the {len(self.special_ids)} special token(s), got {self.max_length}"
            )

    @property
    def k(self) -> int:
        """Number of special tokens."""
        return len(self.special_ids)

    @property
    def max_text_tokens(self) -> int:
        """Most tokens before the special tokens: BOS, template and text."""
        return self.max_length - self.k

    @property
    def frozen_base(self) -> bool:
        """Whether the language model computes what its base computes, to the bit."""
        return is_frozen(self.tune)

    @property
    def embeds_from_cache(self) -> bool:
        """Whether a text's vector is a function of the KV cache that the language model has of it."""
        return self.k > 0 and self.tune != "embedding_lora"

    def resolve_prompt(self, name: str | None, prompt: str | None) -> str:
        """Return the prompt to put before a text: the given one, the named one, or the default; empty if there is none.

        Raises:
            ValueError: Both are given, or the name is unknown.
        """
        if prompt is not None and name is not None:
            raise ValueError("give a prompt or a prompt_name, not both")
        if prompt is not None:
            return prompt
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"no prompt named {name!r}: this model has {sorted(self.prompts) or 'none'}")
        return self.prompts[name]

    def to_json(self) -> str:
        """Return the text of ``config_gemify.json``."""
        values = dataclasses.asdict(self)
        for name in LATER_FIELDS:  # their defaults are left out: older files stay equal
            if values[name] == getattr(GemConfig, name):
                del values[name]
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_directory(directory: Path) -> GemConfig:
        """Read ``config_gemify.json`` from a directory.

        Raises:
            ValueError: There is no such directory or file, or it is damaged, of another version or has unknown entries.
        """
        path = directory / CONFIG_FILE
        if not directory.is_dir():
            raise ValueError(
                f"no such GEM directory: {directory} (give {', '.join(SHIPPED)} or one that `gemify train` wrote)"
            )
        if not path.is_file():
            raise ValueError(f"{directory} holds no {CONFIG_FILE}: it is no GEM; make one with `gemify train`")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}): restore it or train again") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{directory} has format version {version}, this gemify reads {FORMAT_VERSION}:"
                f" use the gemify it was saved with, or train again"
            )
        known = {f.name for f in dataclasses.fields(GemConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path} has unknown entries {unknown}: it was not written by this gemify")
        for name in ("special_tokens", "special_ids"):
            values[name] = tuple(values.get(name, ()))
        return GemConfig(**values)


def require_special_tokens(k: int, *, tune: Tune, pooling: Pooling) -> None:
    """Check the number of special tokens. 0 is the SimCSE baseline, which pools over the text.

    Raises:
        ValueError: ``k`` leaves nothing to train (``gated``, ``tokens``) or nothing to concatenate.
    """
    if k < 0 or (k == 0 and tune in ("gated", "tokens")):
        raise ValueError(
            f"k must be at least 1 special token with tune {tune!r}, got {k}: its weights act nowhere else"
            " (0, the mean over the text, needs tune embedding_lora, lora or full)"
        )
    if k == 0 and pooling != "mean":
        raise ValueError(f"pooling {pooling!r} needs special tokens, there are 0: set pooling to mean")


def is_frozen(tune: Tune) -> bool:
    """Return whether a tuning scope leaves the language model's outputs unchanged to the bit."""
    return tune in ("gated", "tokens", "embedding_lora")


def require_attention(attention: Attention, *, tune: Tune) -> None:
    """Check the attention of the embedding pass; ValueError if the tuning scope has no embedding pass of its own."""
    if attention not in ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}: choose one of {', '.join(ATTENTIONS)}")
    if attention == "bidirectional" and tune != "embedding_lora":
        raise ValueError(
            f"bidirectional attention needs an embedding pass of its own, tune {tune!r} has none: set tune"
            " embedding_lora, or attention causal"
        )


def require_layer(layer: int | None) -> None:
    """Check a layer's number (None: the last). Whether a model has that layer is checked by `gemify.model.early_exit`.

    Raises:
        ValueError: It is not a whole number from 1 on.
    """
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
        raise ValueError(
            f"layer must be a number from 1 (the first layer) on, got {layer!r}: leave it out for the last"
        )


def resolve_directory(path: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Find the directory of a saved GEM.

    Args:
        path: A GEM that comes with gemify by name, a directory, or a Hugging Face repo id, which is downloaded.
        revision: Branch, tag or commit of the repo. None: its main branch.
        token: Of the hub. None: that of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The directory. A path that does not exist is returned as it is.

    Raises:
        ValueError: The repo cannot be reached, or has no such revision.
    """
    directory = Path(path)
    if str(path) in SHIPPED and not directory.is_dir():
        return Path(__file__).parents[1] / "shipped" / directory
    if directory.is_dir() or directory.is_absolute() or str(path).count("/") != 1:
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, token=token))
    except RevisionNotFoundError as error:
        raise ValueError(f"the Hugging Face repo {path} has no revision {revision}") from error
    except Exception as error:
        raise ValueError(f"{path} is neither a directory nor a Hugging Face repo that can be reached") from error
