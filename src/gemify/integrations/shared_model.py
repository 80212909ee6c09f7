"""Shared by the LangChain and LlamaIndex classes: one loaded model behind all of them, and its settings."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn, Self

from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema

from gemify.model.gem import GemModel

SharedGem = Annotated[SkipJsonSchema[GemModel], Field(exclude=True, repr=False)]
"""A pydantic field for the model, left out of what is printed, dumped or logged."""


class SharedModelMixin:
    """Copies of an object share its loaded model. It cannot be pickled for another process."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return copy.copy(self)

    def __getstate__(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} holds a loaded model and cannot be pickled: use threads, or load the model in the"
            " other process"
        )


class GenerationSettings(BaseModel):
    """Settings of generation that both frameworks' classes have. Each can also be given for one call."""

    temperature: float | None = None
    """0: always the likeliest token. None: as the base model's generation settings say."""
    top_p: float | None = None
    """Nucleus sampling, in (0, 1]. None: as the base model's generation settings say."""
    max_tokens: int = 256
    """Most tokens of an answer."""
    stop: list[str] | None = None
    """An answer ends before the first of these strings."""
    seed: int | None = None
    """Seed of the sampling."""

    def stream_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options of `gemify.model.streaming.stream` for one call: these settings, and ``given`` ones in their place.

        Raises:
            ValueError: temperature or top_p is out of its range.
        """
        settings = {name: given.pop(name, getattr(self, name)) for name in GenerationSettings.model_fields}
        return {
            "max_new_tokens": settings["max_tokens"],
            "stop": settings["stop"],
            "seed": settings["seed"],
            **_sampling_options(settings["temperature"], settings["top_p"]),
            **given,
        }


def embed_texts(gem: GemModel, texts: Sequence[str], *, query: bool = False, **options: Any) -> list[list[float]]:
    """Embed texts, one caller at a time.

    Args:
        gem: The model.
        texts: N texts.
        query: Use `GemModel.encode_query`, else `encode_document`.
        options: Those of `GemModel.encode`.

    Returns:
        N vectors as lists.
    """
    with gem.lock:
        encode = gem.encode_query if query else gem.encode_document
        vectors: list[list[float]] = encode(list(texts), **options).tolist()
    return vectors


def search_index(index: Any, query: str, **options: Any) -> list[Any]:
    """Passages of an index (`gemify.retrieval.index.GemIndex`) for a query, one caller of its model at a time."""
    with getattr(getattr(index, "model", None), "lock", None) or contextlib.nullcontext():
        return list(index.search(query, **options))


def passage_metadata(passage: Any) -> dict[str, Any]:
    """A passage's own metadata, and where it stands."""
    return {**passage.to_json()["meta"], **{name: getattr(passage, name) for name in ("file", "title", "heading")}}


def _sampling_options(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of `generate`. Temperature 0 is greedy; with neither given, the base model's own settings hold."""
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}: 0 always takes the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie above 0 and at most at 1, got {top_p}")
    if temperature == 0:
        return {"do_sample": False}
    given = {name: v for name, v in (("temperature", temperature), ("top_p", top_p)) if v is not None}
    return {"do_sample": True, **given} if given else {}


def join_text_blocks(blocks: Sequence[Any], *, role: str) -> str:
    """Join the text of a message's content blocks, in either framework's form.

    Raises:
        ValueError: A block is not text.
    """
    texts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else getattr(block, "block_type", type(block).__name__)
        text = (
            block
            if isinstance(block, str)
            else block.get("text")
            if isinstance(block, Mapping)
            else getattr(block, "text", None)
        )
        if not isinstance(text, str) or (not isinstance(block, str) and kind != "text"):
            raise ValueError(
                f"this model reads text only, the {role} message has a block of type {kind!r}: leave it out"
            )
        texts.append(text)
    return "".join(texts)
