"""The embedding half of `GemModel`, as transformers' `GenerationMixin` is the generating half of a language model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gemify.model.adapter import Adapter
from gemify.model.base import max_positions
from gemify.model.config import GemConfig
from gemify.model.encode import ThroughputMeter, compile_layers, encode_texts
from gemify.model.projection import Projection
from gemify.model.tokenization import TextTokenizer, Truncate, require_truncate

logger = logging.getLogger(__name__)
Texts = str | Sequence[str]
Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
"""One embedding, [D]."""
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""Embeddings of N texts, [N, D]."""


Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
"""Type of a vector's numbers, as sentence-transformers' ``quantize_embeddings`` makes them. The last two keep the signs
alone, eight to a byte."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class EncodeOptions(TypedDict, total=False):
    """Options of `GemModel.encode` that do not change the type of its result."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int
    max_tokens: int | None
    compile: bool
    show_progress_bar: bool
    normalize_embeddings: bool
    truncate_dim: int | None
    truncate: Truncate
    output_value: str
    device: torch.device | str | None


class EmbeddingMixin:
    """Texts to vectors, in sentence-transformers' names. The class that uses it has the attributes named here."""

    lm: PreTrainedModel
    config: GemConfig
    adapter: Adapter | None
    projection: Projection | None
    text_tokenizer: TextTokenizer
    meter: ThroughputMeter

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text that are read, template and special tokens not counted. Set it to read longer texts.

        Raises:
            ValueError: (when set) less than 1, or more than the base has positions for.
        """
        return self.config.max_text_tokens - len(self.text_tokenizer.prefix_ids) - len(self.text_tokenizer.suffix_ids)

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        _require_whole("max_seq_length", tokens)
        self.set_max_length(tokens + self.config.max_length - self.max_seq_length)

    def set_max_length(self, max_length: int) -> None:
        """Set the most tokens of a text, template and special tokens included. It may exceed what was trained.

        Raises:
            ValueError: No text fits, or the base has fewer positions.
        """
        _require_whole("max_length", max_length)
        limit = max_positions(self.lm)
        least = self.config.max_length - self.max_seq_length + len(self.text_tokenizer.bos_ids) + 1
        if max_length < least or (limit is not None and max_length > limit):
            raise ValueError(f"max_length must lie in {least}..{limit or 'any number'}, got {max_length}")
        self.config = replace(self.config, max_length=max_length)

    def get_embedding_dim(self) -> int:
        """Return D, the length of the vectors."""
        if self.config.projection_dim is not None:
            return self.config.projection_dim
        width = int(self.lm.config.get_text_config().hidden_size)
        return width * (self.config.k if self.config.pooling == "concat" else 1)

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self, inputs: str, *, convert_to_tensor: Literal[False] = False, **options: Unpack[EncodeOptions]
    ) -> Vector: ...
    @overload
    def encode(
        self, inputs: Sequence[str], *, convert_to_tensor: Literal[False] = False, **options: Unpack[EncodeOptions]
    ) -> Matrix: ...
    @overload
    def encode(
        self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...
    @overload
    def encode(
        self,
        inputs: Texts,
        *,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
        precision: Precision = "float32",
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray | Tensor | list[Tensor]: ...
    def encode(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        max_tokens: int | None = None,
        compile: bool = False,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        precision: Precision = "float32",
        output_value: str = "sentence_embedding",
        device: torch.device | str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncate: Truncate = "end",
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Embed texts (GEM, Section 3.1), with sentence-transformers' names and defaults.

        Args:
            inputs: One text, or several.
            prompt_name: Name of a prompt in ``config.prompts`` to put before every text.
            prompt: The prompt itself.
            batch_size: Most texts of a batch.
            max_tokens: Most tokens of a batch, padding included. None: what suits the device.
            compile: Compile the layers at the first call, for encoding alone (`gemify.model.encode`).
            show_progress_bar: Show a progress bar on stderr.
            convert_to_numpy: Return a NumPy array. Off, without ``convert_to_tensor``: a list of tensors.
            convert_to_tensor: Return a tensor on the CPU instead.
            precision: See `Precision`. The integers' range is that of these very texts.
            output_value: ``sentence_embedding``.
            device: Move the model there first. None: it stays where it is.
            normalize_embeddings: Scale vectors to length 1.
            truncate_dim: Keep only the first dimensions.
            truncate: What becomes of a text longer than `max_seq_length`: ``end`` cuts it there, ``start`` keeps its
                end, ``mean`` averages the vectors of its parts, weighted by their tokens, ``error`` refuses it. What is
                cut is counted in one warning.

        Returns:
            Vectors: [D] for one text, [N, D] for N texts, in their order. ``meter`` has the counts and the speed.

        Raises:
            ValueError: A text is no string or too long, the prompt is unknown, or a number is out of its range.
            FloatingPointError: A vector is not finite, as where float16 overflows.
        """
        single = isinstance(inputs, str)
        texts = [inputs] if isinstance(inputs, str) else list(_require_several(inputs))
        require_texts(texts)
        _require_output(output_value, precision)
        require_truncate(truncate)
        self._require_numbers(batch_size, max_tokens, truncate_dim)
        prompt_text = self.config.resolve_prompt(prompt_name, prompt)
        self._move_to(device)
        self.meter = ThroughputMeter()
        vectors_ND = torch.empty(0, self.get_embedding_dim())
        if texts:
            self.lm.eval()
            with compile_layers(self.lm) if compile else contextlib.nullcontext():
                vectors_ND = encode_texts(
                    self.lm,
                    self.text_tokenizer,
                    self.config,
                    texts,
                    projection=self.projection,
                    batch_size=batch_size,
                    max_tokens=max_tokens,
                    show_progress_bar=show_progress_bar,
                    meter=self.meter,
                    truncate=truncate,
                    prompt=prompt_text,
                )
            self._warn_of_cut_texts(len(texts), truncate)
        vectors_ND = vectors_ND[:, :truncate_dim]
        vectors_ND = _quantize(F.normalize(vectors_ND, dim=-1) if normalize_embeddings else vectors_ND, precision)
        if not convert_to_tensor and not convert_to_numpy and not single:
            return list(vectors_ND)
        result = vectors_ND[0] if single else vectors_ND
        return result.numpy() if convert_to_numpy and not convert_to_tensor else result

    def _require_numbers(self, batch_size: int, max_tokens: int | None, truncate_dim: int | None) -> None:
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.get_embedding_dim():
            raise ValueError(f"truncate_dim must lie in 1..{self.get_embedding_dim()}, got {truncate_dim}")

    def _move_to(self, device: torch.device | str | None) -> None:
        if device is None:
            return
        if not isinstance(device, (str, torch.device)):
            raise ValueError(
                f"device must name one device, got {device!r}: for several, SentenceTransformer(modules=[Gem(gem)])"
                " of gemify.integrations.sentence_transformers starts a process for each"
            )
        for part in (self.lm, self.adapter, self.projection):
            if part is not None:
                part.to(device)

    def _warn_of_cut_texts(self, texts: int, truncate: Truncate) -> None:
        if self.meter.long_texts and truncate in ("end", "start"):
            logger.warning(
                "%s of %s texts were longer than the %s tokens that this model embeds: cut at the %s (truncate=mean"
                " embeds all of a text)",
                f"{self.meter.long_texts:,}",
                f"{texts:,}",
                f"{self.max_seq_length:,}",
                truncate,
            )

    @overload
    def encode_query(self, inputs: str, *, convert_to_tensor: Literal[False] = False, **options: Any) -> Vector: ...
    @overload
    def encode_query(
        self, inputs: Sequence[str], *, convert_to_tensor: Literal[False] = False, **options: Any
    ) -> Matrix: ...
    @overload
    def encode_query(self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Any) -> Tensor: ...
    def encode_query(self, inputs: Texts, **options: Any) -> np.ndarray | Tensor:
        """Embed queries: `encode` with the prompt named ``query``, if the model has one.

        Args:
            inputs: One text, or several.
            options: Those of `encode`. A prompt given here replaces the one named ``query``.

        Returns:
            float32 vectors: [D] for one text, [N, D] for N texts.
        """
        return self._encode_with_prompt("query", inputs, options)

    @overload
    def encode_document(self, inputs: str, *, convert_to_tensor: Literal[False] = False, **options: Any) -> Vector: ...
    @overload
    def encode_document(
        self, inputs: Sequence[str], *, convert_to_tensor: Literal[False] = False, **options: Any
    ) -> Matrix: ...
    @overload
    def encode_document(self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Any) -> Tensor: ...
    def encode_document(self, inputs: Texts, **options: Any) -> np.ndarray | Tensor:
        """Embed documents: `encode` with the prompt named ``document``, if the model has one.

        Args:
            inputs: One text, or several.
            options: Those of `encode`. A prompt given here replaces the one named ``document``.

        Returns:
            float32 vectors: [D] for one text, [N, D] for N texts.
        """
        return self._encode_with_prompt("document", inputs, options)

    def _encode_with_prompt(self, name: str, inputs: Texts, options: dict[str, Any]) -> Any:
        if name in self.config.prompts and "prompt" not in options and "prompt_name" not in options:
            options = {**options, "prompt_name": name}
        return self.encode(inputs, **options)

    @staticmethod
    def similarity(embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Return cosine similarities of every vector of the first argument with every vector of the second.

        Args:
            embeddings1: [N, D], or [D].
            embeddings2: [M, D], or [D].

        Returns:
            [N, M] in float32.
        """
        a, b = (F.normalize(_as_matrix(e), dim=-1) for e in (embeddings1, embeddings2))
        return a @ b.T

    @staticmethod
    def similarity_pairwise(embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Return cosine similarities of the vectors with equal index: [N, D] and [N, D] give [N]."""
        a, b = (_as_matrix(e) for e in (embeddings1, embeddings2))
        return F.cosine_similarity(a, b, dim=-1)


def _as_matrix(vectors: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(vectors).float().reshape(-1, np.shape(vectors)[-1])


def require_texts(texts: Sequence[Any]) -> None:
    """Raise ValueError for an item that is no string."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts must be strings, item {index} is a {type(text).__name__}")


def _require_output(output_value: str, precision: str) -> None:
    if output_value != "sentence_embedding":
        raise ValueError(
            f"output_value must be 'sentence_embedding', got {output_value!r}: for tokens' states take"
            " SentenceTransformer(modules=[Gem(gem)]) of gemify.integrations.sentence_transformers"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")


def _quantize(vectors_ND: Tensor, precision: Precision) -> Tensor:
    if precision == "float32" or not len(vectors_ND):
        return vectors_ND
    try:
        from sentence_transformers.util import quantize_embeddings
    except ModuleNotFoundError as error:
        raise ValueError(
            f"precision {precision} needs sentence-transformers: pip install 'gemify[sentence-transformers]'"
        ) from error
    return torch.from_numpy(quantize_embeddings(vectors_ND.numpy(), precision=precision))


def _require_several(inputs: Any) -> Any:
    if not hasattr(inputs, "__iter__") or isinstance(inputs, bytes):
        raise ValueError(f"inputs must be a text or several texts, got {type(inputs).__name__}")
    return inputs


def _require_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
