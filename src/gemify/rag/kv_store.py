"""Documents' KV caches on disk: safetensors files, read through a memory map, least recently used out first.

A file is named by a hash of what it was computed from: the model's fingerprint, the token ids and the bits. So a
file is never wrong, only missing; a damaged one is dropped and computed again. A kept KV gives its text away: it
deserves the same protection as the documents themselves.

Fewer bits: keys are scaled for each channel (their channels differ most), values for each token, in 8 or 4 bits with a
zero point; 4-bit numbers lie two to a byte.

`PassageCache` gives the KV of passages, computed or kept, for the position in a prompt where they are wanted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gemify.io.atomic import atomic_file
from gemify.io.tables import first_line, parse_bytes
from gemify.model.gem import GemModel
from gemify.model.kv_cache import CachedText, empty_text, from_key_values, key_values, new_full_cache, slice_key_values
from gemify.model.pretrained import cache_fingerprint
from gemify.model.rope_shift import shift_positions
from gemify.rag.prompt_cache import Ids, PromptRunner

logger = logging.getLogger(__name__)

Bits = Literal[32, 16, 8, 4]
_SUFFIX = ".kv.safetensors"


class KvStore:
    """A directory of KV caches. Several processes may share it.

    Args:
        directory: where they are; it need not exist.
        fingerprint: of the model's weights and precision (`gemify.model.pretrained.cache_fingerprint`); caches of
            others are never found.
        bits: of the kept values: 32, 16, 8 or 4. 16 is exact for models that run in 16 bits, 32 for those that run in
            float32.
        budget_bytes: most bytes of all files together. None: no limit.

    Raises:
        ValueError: other bits, no bytes, or a file in the directory's place.
    """

    def __init__(
        self, directory: str | Path, *, fingerprint: str, bits: int = 16, budget_bytes: int | None = None
    ) -> None:
        if bits not in get_args(Bits):
            raise ValueError(f"bits must be one of {', '.join(map(str, get_args(Bits)))}, got {bits}")
        if budget_bytes is not None and budget_bytes < 1:
            raise ValueError(f"budget_bytes must be at least 1, got {budget_bytes}")
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"cannot keep caches in {self.directory}: it is a file, give a directory")
        self.bits, self.budget_bytes, self.fingerprint = bits, budget_bytes, fingerprint
        self.hits, self.misses = 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def __len__(self) -> int:
        return len(self._files())

    def get(self, lm: PreTrainedModel, ids: Sequence[int], *, kind: str = "text") -> CachedText | None:
        """Return the KV of ``ids``, or None. A damaged file is removed, with a warning.

        Args:
            lm: the model whose KV it is.
            ids: the text's token ids.
            kind: as `put` was told.
        """
        path = self._path(ids, kind)
        try:
            with safe_open(str(path), framework="pt", device=str(lm.device)) as file:
                found = file.metadata()
                if found["name"] != path.name:
                    raise ValueError("it is another text's")
                layers = int(found["layers"])
                pairs = [
                    (_unpack(file, f"k{i}", self.bits, lm.dtype), _unpack(file, f"v{i}", self.bits, lm.dtype))
                    for i in range(layers)
                ]
            length = pairs[0][0].shape[-2]
            if kind == "text" and length != len(ids):
                raise ValueError(f"it holds {length} of {len(ids)} positions")
            cache = from_key_values(lm, pairs, into=new_full_cache(lm))
        except FileNotFoundError:
            self.misses += 1
            return None
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            logger.warning("dropped the damaged cache %s (%s): it is computed again", path, first_line(error))
            with contextlib.suppress(OSError):  # a read-only store keeps it
                path.unlink(missing_ok=True)
            self.misses += 1
            return None
        self.hits += 1
        _touch(path)
        return CachedText(cache, torch.ones(1, length, dtype=torch.bool, device=lm.device))

    def touch(self, ids: Sequence[int]) -> int:
        """Count a text's cache as used now, so that others are dropped before it. Gives its bytes, 0 where none is."""
        path = self._path(ids, "text")
        try:
            size = path.stat().st_size
        except OSError:
            return 0
        _touch(path)
        return size

    def put(self, ids: Sequence[int], cache: DynamicCache, *, kind: str = "text") -> int:
        """Keep the cache of one text, then drop the least recently used beyond the budget. Gives the bytes it takes.

        ``kind`` says what of ``ids`` the cache is of: the text itself, or its special tokens.
        """
        tensors: dict[str, Tensor] = {}
        pairs = key_values(cache)
        for i, (keys, values) in enumerate(pairs):
            if keys.shape[0] != 1:
                raise ValueError(f"the cache of one text is wanted, got keys of {tuple(keys.shape)}")
            tensors |= _pack(keys, f"k{i}", self.bits, over=-2) | _pack(values, f"v{i}", self.bits, over=-1)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.budget_bytes is not None and size > self.budget_bytes:
            logger.warning(
                "a cache of %s bytes is larger than the whole budget (%s): not kept", size, self.budget_bytes
            )
            return 0
        path = self._path(ids, kind)
        try:
            with atomic_file(path) as stage:
                save_file(tensors, stage, metadata={"layers": str(len(pairs)), "name": path.name})
                size = stage.stat().st_size
        except SafetensorError as error:  # what a full disk looks like through safetensors
            raise OSError(f"cannot write {path}: {error}") from error
        self._evict(path)
        return size

    def _path(self, ids: Sequence[int], kind: str) -> Path:
        text = f"{self.fingerprint}|{self.bits}|{kind}|{','.join(map(str, ids))}"
        return self.directory / (hashlib.sha256(text.encode()).hexdigest()[:40] + _SUFFIX)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Last use, size and path of what is kept."""
        found = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process dropped it
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _evict(self, newest: Path) -> None:
        if self.budget_bytes is None:
            return
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.budget_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # a read-only store keeps its order
        pass


def _pack(tensor: Tensor, name: str, bits: int, *, over: int) -> dict[str, Tensor]:
    """A tensor's parts under a name; scaled over the dimension ``over`` where bits are few."""
    tensor = tensor.detach().cpu()
    if bits == 32:
        return {name: tensor.float().contiguous()}
    if bits == 16:
        if tensor.dtype == torch.float32:
            tensor = tensor.to(torch.float16 if float(tensor.abs().amax()) < 6e4 else torch.bfloat16)
        return {name: tensor.contiguous()}
    wide = tensor.float()
    low, high = wide.amin(over, keepdim=True), wide.amax(over, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    whole = ((wide - low) / step).round_().to(torch.uint8)
    if bits == 4:
        whole = whole[..., 0::2] | (whole[..., 1::2] << 4)
    return {name: whole.contiguous(), f"{name}.low": low.contiguous(), f"{name}.step": step.contiguous()}


def _unpack(file: Any, name: str, bits: int, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if bits in (32, 16):
        return tensor.to(dtype)
    if bits == 4:
        tensor = torch.stack([tensor & 15, tensor >> 4], dim=-1).flatten(-2)
    return (tensor.float() * file.get_tensor(f"{name}.step") + file.get_tensor(f"{name}.low")).to(dtype)


def kv_store_factory(
    store: str, *, keep_kv: bool, bits: int, budget: str | None, directory: Path | None
) -> Callable[[GemModel], KvStore] | None:
    """Check the options of kept caches before a model is loaded.

    Args:
        store: the index whose passages they are: a directory or a URI.
        keep_kv: whether caches are kept at all.
        bits: of their values.
        budget: most bytes of all of them, such as 500MB. None: no limit.
        directory: where they are kept. None: ``kv`` in the store's directory.

    Returns:
        What opens the cache store for a model; None without ``keep_kv``.

    Raises:
        ValueError: options that do not fit together, or are none.
    """
    if not keep_kv:
        if budget is not None or directory is not None:
            raise ValueError("--kv-budget and --kv-store say where caches are kept: they need --keep-kv")
        return None
    if directory is None and "://" in store:
        raise ValueError(f"caches are kept on a local disk, and {store} is remote: give --kv-store DIR")
    target, budget_bytes = directory or Path(store) / "kv", parse_bytes(budget)
    KvStore(target, fingerprint="", bits=bits, budget_bytes=budget_bytes)

    def open_kv_store(gem: GemModel) -> KvStore:
        fingerprint = cache_fingerprint(gem.lm, gem.config, gem.adapter)
        return KvStore(target, fingerprint=fingerprint, bits=bits, budget_bytes=budget_bytes)

    return open_kv_store


class PassageCache:
    """KV of passages. A passage runs as the first one of a conversation.

    Args:
        runner: runs what is not kept.
        store: where KV is kept. None: it is computed each time.
        prefix_ids: what every conversation begins with.
        before_ids: what stands before the first passage: the prefix and its number.
    """

    def __init__(self, runner: PromptRunner, store: KvStore | None, prefix_ids: Ids, *, before_ids: Ids) -> None:
        self._runner, self._store = runner, store
        self.prefix_ids, self.before_ids = prefix_ids, before_ids
        self.computed = 0
        """Tokens run so far."""

    def get(self, ids: Ids) -> CachedText:
        """KV of the first tokens of a prompt, kept or computed; computed ones are kept."""
        kept = self._store.get(self._runner.gem.lm, ids) if self._store is not None else None
        if kept is None:
            kept = self._run(ids)
            self._put(ids, kept.cache)
        return kept

    def put(self, store: KvStore, ids: Ids) -> tuple[int, bool]:
        """Compute and keep the KV of a prompt's start, unless it is kept. Return its bytes, and whether it is new."""
        if size := store.touch(ids):
            return size, False
        size = store.put(ids, self._run(ids).cache)
        return size, size > 0

    def moved(self, passage: Ids, *, to: int, special: bool) -> tuple[Ids, DynamicCache]:
        """KV of a passage, or of its special tokens alone, as if it stood at position ``to``; with its ids."""
        gem = self._runner.gem
        if special:
            return tuple(gem.special_ids), shift_positions(gem.lm, self._special_tokens(passage), to - len(passage))
        before = len(self.before_ids)
        text = self.get(self.before_ids + passage)
        own = from_key_values(gem.lm, slice_key_values(text.cache, before, before + len(passage)))
        return passage, shift_positions(gem.lm, own, to - before)

    def _special_tokens(self, passage: Ids) -> DynamicCache:
        lm, store = self._runner.gem.lm, self._store
        kept = store.get(lm, passage, kind="special") if store is not None else None
        if kept is not None:
            return kept.cache
        cache = self._runner.run_special_tokens(self._run(passage))
        self._put(passage, cache, kind="special")
        return cache

    def _put(self, ids: Ids, cache: DynamicCache, *, kind: str = "text") -> None:
        """Keep KV for later questions; a full or read-only disk is no reason not to answer this one."""
        if self._store is not None:
            try:
                self._store.put(ids, cache, kind=kind)
            except OSError as error:
                logger.warning("a cache is not kept: %s", error)

    def _run(self, ids: Ids) -> CachedText:
        run = self._runner.run(ids, empty_text(self._runner.gem.lm))
        self.computed += run.computed
        return run.text
