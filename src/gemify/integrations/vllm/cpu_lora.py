"""A fix of vLLM's LoRA on a CPU: there, tokens without an adapter get the last slot's, and buffers count requests.

vLLM's torch kernels index the stacked adapters with the token's slot, -1 for none, which is the last slot in Python;
and they copy one adapter a token. Below, rows without an adapter are left alone, and the others alone are computed. On
GPUs vLLM's own kernels do this, and nothing here is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fix_cpu_lora(manager: Any) -> None:
    """Fix every LoRA layer of a CPU engine. Other engines stay as they are."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    fixed = _fixed_wrapper(PunicaWrapperCPU)
    for wrapper in manager.punica_wrapper_mapping.values():
        if type(wrapper) is PunicaWrapperCPU:
            wrapper.__class__ = fixed


def _fixed_wrapper(wrapper: type[Any]) -> type[Any]:
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink

    class RowsOnly(wrapper):
        """The rows that have an adapter, and their slots, are found once a step."""

        def _update_prefill_metadata(self, slots_N: Tensor) -> None:
            self.rows = torch.where(slots_N >= 0)[0]
            self.slots = slots_N[self.rows]
            self.no_lora = not len(self.rows)

        def _shrink_prefill(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
            if not self.no_lora:
                part = torch.zeros_like(y[self.rows])
                bgmv_shrink(x[self.rows], w_t_all, part, self.slots, scale)
                y[self.rows] = part

        def _expand_prefill(self, y: Tensor, x: Tensor, w_t_all: Tensor, add_inputs: bool) -> None:
            if not self.no_lora:
                part = y[self.rows]
                bgmv_expand(x[self.rows], w_t_all, part, self.slots, add_inputs)
                y[self.rows] = part

        def _expand_slice_prefill(
            self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool
        ) -> None:
            if not self.no_lora:
                part = y[self.rows]
                bgmv_expand_slice(x[self.rows], w_t_all, part, self.slots, y_offset, y_slice_size, add_inputs)
                y[self.rows] = part

    return RowsOnly
