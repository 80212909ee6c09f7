"""Shared by the LangChain and LlamaIndex classes: one loaded model behind all of them, and its settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn, Self

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from gemify.model.gem import GemModel

SharedGem = Annotated[SkipJsonSchema[GemModel], Field(exclude=True, repr=False)]
"""A pydantic field for the model: no part of what is printed, dumped or logged."""


class SharesModel:
    """Copies of an object share its loaded model; to another process it does not go."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return copy.copy(self)

    def __getstate__(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} holds a loaded model and cannot be pickled: use threads, or load the model in the"
            " other process"
        )


def embed(gem: GemModel, texts: Sequence[str], *, query: bool = False, **options: Any) -> list[list[float]]:
    """Vectors of texts as lists, from `GemModel.encode_query` or `encode_document`."""
    with gem.lock:
        vectors: list[list[float]] = (gem.encode_query if query else gem.encode_document)(
            list(texts), **options
        ).tolist()
    return vectors


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of `generate`: temperature 0 is greedy; with neither given, the base model's own settings hold."""
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}: 0 always takes the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie above 0 and at most at 1, got {top_p}")
    if temperature == 0:
        return {"do_sample": False}
    given = {name: v for name, v in (("temperature", temperature), ("top_p", top_p)) if v is not None}
    return {"do_sample": True, **given} if given else {}


def joined_text(blocks: Sequence[Any], *, role: str) -> str:
    """The text of content that is a list of blocks, in either framework's form."""
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
