"""Request bodies, read with suspicion: bounded in bytes, seconds and depth, JSON as its standard says and no other."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from gemify.serving.errors import ApiError, bad_request
from gemify.serving.settings import ServerSettings
from gemify.serving.state import reserve_body_bytes

_IN_A_THREAD = 1 << 18  # bytes from which on the event loop does not wait for the parsing
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json` instead of the framework."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handled


class _JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await _read(self, self.app.state.gemify.settings)
        return self._body

    async def json(self) -> Any:
        raw = await self.body()
        depth = self.app.state.gemify.settings.max_depth
        return await asyncio.to_thread(read_json, raw, depth) if len(raw) > _IN_A_THREAD else read_json(raw, depth)


async def _read(request: Request, settings: ServerSettings) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, got {kind[:80]!r}: set the header Content-Type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError(415, "the body must not be compressed: leave out the header Content-Encoding")
    most = settings.max_body_bytes
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told[:20]) > most:
        _too_large(most)
    read = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for piece in request.stream():
                read += piece
                if len(read) > most:
                    _too_large(most)
                reserve_body_bytes(request, len(piece))
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {settings.body_timeout:g} s: send it faster",
            headers={"Connection": "close"},
        ) from None
    if not read:
        raise bad_request("the body is empty: send a JSON object", code="invalid_json")
    return bytes(read)


def _too_large(most: int) -> NoReturn:
    raise ApiError(413, f"the body is larger than {most:,} bytes: send less at a time")


def read_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    """A body's JSON object. ApiError (400) for what is none, or is no JSON, however widespread."""
    if not raw.strip(b" \t\r\n"):
        raise bad_request("the body is empty: send a JSON object", code="invalid_json")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_no_doubles)
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise bad_request(f"the body is nested deeper than {max_depth}", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {json_name(value)}", code="invalid_json")
    if raw.count(b"[") + raw.count(b"{") > max_depth:
        _require_shallow(value, max_depth)
    if _SURROGATE.search(raw):
        _require_whole_characters(value)
    return value


def json_name(value: Any) -> str:
    """What JSON calls a value."""
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _require_shallow(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise bad_request(f"the body is nested deeper than {max_depth}", code="invalid_json")


def _require_whole_characters(value: Any) -> None:
    waiting = [value]
    while waiting:
        some = waiting.pop()
        if isinstance(some, str):
            try:
                some.encode("utf-8")
            except UnicodeEncodeError:
                raise bad_request(
                    "a string holds half of a character (a lone surrogate)", code="invalid_json"
                ) from None
        elif isinstance(some, dict):
            waiting += [*some.keys(), *some.values()]
        elif isinstance(some, list):
            waiting += [v for v in some if isinstance(v, str | dict | list)]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {double[:80]!r} occurs twice")
    return found
