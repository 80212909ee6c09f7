"""The GEM mask inside transformers: the only file that knows how transformers builds attention masks.

transformers builds every layer's mask through `AttentionMaskInterface`, by the name of the attention kernel. This file
wraps the built-in builders once, under their own names. Inside `gem_mask` the wrapper ANDs the GEM rule (paper/mask.py)
to the model's own mask (causal, sliding window, chunks, packing, padding). Outside it calls the built-in with the
arguments it got, so that a plain forward pass is unchanged.

Inside `bidirectional_mask` the wrapper makes the model's own mask symmetric: every token sees the whole text, or what
its sliding window or chunk reaches on both sides.

`require_maskable` refuses models that cannot carry the mask: flash-attention (its builder ignores mask functions) and
models with a recurrent or convolutional state (text reaches the suffix past any mask).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from gemify.paper.mask import may_attend
from gemify.paper.tokens import Segment

WRAPPED = ("sdpa", "eager", "flex_attention")


class MaskNotUsedError(RuntimeError):
    """A forward pass ran inside `gem_mask` but built no attention mask from it."""


class _Request:
    """One open `gem_mask`: the segments, and whether a layer's mask was built from them."""

    def __init__(self, segments_BT: Tensor, *, shared_position: bool) -> None:
        self.segments_BT = segments_BT
        self.anchor_BT = _anchors(segments_BT) if shared_position else None
        self.consumed = False


_open: ContextVar[_Request | None] = ContextVar("gemify_mask", default=None)
_bidirectional: ContextVar[list[bool] | None] = ContextVar("gemify_bidirectional_mask", default=None)
"""Inside `bidirectional_mask`: filled once a layer's mask was built."""


@contextlib.contextmanager
def gem_mask(segments_BT: Tensor, *, shared_position: bool = True) -> Iterator[None]:
    """Run forward passes under the GEM mask, inside this context and in this thread.

    Args:
        segments_BT: `Segment` codes of all positions that queries may look at, cached ones included.
        shared_position: Measure every special token's sliding window from the position of the first one.

    Raises:
        MaskNotUsedError: No mask was built from it: the pass ran in another thread, or with another attention kernel.
    """
    _install()
    request = _Request(segments_BT, shared_position=shared_position)
    token = _open.set(request)
    try:
        yield
    finally:
        _open.reset(token)
    if not request.consumed:
        raise MaskNotUsedError("the GEM mask reached no attention layer: use attn_implementation='sdpa' or 'eager'")


@contextlib.contextmanager
def bidirectional_mask() -> Iterator[None]:
    """Run forward passes over whole rows with bidirectional attention, inside this context and in this thread.

    Raises:
        MaskNotUsedError: No mask was built: the pass ran in another thread, or with another attention kernel.
    """
    _install()
    consumed: list[bool] = []
    token = _bidirectional.set(consumed)
    try:
        yield
    finally:
        _bidirectional.reset(token)
    if not consumed:
        raise MaskNotUsedError("no bidirectional mask was built: use attn_implementation='sdpa' or 'eager'")


def _symmetric(model_function: Callable[..., Any], local_size: int | None) -> Callable[..., Any]:
    """What one of two positions may see, both see: causal gives all, a window or a chunk both of its sides.

    transformers counts a window of n tokens as n - 1 to the left of a causal token, and as n on each side of a
    bidirectional one. So does this function, that a plain engine with ``is_causal: false`` gives the same vectors.
    """
    far, near = torch.tensor(local_size or 0), torch.tensor(1)
    window = local_size if local_size and bool(model_function(0, 0, far, near)) else None  # else chunks, or neither

    def function(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = model_function(batch, head, query, key) | model_function(batch, head, key, query)
        return seen if window is None else seen | ((query - key).abs() == window)

    return function


def _anchors(segments_BT: Tensor) -> Tensor:
    """For every position the one its sliding window is measured from: a run of special tokens has that of its first."""
    special_BT = segments_BT == Segment.SPECIAL
    position_BT = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    starts_BT = special_BT & ~torch.nn.functional.pad(special_BT, (1, 0))[:, :-1]
    run_start_BT = (position_BT * starts_BT).cummax(dim=1).values
    return torch.where(special_BT, run_start_BT, position_BT)


def _gem_function(model_function: Callable[..., Any], request: _Request, device: Any) -> Callable[..., Any]:
    segments_BT = request.segments_BT.to(device)
    anchor_BT = None if request.anchor_BT is None else request.anchor_BT.to(device)

    def function(batch: Any, head: Any, query: Any, key: Any) -> Any:
        if anchor_BT is None:
            seen = model_function(batch, head, query, key)
        else:
            seen = model_function(batch, head, anchor_BT[batch, query], key) | (query == key)
        return seen & may_attend(segments_BT[batch, query], segments_BT[batch, key], query, key)

    return function


def _wrap(build: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        request, bidirectional = _open.get(), _bidirectional.get()
        if request is not None:
            request.consumed = True
            kwargs["mask_function"] = _gem_function(kwargs["mask_function"], request, kwargs.get("device", "cpu"))
        elif bidirectional is not None:
            bidirectional.append(True)
            kwargs["mask_function"] = _symmetric(kwargs["mask_function"], kwargs.get("local_size"))
        else:
            return build(*args, **kwargs)
        kwargs["allow_is_causal_skip"] = False
        return build(*args, **kwargs)

    wrapped.gemify = True  # type: ignore[attr-defined]
    return wrapped


def _install() -> None:
    """Wrap the built-in builders once per process, and again if another package has replaced one."""
    for name in WRAPPED:
        build = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not getattr(build, "gemify", False):
            AttentionMaskInterface.register(name, _wrap(build))


def require_kernel(kernel: str | None) -> None:
    """Check an attention kernel's name.

    ValueError if it cannot carry the mask (flash-attention would stay plain causal).
    """
    if kernel is not None and kernel not in WRAPPED:
        raise ValueError(
            f"attention kernel {kernel!r} cannot carry the GEM mask: load the model with attn_implementation='sdpa'"
            f" (or one of {', '.join(WRAPPED)})"
        )


@torch.no_grad()
def require_maskable(lm: PreTrainedModel) -> None:
    """Try the mask on a model. Costs one forward pass over two rows of 12 tokens.

    In a row ``prefix S suffix`` whose special token is cut off from the prefix too, no suffix logit may change with the
    prefix. Attention-only models give a difference of exactly 0; a recurrent or convolutional state shows at once. No
    list of architectures is needed.

    Raises:
        ValueError: Text leaks past the mask, or the model builds no mask.
    """
    require_kernel(lm.config._attn_implementation)
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    base = torch.arange(12) * 7 % max(2, vocabulary - 16) + min(8, vocabulary // 2)
    ids_BT = torch.stack([base, base]).clamp_(max=vocabulary - 1)
    ids_BT[1, 1:6] = ids_BT[1, 1:6].flip(0)
    s, h, x = Segment.SPECIAL, Segment.HIDDEN, Segment.SUFFIX
    segments_BT = torch.tensor([[h] * 6 + [s] + [x] * 5] * 2)
    was_training = lm.training
    lm.eval()
    try:
        device = lm.device
        with gem_mask(segments_BT):
            logits_BTV = lm(
                input_ids=ids_BT.to(device), attention_mask=torch.ones_like(ids_BT).to(device), use_cache=False
            ).logits
    except MaskNotUsedError as error:
        raise ValueError(f"{type(lm).__name__} cannot be made a GEM: it builds no attention mask ({error})") from error
    finally:
        lm.train(was_training)
    leak = (logits_BTV[0, 7:].float() - logits_BTV[1, 7:].float()).abs().max().item()
    # The text decides how many tokens share a pass of a routed expert, and with it the last bit of a float32 product.
    single = logits_BTV.dtype == torch.float32
    rounding = 8 * torch.finfo(torch.float32).eps * logits_BTV.abs().max().item() if single else 0.0
    if not leak <= rounding:
        raise ValueError(
            f"{type(lm).__name__} cannot be made a GEM: text reaches past the attention mask (leak {leak:.1e}, must be"
            " 0), as in models with Mamba, convolution or linear-attention layers; choose an attention-only model"
        )
