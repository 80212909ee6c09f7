"""Next-token loss from hidden states: the output head runs at the targets only, and no more of its logits are held than needed.

A vocabulary is large: the logits of a batch take more memory than all else of a small model's step. PyTorch's own
`linear_cross_entropy` runs head and loss together, a part of the targets at a time. Models that do more to their logits
than one matrix (soft caps, scales), and older PyTorch, take the ordinary way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemify.paper.objectives import next_token_loss

_CPU_CHUNK = 256  # targets at a time; what PyTorch chooses itself is far slower on CPUs


@torch.no_grad()
def has_plain_head(lm: PreTrainedModel) -> bool:
    """Whether the model's logits are its output head's, and nothing else is done to them. Runs two tokens."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    ids_BT = torch.tensor([[1, 0]], device=lm.device)
    logits_BTV = lm(input_ids=ids_BT, use_cache=False).logits
    return torch.equal(logits_BTV, head(lm.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state))


def target_loss(lm: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Summed cross-entropy of the plain head's logits at ``hidden_ND``; every target counts."""
    head = lm.get_output_embeddings()
    on_cpu = hidden_ND.device.type == "cpu"
    autocast = torch.is_autocast_enabled(hidden_ND.device.type)
    small = targets_N.numel() <= _CPU_CHUNK
    emulated = on_cpu and (autocast or hidden_ND.dtype != torch.float32)  # PyTorch's own way is slow there
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
