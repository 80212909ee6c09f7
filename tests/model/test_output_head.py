"""A frozen head computes the last column's logits as an unfrozen one does, and gets them as one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemify import GemModel
from gemify.model.base import load_base


@pytest.mark.parametrize("tune", ["gated", "tokens", "lora"])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_last_columns_logits_are_computed_as_one_matrix(base_dir: Path, tune: Any, rows: int) -> None:
    lm, _ = load_base(str(base_dir))
    ids_BT = torch.randint(3, 300, (rows, 9))
    with torch.no_grad():
        expected = lm(input_ids=ids_BT, logits_to_keep=1).logits  # unfrozen: PyTorch folds the rows by itself
    gem = GemModel.from_base(str(base_dir), tune=tune)
    seen: list[Tensor] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    gem.lm.get_output_embeddings().register_forward_pre_hook(watch)
    with torch.no_grad():
        logits = gem.lm(input_ids=ids_BT, logits_to_keep=1).logits
        whole = gem.lm(input_ids=ids_BT).logits
    last, every = seen
    assert last.shape[:2] == (rows, 1)
    for hidden in seen:
        assert hidden.stride(0) == hidden.stride(1) * hidden.shape[1]  # else a CPU copies the table for every row
    assert every.shape[:2] == (rows, 9)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, whole[:, -1:])
