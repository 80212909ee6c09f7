"""A GEM as a module of sentence-transformers (``pip install 'gemify[sentence-transformers]'``).

``SentenceTransformer(modules=[Gem(gem)])`` runs a loaded GEM of any tuning scope, gated ones too, with the vectors of
`GemModel.encode`. The directory of a saved GEM names this class in ``modules.json``. sentence-transformers imports
classes of other packages only with ``trust_remote_code=True``: ``SentenceTransformer(DIR, trust_remote_code=True)``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

try:
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sentence-transformers is not installed: pip install 'gemify[sentence-transformers]'", name=error.name
    ) from error

from sentence_transformers.base.modules import InputModule

from gemify.model.config import GemConfig
from gemify.model.embedding_mixin import require_texts
from gemify.model.encode import embedding_batch, encode_batch
from gemify.model.forward import MaskedBatch
from gemify.model.gem import GemModel
from gemify.model.sentence_transformers_files import SETTINGS_FILE, prompt_settings
from gemify.model.tokenization import Truncate, require_truncate

LOADING_OPTIONS = ("base", "max_length", "dtype", "attn_implementation", "quantize")
"""What ``model_kwargs`` may hold: options of `GemModel.from_pretrained`."""


class Gem(InputModule):
    """The one module of a SentenceTransformer that runs a GEM, from texts to vectors.

    Its weights are the GEM's own: what moves, casts or trains one does so to the other.

    Args:
        gem: The model.
        truncate: What becomes of a text that is too long: ``end``, ``start`` or ``error`` (`GemModel.encode`).

    Raises:
        ValueError: ``truncate`` is another one. ``mean`` gives a text several rows, which this library's batches
            cannot hold.
    """

    def __init__(self, gem: GemModel, *, truncate: Truncate = "end") -> None:
        super().__init__()
        require_truncate(truncate)
        if truncate == "mean":
            raise ValueError("truncate must be end, start or error here, got 'mean': for the mean use GemModel.encode")
        self.gem, self.truncate, self.tokenizer = gem, truncate, gem.tokenizer
        self.lm, self.adapter, self.projection = gem.lm, gem.adapter, gem.projection
        self._has_settings = False

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenise texts, special tokens included; ValueError if one is no string or, with ``error``, too long."""
        require_texts(inputs)
        config = self.gem.config
        with self.gem.lock:
            rows, _ = self.gem.text_tokenizer.split(
                inputs, max_tokens=config.max_text_tokens, truncate=self.truncate, prompt=prompt or ""
            )
        batch = embedding_batch(config, [row for (row,) in rows])
        return {
            "input_ids": batch.ids_BT,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.positions_BT,
            "segments": batch.segments_BT,
        }

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Add ``sentence_embedding`` [B, D] in float32, and ``token_embeddings`` [B, T, D]: the last hidden states.

        The special tokens' states stand behind their text's.
        """
        ids_BT = features["input_ids"]
        shared = self.gem.config.shared_position
        batch = MaskedBatch(ids_BT, features["segments"], features["position_ids"], ids_BT, shared)
        vectors_BD, hidden_BTD = encode_batch(self.gem.lm, self.gem.config, batch, self.gem.projection)
        return {**features, "sentence_embedding": vectors_BD, "token_embeddings": hidden_BTD}

    def on_model_ready(self, model: Any) -> None:
        """Give the SentenceTransformer the GEM's prompts, where it was given none."""
        if self._has_settings:  # its own file of settings had them
            return
        settings = prompt_settings(self.gem.config)
        model.prompts = {**model.prompts, **{n: p for n, p in settings["prompts"].items() if not model.prompts.get(n)}}
        model.default_prompt_name = model.default_prompt_name or settings["default_prompt_name"]

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text: `GemModel.max_seq_length`."""
        return self.gem.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self.gem.max_seq_length = tokens

    def get_embedding_dimension(self) -> int:
        """Return D, the length of the vectors."""
        return self.gem.get_embedding_dim()

    def get_config_dict(self) -> dict[str, Any]:
        """Return what is printed of this module."""
        config = self.gem.config
        return {"base": config.base, "tune": config.tune, "max_seq_length": self.max_seq_length}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save the GEM, with the prompts of the SentenceTransformer that saves it.

        Raises:
            ValueError: ``safe_serialization`` is off.
        """
        if not safe_serialization:
            raise ValueError("a GEM is saved in safetensors only: leave safe_serialization on")
        gem, settings = copy.copy(self.gem), Path(output_path) / SETTINGS_FILE
        text = settings.read_text(encoding="utf-8") if settings.is_file() else None
        if text is not None:
            gem.config = _with_prompts(gem.config, json.loads(text))
        gem.save_pretrained(output_path)
        if text is not None:  # with its similarity and truncate_dim
            settings.write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> Self:
        """Load a saved GEM from a directory or the hub.

        Args:
            model_name_or_path: The directory or the repo id.
            subfolder: Where in it the GEM lies.
            token: The hub's token.
            cache_folder: Where downloads are kept.
            revision: The GEM's revision; its base's is in its configuration.
            local_files_only: Download nothing.
            trust_remote_code: Run the base's own code.
            model_kwargs: base, max_length, dtype, attn_implementation, quantize (`GemModel.from_pretrained`), truncate.
            processor_kwargs: None may be given.
            config_kwargs: None may be given.
            backend: ``torch``.
            kwargs: What later versions add.

        Raises:
            ValueError: An option is unknown, or no GEM is there.
        """
        options = dict(model_kwargs or {})
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        truncate = options.pop("truncate", "end")
        if unknown := sorted(set(options) - set(LOADING_OPTIONS)):
            raise ValueError(f"model_kwargs of a GEM are {', '.join(LOADING_OPTIONS)} and truncate, got {unknown}")
        if processor_kwargs or config_kwargs or backend != "torch":
            raise ValueError(
                "a GEM takes no processor_kwargs, config_kwargs or other backend than torch: leave them out, or export"
                " it (`gemify export`)"
            )
        directory = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        options = {"device": "cpu", "trust_remote_code": trust_remote_code, **options}
        module = cls(GemModel.from_pretrained(str(directory), **options), truncate=truncate)
        module._has_settings = True
        return module


def _with_prompts(config: GemConfig, settings: Mapping[str, Any]) -> GemConfig:
    """A GEM's configuration with the prompts of sentence-transformers' settings."""
    default = settings.get("default_prompt_name")
    prompts = {name: prompt for name, prompt in settings.get("prompts", {}).items() if prompt or name == default}
    if {"prompts": prompts, "default_prompt_name": default} == prompt_settings(config):
        return config
    return dataclasses.replace(config, prompts=prompts, default_prompt_name=default)
