"""The plugin of the command ``llm`` (``pip install 'gemify[llm]'``): chat and embeddings from one loaded GEM.

    llm -m gemify/starter "Say hello."
    llm embed -m gemify/starter -c "a text"

The GEMs that come with gemify are there by name. ``GEMIFY_LLM_MODELS`` names others: directories or repo ids, separated
by commas.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import llm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("llm is not installed: pip install 'gemify[llm]'", name=error.name) from error

from pydantic import Field

from gemify.model.config import SHIPPED

if TYPE_CHECKING:
    from gemify.model.gem import GemModel

MODELS_VARIABLE = "GEMIFY_LLM_MODELS"


@functools.cache
def load_gem(path: str) -> GemModel:
    """Load a GEM once: both of its sides share it. Nothing of PyTorch is imported before the first use."""
    from gemify.model.gem import GemModel

    return GemModel.from_pretrained(path)


def model_paths() -> dict[str, str]:
    """Return where each GEM is, by its model id in ``llm``: its last name, or its whole path where that is taken."""
    others = [path.strip() for path in os.environ.get(MODELS_VARIABLE, "").split(",")]
    found: dict[str, str] = {}
    for path in filter(None, (*SHIPPED, *others)):
        name = f"gemify/{Path(path).name}"
        found[name if name not in found else f"gemify/{path}"] = path
    return found


class GemChat(llm.Model):
    """The GEM as a chat model of ``llm``."""

    can_stream = True

    class Options(llm.Options):
        """Settings of an answer."""

        temperature: float | None = Field(default=None, ge=0, description="0: always the likeliest token.")
        top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
        max_tokens: int = Field(default=512, ge=1, description="Most tokens of an answer.")
        seed: int | None = Field(default=None, description="Seed of the sampling.")

    def __init__(self, model_id: str, path: str) -> None:
        self.model_id, self.path = model_id, path

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Answer a prompt, piece by piece, after the conversation before it."""
        from gemify.integrations.shared_model import GenerationSettings
        from gemify.model.streaming import stream_chat

        options = prompt.options
        settings = GenerationSettings(
            temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens, seed=options.seed
        )
        pieces = stream_chat(load_gem(self.path), _messages(prompt, conversation), **settings.stream_options({}))
        yield from pieces if stream else ["".join(pieces)]
        response.set_usage(input=pieces.prompt_tokens, output=pieces.new_tokens)


class GemEmbeddings(llm.EmbeddingModel):
    """The GEM as an embedding model of ``llm``."""

    batch_size = 64

    def __init__(self, model_id: str, path: str) -> None:
        self.model_id, self.path = model_id, path

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        """Embed texts as documents."""
        from gemify.integrations.shared_model import embed_texts

        yield from embed_texts(load_gem(self.path), [str(item) for item in items])


def _messages(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """The conversation in order. A system prompt stands first: that of the latest prompt that has one."""
    before = [] if conversation is None else conversation.responses
    systems = [p.system for p in (*(r.prompt for r in before), prompt) if p.system]
    messages = [{"role": "system", "content": systems[-1]}] if systems else []
    for answered in before:
        messages += [
            {"role": "user", "content": answered.prompt.prompt},
            {"role": "assistant", "content": answered.text()},
        ]
    return [*messages, {"role": "user", "content": prompt.prompt}]


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Callable[..., None]) -> None:
    """Register the chat sides."""
    for model_id, path in model_paths().items():
        register(GemChat(model_id, path))


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_embedding_models(register: Callable[..., None]) -> None:
    """Register the embedding sides."""
    for model_id, path in model_paths().items():
        register(GemEmbeddings(model_id, path))
