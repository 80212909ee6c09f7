"""A saved GEM for a vLLM engine: which weights the engine loads, and what acts at the special tokens alone.

The files of this folder import torch, safetensors and gemify's plain files only: vLLM's environment has an older
transformers than gemify's, and no peft.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemify.model.config import GemConfig, resolve_directory

MARK = "gemify"
"""Names this plugin's entries in vLLM's own dictionaries: ``additional_config``, and ``extra_args`` of a request."""
WORKER = "gemify.integrations.vllm.worker.GemWorker"

_ADAPTER = "adapter_model.safetensors"
_ROWS = ".trainable_tokens_delta"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # with a vLLM kernel


@dataclass(frozen=True)
class EngineGem:
    """A GEM that vLLM can run. `of` refuses others."""

    directory: Path
    config: GemConfig
    base: str
    """The model that the engine loads: a directory or a repo id."""
    settings: Mapping[str, Any] | None
    """PEFT's settings of the adapter; None where the weights in ``base`` are all there is."""

    @staticmethod
    def of(gem: str | Path, base: str | Path | None = None) -> EngineGem:
        """Read a saved GEM.

        Args:
            gem: Its directory or repo id.
            base: Its base model. None: where its adapter says.

        Raises:
            ValueError: vLLM cannot run this GEM.
        """
        directory = resolve_directory(gem)
        config = GemConfig.from_directory(directory)
        if config.tune == "embedding_lora" or config.projection_dim is not None:
            raise ValueError(
                f"{gem} embeds in a pass of its own or projects its vectors, which this plugin cannot: `gemify export"
                f" -m {gem} -o OUT` and serve OUT/embedding as a pooling model, or use `gemify serve`"
            )
        if config.k == 0:
            raise ValueError(
                f"{gem} has no special tokens, its vectors are means over a text: this plugin reads special tokens;"
                " use `gemify serve`"
            )
        if config.k > 1 and not config.shared_position:
            raise ValueError(
                f"{gem} has {config.k} special tokens at positions of their own, which vLLM's attention cannot keep"
                " apart: use `gemify serve`, or train with a shared position"
            )
        if config.layer is not None:
            raise ValueError(
                f"{gem} is read out at layer {config.layer}, this plugin reads the last: use `gemify serve`, or train"
                " without layer"
            )
        if not (directory / _ADAPTER).is_file():
            return EngineGem(directory, config, str(directory), None)
        if config.tune == "lora":
            raise ValueError(
                f"{gem} is a LoRA that acts on every token: fold it in with `gemify export -m {gem} -o OUT`,"
                " then give OUT"
            )
        settings = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        if base is None and not (base := settings.get("base_model_name_or_path")):
            raise ValueError(f"{gem} does not say what its base model is: give base, a directory or a repo id")
        return EngineGem(directory, config, str(base), settings)

    @property
    def rank(self) -> int:
        """Rank of the LoRA for the engine: the adapter's, or one that holds the special tokens' rows."""
        assert self.settings is not None
        return int(self.settings.get("r") or next(r for r in _RANKS if r >= self.config.k))

    @property
    def engine_rank(self) -> int:
        """The smallest rank with a vLLM kernel that holds `rank`."""
        fitting = [r for r in _RANKS if r >= self.rank]
        if not fitting or self.config.k > self.rank:
            raise ValueError(
                f"{self.directory} has rank {self.rank} and {self.config.k} special tokens: vLLM takes ranks up to"
                f" {_RANKS[-1]}, and this plugin at least one a special token"
            )
        return fitting[0]

    @property
    def targets(self) -> list[str]:
        """Names of the layers the adapter acts in."""
        with safe_open(self.directory / _ADAPTER, framework="pt") as state:
            names = {n.split(".lora_")[0] if ".lora_" in n else _table_name(n) for n in state.keys()}  # noqa: SIM118
        return sorted({name.rsplit(".", 1)[-1] for name in names})

    def write_lora(self, directory: Path, *, rows_KD: Tensor, vocabulary: int) -> None:
        """Write the adapter as a plain LoRA, the special tokens' rows as one on the embedding table.

        ``rows_KD`` are the table's own rows of the special tokens: with this LoRA a special token's embedding is the
        trained row, and without it the table's.
        """
        assert self.settings is not None
        state = load_file(self.directory / _ADAPTER)
        key = next(name for name in state if name.endswith(_ROWS))
        trained_KD = state.pop(key).float()
        alpha = float(self.settings.get("lora_alpha") or self.rank)
        a_RV = torch.zeros(self.rank, vocabulary)
        b_DR = torch.zeros(trained_KD.shape[1], self.rank)
        for at, special in enumerate(self.config.special_ids):
            a_RV[at, special] = 1.0
        b_DR[:, : self.config.k] = (trained_KD - rows_KD.float().cpu()).T * (self.rank / alpha)
        table = _table_name(key)
        state |= {f"{table}.lora_embedding_A": a_RV, f"{table}.lora_embedding_B": b_DR}
        settings = {"peft_type": "LORA", "r": self.rank, "lora_alpha": alpha, "target_modules": self.targets}
        save_file(state, directory / _ADAPTER)
        (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _table_name(key: str) -> str:
    """The embedding table's name in the key of the rows that replace some of its own."""
    return key.removesuffix(_ROWS).removesuffix(".token_adapter")


def engine_options(gem: str | Path, base: str | Path | None = None, **more: Any) -> dict[str, Any]:
    """Return keyword arguments of ``vllm.LLM`` (and of ``vllm.EngineArgs``) for a GEM.

    Sets VLLM_USE_V2_MODEL_RUNNER=0 unless it is set: the plugin is written for vLLM's first model runner.

    Args:
        gem: The GEM's directory or repo id.
        base: Its base model. None: where its adapter says.
        more: Any other arguments of ``vllm.LLM``.

    Raises:
        ValueError: vLLM cannot run this GEM.
    """
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    found = EngineGem.of(gem, base)
    own = {MARK: {"gem": str(found.directory.resolve())}}
    options: dict[str, Any] = {"model": found.base, "worker_extension_cls": WORKER}
    if found.settings is not None:
        others = bool(more.pop("enable_lora", False))
        options |= {
            "enable_lora": True,
            "max_loras": int(more.pop("max_loras", 1)) + 1 if others else 1,
            "max_lora_rank": max(found.engine_rank, int(more.pop("max_lora_rank", 0))),
        }
        if not others:
            options["lora_target_modules"] = found.targets
    return options | more | {"additional_config": {**more.get("additional_config", {}), **own}}
