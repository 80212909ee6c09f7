"""Weights in 8 or 4 bits, multiplied by packed kernels: torch's own on a CPU, or bitsandbytes'.

A token that is written reads every weight once, so a step takes as long as its weights are large: fewer bits are more
tokens a second. Activations stay in bfloat16.

- ``int8``: one scale for each output (`torch._weight_int8pack_mm`). For many rows at once, which arithmetic bounds, the
  weights are turned back into bfloat16, layer by layer.
- ``int4``: scale and zero point for every 32 weights of an output, as GGUF's Q4_1
  (`torch.ops.aten._weight_int4pack_mm_for_cpu`).
- ``nf4``: QLoRA's 4-bit NormalFloat, one scale for every 64 weights (`bitsandbytes.matmul_4bit`), also on GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

Quantization = Literal["int8", "int4", "nf4"]
GROUP_SIZE = 32
_CENTRE = 8  # the 4-bit number that stands for the zero point


def parse_quantization(name: str | None) -> Quantization | None:
    """Return the quantization with the given name; None for None and ``none``.

    Raises:
        ValueError: It is unknown.
    """
    if name in (None, "none"):
        return None
    for known in get_args(Quantization):
        if name == known:
            return known
    raise ValueError(f"unknown quantization {name!r}: choose one of none, {', '.join(get_args(Quantization))}")


class QuantizedLinear(nn.Linear):
    """A linear layer whose weights are quantized once. ``weight`` gives them in bfloat16, computed at each access."""

    max_packed_rows: int | None = None
    """Most rows for which the packed kernel is the faster one. None: it always is."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the kernel multiplies by, [out_features, in_features], bfloat16."""
        raise NotImplementedError

    def multiply(self, x_ND: Tensor) -> Tensor:
        """Return the product of some rows with the packed weights."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, with the packed kernel unless the rows are many or a gradient is wanted."""
        rows = x.numel() // self.in_features
        many = self.max_packed_rows is not None and rows > self.max_packed_rows
        if many or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        out = self.multiply(x.reshape(rows, self.in_features).contiguous())
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """Eight bits a weight, one scale for each output."""

    max_packed_rows = 32

    @torch.no_grad()
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_OI = linear.weight.float()
        scale_O = (weight_OI.abs().amax(1) / 127).clamp_(min=1e-8).bfloat16()
        integers_OI = (weight_OI / scale_O.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.integers_OI = _constant(integers_OI)
        self.scale_O = _constant(scale_O)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the kernel multiplies by, [out_features, in_features], bfloat16."""
        return self.integers_OI.to(torch.bfloat16).mul_(self.scale_O[:, None])

    def multiply(self, x_ND: Tensor) -> Tensor:
        """Return the product of some rows with the packed weights."""
        return torch._weight_int8pack_mm(x_ND, self.integers_OI, self.scale_O)


class Int4Linear(QuantizedLinear):
    """Four bits a weight, scale and zero point for each group of `GROUP_SIZE` inputs."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        groups_OGI = linear.weight.float().view(linear.out_features, -1, GROUP_SIZE)
        low_OG, high_OG = groups_OGI.amin(-1), groups_OGI.amax(-1)
        scale_OG = ((high_OG - low_OG) / 15).clamp_(min=1e-8).bfloat16()
        zero_OG = (low_OG + _CENTRE * scale_OG.float()).bfloat16()
        numbers_OGI = (groups_OGI - zero_OG.float()[..., None]) / scale_OG.float()[..., None] + _CENTRE
        numbers_OI = numbers_OGI.round_().clamp_(0, 15).flatten(1).to(torch.int32)
        self.packed = _constant(torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers_OI, 1))
        self.scale_and_zero_GO2 = _constant(torch.stack([scale_OG, zero_OG], -1).transpose(0, 1).contiguous())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the kernel multiplies by: its products with unit vectors, as its layout is the CPU's own."""
        return self.multiply(torch.eye(self.in_features, dtype=torch.bfloat16)).T

    @torch.no_grad()
    def multiply(self, x_ND: Tensor) -> Tensor:
        """Return the product of some rows with the packed weights."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_ND, self.packed, GROUP_SIZE, self.scale_and_zero_GO2
        )
        return product


class Nf4Linear(QuantizedLinear):
    """Four bits a weight, as bitsandbytes stores them."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        from bitsandbytes.functional import quantize_4bit

        # A block that crosses rows is read back wrongly by bitsandbytes 0.50's CPU kernel.
        self.block = 64 if self.in_features % 64 == 0 else GROUP_SIZE
        packed, state = quantize_4bit(linear.weight.contiguous(), blocksize=self.block, quant_type="nf4")
        self.packed, self.scale = _constant(packed), _constant(state.absmax)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights that the kernel multiplies by, [out_features, in_features], bfloat16."""
        from bitsandbytes.functional import dequantize_4bit

        weight_OI: Tensor = dequantize_4bit(self.packed, self._state())
        return weight_OI

    def multiply(self, x_ND: Tensor) -> Tensor:
        """Return the product of some rows with the packed weights."""
        from bitsandbytes import matmul_4bit

        product: Tensor = matmul_4bit(x_ND, self.packed, self._state())
        return product

    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        shape = torch.Size([self.out_features, self.in_features])
        return QuantState(self.scale, shape, blocksize=self.block, quant_type="nf4", dtype=torch.bfloat16)


def _constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that is never trained: fingerprints cover parameters."""
    return nn.Parameter(tensor, requires_grad=False)


def quantize_layers(lm: PreTrainedModel, quantization: Quantization | None) -> None:
    """Replace a model's linear layers, the output head's too, by quantized ones, in place.

    Embedding tables and the matrices of a LoRA stay as they are. None does nothing.

    Raises:
        ValueError: The model is not in bfloat16, or not on a CPU where the kernels are a CPU's, or has no layer whose
            shape they take.
    """
    if quantization is None:
        return
    if (quantization != "nf4" and lm.device.type != "cpu") or lm.dtype != torch.bfloat16:
        raise ValueError(
            f"{quantization} weights need bfloat16 on a CPU, got {str(lm.dtype).removeprefix('torch.')} on"
            f" {lm.device.type}: leave dtype out and give device cpu, or quantize nf4, or leave quantize out"
        )
    made = {"int8": Int8Linear, "int4": Int4Linear, "nf4": Nf4Linear}[quantization]
    linear = [(name, m) for name, m in lm.named_modules() if type(m) is nn.Linear and "lora_" not in name and _fits(m)]
    if not linear:
        raise ValueError(f"no layer of {type(lm).__name__} can be quantized: leave quantize out")
    for name, layer in linear:
        lm.set_submodule(name, made(layer))
    linear.clear()
    _return_freed_memory()


def _return_freed_memory() -> None:
    """Give memory that was freed back to the system. glibc would keep the former weights for later allocations."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def require_unquantized(lm: PreTrainedModel) -> None:
    """Refuse to write a model's own weights where they are quantized.

    Raises:
        ValueError: They are.
    """
    if any(isinstance(m, QuantizedLinear) for m in lm.modules()):
        raise ValueError("quantized weights cannot be saved or merged: load the model without quantize")


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % GROUP_SIZE == 0 and layer.out_features % 16 == 0
