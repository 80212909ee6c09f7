"""Weights that act at gated positions only: the only file that knows PEFT's LoRA internals.

Two parts, both switched by one context, `gate(gated_BT)`:

- `GatedLora`: a PEFT LoRA variant. In every adapted linear layer it adds the low-rank term at gated positions alone:
  the special tokens of a ``gated`` GEM, every token of an ``embedding_lora`` GEM's embedding pass.
- `SpecialRows`: the special tokens' own input embeddings. At gated positions they replace the embedding table's rows.

Without an open gate, or with no gated position in the batch, every layer returns what the base layer returned: the base
model's logits, KV cache and generated text stay equal to the last bit. The output head's weights are never changed, not
even where they are tied to the embedding table.

On disk this is a plain PEFT directory: an aLoRA adapter whose invocation tokens are the special tokens (or, without
LoRA, PEFT's trainable tokens), so that PEFT alone gives the same embedding for ``text S``.

One detail of the output head is mended here. Where only the last position's logits are wanted, transformers gives the
head a slice of the hidden states. PyTorch folds such a slice into one matrix only if the head's weight wants a
gradient; for a frozen weight it multiplies row by row, and on a CPU copies the whole table for each row: 0.26 seconds a
row in bfloat16 for 49,152 tokens, against 0.01 for all rows. A copy of the slice, which is small, gives the frozen head
the path of an unfrozen one, with the same bits (`speed_up_frozen_head`).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemify.model.base import STARTER, STARTER_REPO
from gemify.model.config import GemConfig, Tune

ADAPTER_FILE = "adapter_model.safetensors"
_NAME = "default"


class AdapterSettings(TypedDict, total=False):
    """LoRA's settings, named as in PEFT. `Adapter` has the defaults."""

    rank: int
    lora_alpha: float | None
    lora_dropout: float
    target_modules: str | Sequence[str]


@dataclass(frozen=True)
class _Gate:
    gated_BT: Tensor
    """True where the trained weights act."""
    special_BT: Tensor
    """True at the special tokens."""
    special_index_BT: Tensor
    """Which special token stands there (0 elsewhere)."""
    flat_index_N: Tensor
    """Indices of the gated positions among all B * T."""
    everywhere: bool
    """Whether all positions are gated."""


_open: ContextVar[_Gate | None] = ContextVar("gemify_gate", default=None)


class _Traced:
    """The gate of a function that is being compiled: the compiler cannot read a context variable."""

    gate: _Gate | None = None


_traced = _Traced()


def current_gate() -> _Gate | None:
    """Return the open gate, or None."""
    return _traced.gate if torch.compiler.is_compiling() else _open.get()


def with_gate(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` with the gate as a further first argument, so that it can be compiled."""

    def gated_forward(opened: _Gate | None, *args: Any, **kwargs: Any) -> Any:
        _traced.gate = opened
        output = forward(*args, **kwargs)
        _traced.gate = None
        return output

    return gated_forward


@contextlib.contextmanager
def gate(gated_BT: Tensor, *, special_BT: Tensor | None = None) -> Iterator[None]:
    """Let the trained weights act at some positions, inside this context and in this thread.

    Args:
        gated_BT: True where they act.
        special_BT: True at the special tokens, which stand there in order, once per row. None: the gated positions.
    """
    special_BT = gated_BT if special_BT is None else special_BT
    special_index_BT = (special_BT.long().cumsum(-1) - 1).clamp_(min=0)
    flat_index_N = gated_BT.flatten().nonzero()[:, 0]  # once per pass: every layer would wait for it otherwise
    everywhere = flat_index_N.numel() == gated_BT.numel()
    token = _open.set(_Gate(gated_BT, special_BT, special_index_BT, flat_index_N, everywhere))
    try:
        yield
    finally:
        _open.reset(token)


class GatedLora(LoraVariant):
    """LoRA at the gated positions of a layer's input. It cannot be merged into the weights."""

    def supports_lora_conversion(self) -> bool:
        """Return False: no plain LoRA acts at some positions only."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Initialise nothing: the weights are LoRA's."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refuse to merge."""
        raise ValueError("a gated adapter acts at the special tokens only and cannot be merged: train with --tune lora")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Refuse to merge."""
        GatedLora.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the low-rank term at the gated positions of the base layer's output.

        Raises:
            RuntimeError: The layer sees only a part of the tokens.
        """
        opened = current_gate()
        assert opened is not None
        shape, count = opened.gated_BT.shape, opened.gated_BT.numel()
        if x.shape[:-1] != shape and x.shape[:-1] != (count,):  # some blocks flatten [B, T, D] to [B * T, D]
            raise RuntimeError(
                f"a layer got {tuple(x.shape[:-1])} tokens where {count} were expected: it sees only a part"
                " of the tokens (a routed expert), so it cannot be gated; leave it out of target_modules"
            )
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        if opened.everywhere:
            return result + b(a(dropout(x.to(a.weight.dtype)))) * scaling
        index_N = opened.flat_index_N.to(x.device)
        gated_ND = x.flatten(0, -2)[index_N].to(a.weight.dtype)
        delta = (b(a(dropout(gated_ND))) * scaling).to(result.dtype)
        if not torch.is_grad_enabled() and result.is_contiguous():  # the layer's own output: no copy of it
            result.view(-1, result.shape[-1]).index_add_(0, index_N, delta)
            return result
        return result.flatten(0, -2).index_add(0, index_N, delta).view_as(result)


def _forward_unless_gated(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the base layer alone while no gate is open: PEFT's own forward looks for adapters first, which costs time."""
    if current_gate() is None:
        return layer._modules["base_layer"](x, *args, **kwargs)
    return type(layer).forward(layer, x, *args, **kwargs)


LoraLayer._forward_unless_gated = _forward_unless_gated  # a bound method of the class pickles, for other processes


class EmbeddingLora(GatedLora):
    """LoRA at every token of an embedding pass, in the precision of the base layer.

    The trained matrices may be float32 beside a bfloat16 base: they are rounded, not the layer's whole input widened.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the low-rank term to the base layer's output, in one product."""
        assert current_gate() is not None
        a_RD, b_OR = (m[active_adapter].weight.to(result.dtype) for m in (module.lora_A, module.lora_B))
        x_ND = module.lora_dropout[active_adapter](x.to(result.dtype)).flatten(0, -2)
        low_NR = nn.functional.linear(x_ND, a_RD)
        scaling = module.scaling[active_adapter]
        return torch.addmm(result.flatten(0, -2), low_NR, b_OR.T, alpha=scaling).view_as(result)


class SpecialRows(nn.Module):
    """The special tokens' input embeddings, [k, D], which replace the table's rows where these stand."""

    def __init__(self, rows_KD: Tensor) -> None:
        super().__init__()
        self.rows_KD = nn.Parameter(rows_KD.clone())

    def attach(self, lm: PreTrainedModel) -> None:
        """Hook the rows into a model's embedding table."""
        if not len(self.rows_KD):
            return
        table = lm.get_input_embeddings()
        table.register_forward_pre_hook(_replace_special_ids)
        table.register_forward_hook(self._put_rows)

    def _put_rows(self, table: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        opened = _open.get()
        if opened is None or args[0].shape != opened.special_BT.shape:
            return output
        special_BT = opened.special_BT.to(output.device)
        rows = self.rows_KD[opened.special_index_BT.to(output.device)[special_BT]]
        scale = getattr(table, "embed_scale", None)  # Gemma-like tables scale in their forward
        if scale is not None:
            rows = rows * torch.as_tensor(scale, device=rows.device).to(rows.dtype)
        return output.index_put(torch.where(special_BT), rows.to(output.dtype))


def _replace_special_ids(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give the special tokens a valid id: an added token may have no row in the table, and `SpecialRows` puts it."""
    opened = _open.get()
    if opened is None or args[0].shape != opened.special_BT.shape:
        return args
    return (args[0].masked_fill(opened.special_BT.to(args[0].device), 0), *args[1:])


class Adapter(nn.Module):
    """The trained weights of a GEM that is not ``full``, attached to a base model in place.

    Args:
        lm: The base model. Its weights are frozen.
        tune: Which weights are trained.
        special_ids: Ids of the k special tokens.
        rows_KD: First values of their embeddings.
        rank: LoRA's rank.
        lora_alpha: LoRA's scale times the rank. None: the rank.
        lora_dropout: Dropout before the low-rank term, in training.
        target_modules: Layers that get a LoRA, named as in PEFT.
        base_name: The base model's name, for ``adapter_config.json``.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        tune: Tune,
        special_ids: Sequence[int],
        rows_KD: Tensor,
        rank: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        base_name: str | None = None,
    ) -> None:
        super().__init__()
        self.tune = tune
        self.special_ids = [int(i) for i in special_ids]
        self.base_name = base_name
        self._embedding_name = next(n for n, m in lm.named_modules() if m is lm.get_input_embeddings())
        lm.requires_grad_(False)
        speed_up_frozen_head(lm)
        self._peft: list[PeftModel] = []  # in a list, so that the language model's parameters are not registered here
        if tune in ("gated", "lora", "embedding_lora"):
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=rank if lora_alpha is None else lora_alpha,
                lora_dropout=lora_dropout,
                target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
                alora_invocation_tokens=self.special_ids if tune == "gated" else None,
            )
            with _without_renaming_warning():
                self._peft.append(get_peft_model(lm, config))
            if tune != "lora":
                for layer in self._lora_layers(lm):
                    layer.lora_variant[_NAME] = GatedLora() if tune == "gated" else EmbeddingLora()
                    layer.cast_input_dtype_enabled = False  # it would cast the layer's whole input
                    layer.forward = layer._forward_unless_gated
        self.rows = SpecialRows(rows_KD)
        self.rows.attach(lm)
        self.rows.to(lm.device)

    @staticmethod
    def _lora_layers(lm: nn.Module) -> list[LoraLayer]:
        return [m for m in lm.modules() if isinstance(m, LoraLayer)]

    def set_training(self, training: bool) -> None:
        """Switch the adapter's dropout, and nothing else."""
        for layer in self._lora_layers(self._peft[0]) if self._peft else []:
            layer.lora_dropout.train(training)

    def lora_parameters(self) -> list[nn.Parameter]:
        """Return the LoRA matrices; the special tokens' rows are not among them."""
        return [p for n, p in self._peft[0].named_parameters() if "lora_" in n] if self._peft else []

    def _row_key(self) -> str:
        inner = ".token_adapter" if self._peft else ""
        return f"base_model.model.{self._embedding_name}{inner}.trainable_tokens_delta"

    def state(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors on the CPU, named as in PEFT."""
        lora = get_peft_model_state_dict(self._peft[0], save_embedding_layers=False) if self._peft else {}
        state = lora | ({self._row_key(): self.rows.rows_KD} if self.special_ids else {})
        return {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load trained tensors named as in PEFT; ValueError if they do not fit this base model or configuration."""
        state = dict(state)
        rows = state.pop(self._row_key(), self.rows.rows_KD[:0])
        if rows.shape != self.rows.rows_KD.shape:
            got = tuple(rows.shape)
            raise ValueError(f"the adapter holds other special-token rows (got {got}) than its configuration says")
        with torch.no_grad():
            self.rows.rows_KD.copy_(rows)
        if self._peft:
            ours = {n.replace(f".{_NAME}", ""): p for n, p in self._peft[0].named_parameters() if "lora_" in n}
            shapes, wanted = ({n: t.shape for n, t in tensors.items()} for tensors in (state, ours))
            if odd := sorted(name for name, _ in shapes.items() ^ wanted.items()):
                raise ValueError(f"the adapter's weights do not fit this base model (first odd one: {odd[0]})")
            with torch.no_grad():
                for name, weight in ours.items():
                    weight.copy_(state[name])

    def save(self, directory: Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT alone can read."""
        config: PeftConfig
        if self._peft:
            config = self._peft[0].peft_config[_NAME]
            config.trainable_token_indices = {self._embedding_name: self.special_ids} if self.special_ids else None
        else:
            config = TrainableTokensConfig(
                task_type="CAUSAL_LM", token_indices=self.special_ids, target_modules=[self._embedding_name]
            )
        config.base_model_name_or_path = self.base_name
        was, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(directory))
        finally:
            config.inference_mode = was
            if self._peft:
                config.trainable_token_indices = None
        save_file(self.state(), directory / ADAPTER_FILE, metadata={"format": "pt"})

    def load(self, directory: Path) -> None:
        """Load the tensors that `save` wrote."""
        self.load_state(load_file(directory / ADAPTER_FILE))

    def save_without_rows(self, directory: Path, *, special_id: int) -> None:
        """Write a gated adapter of one special token without its row, for a base whose table holds the row."""
        config = copy.copy(self._peft[0].peft_config[_NAME])
        config.alora_invocation_tokens, config.trainable_token_indices = [special_id], None
        config.base_model_name_or_path, config.inference_mode = None, True
        config.save_pretrained(str(directory))
        state = self.state()
        del state[self._row_key()]
        save_file(state, directory / ADAPTER_FILE, metadata={"format": "pt"})

    def unload(self, lm: PreTrainedModel) -> PreTrainedModel:
        """Return the plain language model: ``lora`` folded in, other adapters removed, its table unchanged.

        Ends the adapter.
        """
        if not self._peft:
            return lm
        peft = self._peft.pop()
        plain: PreTrainedModel = peft.merge_and_unload() if self.tune == "lora" else peft.unload()
        return plain

    def merge(self) -> PreTrainedModel:
        """Return the plain language model with ``lora`` folded in and the special tokens' rows in its table."""
        if self.tune != "lora":
            raise ValueError(
                f"only an ordinary LoRA can be merged, this adapter is {self.tune!r}: train with --tune lora"
            )
        lm: PreTrainedModel = self._peft[0].merge_and_unload()
        with torch.no_grad():
            lm.get_input_embeddings().weight[self.special_ids] = self.rows.rows_KD.to(lm.get_input_embeddings().weight)
        return lm


def merge_adapter(lm: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Return a plain language model with a saved LoRA folded into its weights. Ends the use of ``lm``."""
    with _without_renaming_warning():
        merged: PreTrainedModel = PeftModel.from_pretrained(lm, str(directory)).merge_and_unload()
    return merged


@contextlib.contextmanager
def _without_renaming_warning() -> Iterator[None]:
    """PEFT asks models for a property that transformers 5.24 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def attach_adapter(
    lm: PreTrainedModel, config: GemConfig, rows_KD: Tensor, settings: AdapterSettings
) -> Adapter | None:
    """Attach the adapter that a GEM's configuration asks for. None where the model itself is trained (``full``)."""
    if config.tune == "full":
        return None
    return Adapter(
        lm,
        tune=config.tune,
        special_ids=config.special_ids,
        rows_KD=rows_KD.float(),
        base_name=STARTER_REPO if config.base == STARTER else config.base,
        **settings,
    )


def read_adapter_settings(directory: Path) -> AdapterSettings:
    """Read the settings of a saved adapter, to make an `Adapter` that can load it."""
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        return {}
    return {
        "rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.target_modules,
    }


def speed_up_frozen_head(lm: PreTrainedModel) -> None:
    """Give the model's output head contiguous hidden states: see the top of this file."""
    head = lm.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    hidden_BTD = inputs[0]
    if isinstance(hidden_BTD, Tensor) and hidden_BTD.dim() == 3:
        row_stride, position_stride, _ = hidden_BTD.stride()
        if row_stride != position_stride * hidden_BTD.shape[1]:
            return (hidden_BTD.clone(memory_format=torch.contiguous_format), *inputs[1:])
    return None
