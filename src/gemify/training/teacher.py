"""A teacher: an embedding model whose vectors a GEM learns to give (knowledge distillation).

Each text's vector is computed once and kept in the cache (`gemify.model.gguf_cache`), in ``teacher/<hash of the
model>/``: ``keys.bin`` (a 64-bit hash of each text) and ``vectors.bin`` (float16, memory-mapped).
Both only grow, keys after vectors: a killed run loses nothing, and runs over the same texts share them.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemify.io.tables import first_line
from gemify.model.gem import GemModel
from gemify.model.gguf_cache import cache_directory
from gemify.model.projection import Projection, ridge
from gemify.paper.objectives import cosine_loss, matryoshka_loss, similarity_loss
from gemify.paper.views import View
from gemify.training.distributed import gather, world_size
from gemify.training.recipe import Recipe

_BLOCK, _GPU_BLOCK = 256, 8192
"""Texts between two saves."""
_BATCH_SIZE, _GPU_BATCH_SIZE = 64, 512
"""Texts of a forward pass."""
_KEY_BYTES = 8


class Distillation(nn.Module):
    """The losses of learning from a teacher, through a linear map into its space.

    Args:
        projection: The map.
        recipe: Weights of the losses, and whether the map stays: then its outputs are the GEM's vectors.
    """

    def __init__(self, projection: Projection, recipe: Recipe) -> None:
        super().__init__()
        self.projection, self.keep = projection, recipe.projection == "keep"
        self.cosine_weight, self.similarity_weight = recipe.cosine_weight, recipe.similarity_weight
        self.contrastive_weight, self.matryoshka_dims = recipe.contrastive_weight, recipe.matryoshka_dims

    @torch.no_grad()
    def fit(self, embed: Callable[[list[View]], Tensor], samples: Iterable[tuple[list[View], np.ndarray]]) -> None:
        """Start the map from ridge regression.

        Args:
            embed: Gives the pooled states [N, D] of views.
            samples: Blocks of texts and the teacher's vectors [N, P] of them.
        """
        states, targets = zip(*((embed(views).cpu(), torch.from_numpy(t)) for views, t in samples), strict=True)
        self.projection.weight_PD.copy_(ridge(torch.cat(states), torch.cat(targets)))

    def forward(
        self,
        states_ND: Tensor,
        targets: Sequence[np.ndarray],
        *,
        own: int,
        total: int | None,
        keys_BK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the GEM's vectors [N, D] or [N, P], and the weighted loss.

        Args:
            states_ND: Pooled states of this process's texts.
            targets: The teacher's vectors [texts, P] of each row, in the same order.
            own: How many of the first rows count (`gemify.training.distributed.RankShard`).
            total: Rows of all processes together. None: those here.
            keys_BK: `MicroBatch.keys` of all rows: a text is not compared with its equals.
        """
        width, total = len(targets[0]), total or len(targets)
        targets_NP = torch.as_tensor(np.concatenate(targets), device=states_ND.device)
        projected_NP = self.projection(states_ND)
        vectors_ND = projected_NP if self.keep else states_ND
        cosine = cosine_loss(projected_NP[: own * width], targets_NP[: own * width])
        loss = self.cosine_weight * cosine * (own * world_size() / total)
        if self.similarity_weight:

            def whole(own_NP: Tensor) -> Tensor:
                return gather(own_NP.view(len(targets), width, -1), total).flatten(0, 1)

            excluded_NN = None
            if keys_BK is not None:
                keys_N = keys_BK[:, 1 : 1 + width].flatten()
                excluded_NN = (keys_N[:, None] == keys_N) | (keys_N < 0)
            all_ND, all_NP = whole(vectors_ND), whole(targets_NP)

            def cut(dim: int) -> Tensor:
                return similarity_loss(all_ND[:, :dim], all_NP, excluded_NN=excluded_NN)

            divergence = matryoshka_loss(cut, self.matryoshka_dims, all_ND.shape[-1])
            loss = loss + self.similarity_weight * divergence
        return vectors_ND, loss


class Teacher:
    """An embedding model as a function from texts to unit vectors, with its cache.

    Args:
        name: ``st:`` and a sentence-transformers model's directory or Hugging Face repo id, or a GEM's name.
        device: Where the teacher runs. None: the accelerator if there is one.

    Attributes:
        dim: Numbers of a vector.
        prompts: Its prompts by name.

    Raises:
        ValueError: The model cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None) -> None:
        self.name, self._device = name, device
        self._model = _load(name, device)
        of_gem = isinstance(self._model, GemModel)
        self.prompts: dict[str, str] = dict(self._model.config.prompts if of_gem else self._model.prompts)
        self.dim: int = self._model.encode("a text").shape[0]
        self.directory = cache_directory().parent / "teacher" / _fingerprint(self._model)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keys: dict[bytes, int] = {}
        self._read_keys()

    def vectors(self, texts: Sequence[str], *, prompt: str = "") -> np.ndarray:
        """Return the unit vectors [N, P] in float32 of N texts; unknown ones are computed and kept.

        Args:
            texts: The texts.
            prompt: Words before each of them.
        """
        before = f"{prompt}\0" if prompt else ""
        keys = [
            hashlib.blake2b((before + text).encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
            for text in texts
        ]
        if any(key not in self._keys for key in keys):
            with self._lock():
                self._read_keys()  # another process may have computed them since
                missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._keys}
                self._append(missing, prompt)
        rows = [self._keys[key] for key in keys]
        table_NP = np.memmap(self.directory / "vectors.bin", dtype=np.float16, mode="r").reshape(-1, self.dim)
        return table_NP[rows].astype(np.float32)

    def _append(self, texts: dict[bytes, str], prompt: str) -> None:
        waiting = list(texts.items())
        on_cpu = self._model.device.type == "cpu"
        block, batch_size = (_BLOCK, _BATCH_SIZE) if on_cpu else (_GPU_BLOCK, _GPU_BATCH_SIZE)
        for at in range(0, len(waiting), block):
            some = waiting[at : at + block]
            vectors_NP = self._model.encode(
                [text for _, text in some],
                prompt=prompt or None,  # None: the model's default prompt
                batch_size=batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            with (self.directory / "vectors.bin").open("r+b" if self._keys else "wb") as file:
                file.truncate(len(self._keys) * self.dim * 2)  # what a killed process wrote without its keys
                file.seek(0, 2)
                file.write(vectors_NP.astype(np.float16).tobytes())
            with (self.directory / "keys.bin").open("r+b" if self._keys else "wb") as file:
                file.truncate(len(self._keys) * _KEY_BYTES)
                file.seek(0, 2)
                file.write(b"".join(key for key, _ in some))
            for key, _ in some:
                self._keys[key] = len(self._keys)

    def _read_keys(self) -> None:
        """Read the keys whose vectors are there: a killed process may have left a part of either file."""
        keys, vectors = self.directory / "keys.bin", self.directory / "vectors.bin"
        content = keys.read_bytes() if keys.is_file() and vectors.is_file() else b""
        rows = vectors.stat().st_size // (self.dim * 2) if content else 0
        count = min(len(content) // _KEY_BYTES, rows)
        self._keys = {content[n * _KEY_BYTES : (n + 1) * _KEY_BYTES]: n for n in range(count)}

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _load(name: str, device: str | None) -> Any:
    kind, _, path = name.partition(":")
    try:
        if kind != "st":
            return GemModel.from_pretrained(name, device=device)
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(path, device=device)
    except ModuleNotFoundError:  # the command names the extra
        raise
    except Exception as error:
        wanted = "" if kind == "st" else " (write st:PATH or st:NAME for a sentence-transformers model)"
        raise ValueError(f"cannot load the teacher {name}: {first_line(error)}{wanted}") from error


def _fingerprint(model: Any) -> str:
    """A short hash of the teacher's weights and maximum length, which shape its vectors."""
    digest = hashlib.sha256(f"{model.max_seq_length}".encode())
    if isinstance(model, GemModel):
        digest.update(repr(model.config).encode())  # the hash of the base's weights among it
        state = model.adapter.state() if model.adapter is not None else {}
        state |= model.projection.state_dict() if model.projection is not None else {}
        state |= {} if model.config.frozen_base else model.lm.state_dict()
    else:
        state = model.state_dict()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().float().cpu().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(flat[:: max(1, flat.numel() // 1024)][:1024].numpy().tobytes())
    return digest.hexdigest()[:16]
