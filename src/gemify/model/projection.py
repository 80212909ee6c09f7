"""A linear map from pooled hidden states to the vectors of another embedding model.

A GEM that learned from a teacher (`gemify.training.teacher`) can keep the map. Its vectors then lie in the teacher's
space: an index that the teacher wrote is searched by the model that answers. The map reads states of length 1, so that
its weights have one scale for all models. On disk it is the weight of sentence-transformers' ``Dense`` module.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PROJECTION_FILE = "projection.safetensors"
_KEY = "linear.weight"


class Projection(nn.Module):
    """The map ``normalize(x) @ weight.T`` in float32. The weight is [P, D]."""

    def __init__(self, weight_PD: Tensor) -> None:
        super().__init__()
        self.weight_PD = nn.Parameter(weight_PD.detach().float().clone())

    def forward(self, states_BD: Tensor) -> Tensor:
        """Map states [B, D] to vectors [B, P]."""
        return nn.functional.linear(nn.functional.normalize(states_BD.float(), dim=-1), self.weight_PD.float())

    def save(self, directory: Path, name: str = PROJECTION_FILE) -> None:
        """Write the weight into a directory."""
        save_file({_KEY: self.weight_PD.detach().cpu().contiguous()}, directory / name)

    def load_from(self, directory: Path) -> None:
        """Read the weight in place."""
        P, D = self.weight_PD.shape
        with torch.no_grad():
            self.weight_PD.copy_(Projection.load(directory, dim=P, width=D).weight_PD)

    @staticmethod
    def load(directory: Path, *, dim: int, width: int) -> Projection:
        """Read the weight from a GEM's directory; ValueError if it is missing, damaged or not [dim, width]."""
        path = directory / PROJECTION_FILE
        try:
            weight_PD = load_file(path)[_KEY]
        except Exception as error:
            raise ValueError(f"{path} is missing or damaged: restore it or train again") from error
        if tuple(weight_PD.shape) != (dim, width):
            raise ValueError(f"{path} maps {tuple(weight_PD.shape)[::-1]}, the configuration says {(width, dim)}")
        return Projection(weight_PD)


@torch.no_grad()
def ridge(states_ND: Tensor, targets_NP: Tensor, *, penalty: float = 1e-3) -> Tensor:
    """Return the weight [P, D] that maps states to targets with least squared error (ridge regression, no intercept).

    Args:
        states_ND: Pooled states of N texts; their lengths do not count.
        targets_NP: Their vectors in the other space.
        penalty: Weight of the squared norm, relative to the mean squared length of a state.
    """
    x_ND, y_NP = nn.functional.normalize(states_ND.double(), dim=-1), targets_NP.double()
    gram_DD = x_ND.T @ x_ND
    gram_DD += torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device) * penalty * gram_DD.diagonal().mean()
    return torch.linalg.solve(gram_DD, x_ND.T @ y_NP).T.float()
