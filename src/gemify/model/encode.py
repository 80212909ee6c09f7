"""Texts to vectors: tokenise, run in length-sorted batches, pool; what that costs; compiled layers.

Layers are compiled for `encode` alone: generation runs the very code that the base model runs. Between its matrix
products a layer does a dozen small operations (norms, rotations, activations). Each reads and writes
all of its input; compiled, they are fused into a few. All layers are alike, so one is compiled and the others reuse it.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from gemify.model.adapter import current_gate, with_gate
from gemify.model.config import GemConfig, pool_hidden_states, require_finite
from gemify.model.early_exit import early_exit, layers_of
from gemify.model.forward import MaskedBatch, embedding_pass, length_groups
from gemify.model.projection import Projection
from gemify.model.tokenization import TextTokenizer, Truncate
from gemify.paper.tokens import Row, build_inputs

POOL_SIZE = 4096  # texts tokenised and sorted at a time


def encode_ids(
    lm: PreTrainedModel, config: GemConfig, rows: Sequence[Sequence[int]], projection: Projection | None = None
) -> Tensor:
    """Embed tokenised texts in one forward pass, without the output head and the layers above ``config.layer``.

    Args:
        lm: The model.
        config: The GEM's configuration.
        rows: Token ids of each text, without special tokens.
        projection: Maps the pooled states, if the configuration says so.

    Returns:
        float32 vectors [B, D] ([B, K * D] with ``concat``, [B, P] with a projection) on the model's device.
    """
    return encode_batch(lm, config, embedding_batch(config, rows, device=lm.device), projection)[0]


def embedding_batch(
    config: GemConfig, rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> MaskedBatch:
    """Return tokenised texts as one batch, the special tokens behind each."""
    inputs = [
        build_inputs(Row("split", tuple(r)), config.special_ids, shared_position=config.shared_position) for r in rows
    ]
    return MaskedBatch.of(inputs, shared_position=config.shared_position, device=device)


def encode_batch(
    lm: PreTrainedModel, config: GemConfig, batch: MaskedBatch, projection: Projection | None = None
) -> tuple[Tensor, Tensor]:
    """Embed a batch in one forward pass: see `encode_ids`.

    Returns:
        float32 vectors [B, D], and the hidden states [B, T, D] they are pooled from.
    """
    if not batch.ids_BT.numel():  # texts without tokens, and no special tokens either: nothing to run
        hidden_BTD = torch.zeros(*batch.ids_BT.shape, lm.config.get_text_config().hidden_size, device=lm.device)
        width = config.projection_dim or hidden_BTD.shape[-1]
        return torch.zeros(len(hidden_BTD), width, device=lm.device), hidden_BTD
    with early_exit(lm, config.layer):
        hidden_BTD = embedding_pass(lm, batch, config)
    states_BD = pool_hidden_states(hidden_BTD, batch.segments_BT, config.pooling).float()
    return (states_BD if projection is None else projection(states_BD)), hidden_BTD


def default_batch_tokens(device: torch.device) -> int:
    """Return how many tokens a batch should have. A CPU is fastest while a layer's states fit its cache."""
    return 1024 if device.type == "cpu" else 8192


@torch.inference_mode()
def encode_texts(
    lm: PreTrainedModel,
    tokenize: TextTokenizer,
    config: GemConfig,
    texts: Sequence[str],
    *,
    projection: Projection | None = None,
    batch_size: int,
    max_tokens: int | None = None,
    show_progress_bar: bool,
    meter: ThroughputMeter,
    truncate: Truncate = "end",
    prompt: str = "",
) -> Tensor:
    """Embed texts.

    Texts are sorted by length within pools of some thousands. A text that occurs twice in a pool is computed once. The
    next pool is tokenised while one is computed.

    Args:
        lm: The model.
        tokenize: The GEM's text tokenizer.
        config: The GEM's configuration.
        texts: N texts, at least one.
        projection: Maps the pooled states, if the configuration says so.
        batch_size: Most texts of a batch.
        max_tokens: Most tokens of a batch, padding included. None: what suits the device.
        show_progress_bar: Show a progress bar on stderr.
        meter: Where to count.
        truncate: What becomes of a text that is too long.
        prompt: What stands before every text.

    Returns:
        float32 vectors [N, D] on the CPU, in the order of the texts.

    Raises:
        ValueError: A text is too long, and ``truncate`` is ``error``.
        FloatingPointError: A vector is not finite.
    """
    batch_tokens = max_tokens or default_batch_tokens(lm.device)
    out: Tensor | None = None
    bar = tqdm(total=len(texts), desc="encode", unit="text", disable=not show_progress_bar)
    pools = [list(texts[start : start + POOL_SIZE]) for start in range(0, len(texts), POOL_SIZE)]
    split = partial(tokenize.split, max_tokens=config.max_text_tokens, truncate=truncate, prompt=prompt)
    with contextlib.closing(_tokenised(split, pools)) as tokenised:
        for number, (pool, (rows, long)) in enumerate(zip(pools, tokenised, strict=True)):
            place = {text: i for i, text in enumerate(rows)}
            parts = [part for some in rows.values() for part in some]
            run = functools.partial(encode_ids, lm, config, projection=projection)
            vectors = _encode_rows(run, config.k, parts, batch_size, batch_tokens, meter, bar)
            vectors = mean_of_parts(vectors, list(rows.values()), overhead=tokenize.overhead)
            meter.long_texts += sum(text in long for text in pool)
            bar.update(len(pool) - len(parts))
            if out is None:
                out = torch.empty(len(texts), vectors.shape[1])
            out[number * POOL_SIZE : number * POOL_SIZE + len(pool)] = vectors[[place[t] for t in pool]]
    bar.close()
    assert out is not None
    return out


def mean_of_parts(vectors_PD: Tensor, parts: Sequence[Sequence[Sequence[int]]], *, overhead: int) -> Tensor:
    """Give each text the mean of its parts' vectors, weighted by their tokens.

    Args:
        vectors_PD: Vectors of all parts, one text after the other.
        parts: Token ids of each text's parts.
        overhead: How many of a part's tokens are not the text's (`TextTokenizer.overhead`).

    Returns:
        [N, D]. A text of one part keeps its vector to the bit.
    """
    if len(vectors_PD) == len(parts):
        return vectors_PD
    rows, at = [], 0
    for some in parts:
        weights_P = torch.tensor([float(len(part) - overhead) for part in some]).to(vectors_PD)
        mean_D = (vectors_PD[at : at + len(some)] * (weights_P / weights_P.sum())[:, None]).sum(0)
        rows.append(vectors_PD[at] if len(some) == 1 else mean_D)
        at += len(some)
    return torch.stack(rows)


def _tokenised(
    split: Callable[[Sequence[str]], tuple[list[list[list[int]]], list[bool]]], pools: Sequence[Sequence[str]]
) -> Generator[tuple[dict[str, list[list[int]]], set[str]], None, None]:
    """The rows of every pool's distinct texts, and the long ones. A pool is tokenised while another is computed."""

    def ids(pool: Sequence[str]) -> tuple[dict[str, list[list[int]]], set[str]]:
        distinct = list(dict.fromkeys(pool))
        rows, long = split(distinct)
        return dict(zip(distinct, rows, strict=True)), {t for t, is_long in zip(distinct, long, strict=True) if is_long}

    if len(pools) == 1:  # a thread would only be waited for
        yield ids(pools[0])
        return
    with ThreadPoolExecutor(1, "gemify-tokenise") as thread:
        coming = thread.submit(ids, pools[0])
        for following in [*pools[1:], None]:
            ready = coming.result()
            if following is not None:
                coming = thread.submit(ids, following)
            yield ready


def _encode_rows(
    encode: Callable[[list[Sequence[int]]], Tensor],
    k: int,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    max_tokens: int,
    meter: ThroughputMeter,
    bar: tqdm[Any],
) -> Tensor:
    """Vectors [N, D] of tokenised texts, in batches of like length."""
    vectors: Tensor | None = None
    for group in length_groups([len(r) + k for r in rows], max_tokens=max_tokens):
        for first in range(0, len(group), batch_size):
            some = group[first : first + batch_size]
            got_BD = require_finite(encode([rows[i] for i in some]).cpu())
            if vectors is None:
                vectors = torch.empty(len(rows), got_BD.shape[1])
            vectors[some] = got_BD
            lengths = [len(rows[i]) + k for i in some]
            computed = len(some) * max(lengths)
            meter.tokens += computed
            meter.padding += computed - sum(lengths)
            meter.texts += len(some)
            bar.update(len(some))
    assert vectors is not None
    return vectors


COMPILE_OPTIONS: dict[str, Any] = {"dynamic": True}
"""Options of `torch.compile`: one graph for batches of any shape."""

_compiled: ContextVar[bool] = ContextVar("gemify_compiled", default=False)


@contextlib.contextmanager
def compile_layers(lm: PreTrainedModel) -> Iterator[None]:
    """Run the decoder's layers compiled inside this context, in this thread. The first passes compile them."""
    for layer in layers_of(lm):
        if not hasattr(layer.forward, "gemify_plain"):
            layer.forward = _switchable(layer.forward)
    token = _compiled.set(True)
    try:
        yield
    finally:
        _compiled.reset(token)


def _switchable(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(with_gate(plain), **COMPILE_OPTIONS)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(current_gate(), *args, **kwargs) if _compiled.get() else plain(*args, **kwargs)

    forward.gemify_plain = plain  # type: ignore[attr-defined]
    return forward


def peak_memory_bytes() -> int:
    """Return the peak memory of this process in bytes: device memory on an accelerator, else resident memory."""
    if torch.cuda.is_available() and (used := int(torch.cuda.max_memory_allocated())):
        return used
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class ThroughputMeter:
    """Counts tokens from its construction on."""

    tokens: int = 0
    """Tokens computed, padding included."""
    padding: int = 0
    """How many of them were padding."""
    texts: int = 0
    long_texts: int = 0
    """How many were longer than the model embeds."""
    started: float = field(default_factory=time.perf_counter)
    """When it was made, in seconds of `time.perf_counter`."""

    def report(self) -> dict[str, Any]:
        """Return the counts and the speed as plain numbers: see `throughput`."""
        seconds = time.perf_counter() - self.started
        return {"texts": self.texts, **throughput(self.tokens, self.padding, seconds)}


def throughput(tokens: int, padding: int, seconds: float) -> dict[str, Any]:
    """Compute the speed of a piece of work.

    Args:
        tokens: Tokens computed, padding included.
        padding: How many of them were padding.
        seconds: How long it took.

    Returns:
        tokens (without padding), seconds, tokens_per_second, padding (a share of all tokens) and peak_memory_mb.
    """
    return {
        "tokens": tokens - padding,
        "seconds": round(seconds, 3),
        "tokens_per_second": round((tokens - padding) / max(seconds, 1e-9), 1),
        "padding": round(padding / max(1, tokens), 4),
        "peak_memory_mb": round(peak_memory_bytes() / 2**20, 1),
    }


def format_summary(report: dict[str, Any]) -> str:
    """Return a report of `throughput` as one line for people."""
    return (
        f"{report['tokens']:,} tokens in {report['seconds']:.1f} s ({report['tokens_per_second']:,.0f} tokens/s,"
        f" padding {report['padding']:.1%}), peak memory {report['peak_memory_mb']:,.0f} MB"
    )
