"""The next-token loss at the output head.

It is computed from hidden states at the targets only. A vocabulary is large: the logits of a batch
take more memory than the rest of a small model's step. PyTorch's `linear_cross_entropy` runs output head and loss
together, a part of the targets at a time. Models that do more to their logits than one matrix (soft caps, scales), and
older PyTorch, take the ordinary way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemify.paper.objectives import next_token_loss

_CPU_CHUNK = 256
"""Targets at a time on a CPU; PyTorch's own choice is far slower there."""


@torch.no_grad()
def has_plain_head(lm: PreTrainedModel) -> bool:
    """Return whether the model's logits are its output head's output, unchanged. Runs two tokens."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    ids_BT = torch.tensor([[1, 0]], device=lm.device)
    logits_BTV = lm(input_ids=ids_BT, use_cache=False).logits
    return torch.equal(logits_BTV, head(lm.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state))


def target_loss(lm: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed cross-entropy of the output head's logits.

    Args:
        lm: A model with a plain head (`has_plain_head`).
        hidden_ND: Last hidden states at the positions that have a target.
        targets_N: Token ids. All of them count.
    """
    head = lm.get_output_embeddings()
    on_cpu = hidden_ND.device.type == "cpu"
    autocast = torch.is_autocast_enabled(hidden_ND.device.type)
    small = targets_N.numel() <= _CPU_CHUNK
    emulated = on_cpu and (autocast or hidden_ND.dtype != torch.float32)  # linear_cross_entropy is slow there
    if small or emulated or not hasattr(F, "linear_cross_entropy"):
        return next_token_loss(head(hidden_ND), targets_N)
    weight_VD, bias_V = head.weight, head.bias
    if autocast:
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_CPU_CHUNK if on_cpu else None)
    return F.linear_cross_entropy(
        hidden_ND, weight_VD, targets_N, linear_bias=bias_V, reduction="sum", options=chunks
    ).float()
