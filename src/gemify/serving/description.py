"""GET /openapi.json: what the framework derives from the routes, made true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

_KEYLESS = frozenset({"/health", "/ready"})


def describe(app: FastAPI, *, with_keys: bool) -> Callable[[], dict[str, Any]]:
    """The application's description: invalid bodies are 400 here, not 422, and a key is asked for where there are some."""
    derived = app.openapi

    def described() -> dict[str, Any]:
        schema = derived()
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        for path, methods in schema["paths"].items():
            for facts in methods.values():
                facts["responses"].pop("422", None)
                if with_keys and path not in _KEYLESS:
                    facts["security"] = [{"key": []}]
        if with_keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    return described
