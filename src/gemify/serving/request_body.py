"""Request bodies: bounded in bytes, seconds and depth; strict JSON, or a form with a file."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import UploadFile

from gemify.serving.errors import ApiError, bad_request, json_name
from gemify.serving.settings import ServerSettings
from gemify.serving.state import get_state, reserve_body_bytes

_MIN_THREAD_BYTES = 1 << 18  # bodies from this size on are parsed in a thread
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json` instead of the framework."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler, given requests that read their body here."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _BoundedRequest(Request):
    content_type = "application/json"

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await _read(self, get_state(self).settings, self.content_type)
        return self._body


class _JsonRequest(_BoundedRequest):
    async def json(self) -> Any:
        raw = await self.body()
        depth = get_state(self).settings.max_depth
        return await asyncio.to_thread(read_json, raw, depth) if len(raw) > _MIN_THREAD_BYTES else read_json(raw, depth)


class _FormRequest(_BoundedRequest):
    content_type = "multipart/form-data"


async def read_form_file(request: Request) -> tuple[str, bytes]:
    """Read the file of a form: its name, as the client gave it, and its bytes.

    Raises:
        ApiError: the body is too large, too slow, or no form with one file.
    """
    bounded = _FormRequest(request.scope, request.receive)
    await bounded.body()
    async with bounded.form(max_files=1, max_fields=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile) or len(form) > 1:
            raise bad_request("the form must have one field, file, with a file and its name", "file")
        return file.filename or "", await file.read()


async def _read(request: Request, settings: ServerSettings, wanted: str) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != wanted:
        raise ApiError(415, f"the body must be {wanted}, got {content_type[:80]!r}: set the header Content-Type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError(415, "the body must not be compressed: leave out the header Content-Encoding")
    limit = settings.max_body_bytes
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > limit:
        _refuse_size(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    _refuse_size(limit)
                reserve_body_bytes(request, len(piece))
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {settings.body_timeout:g} s: send it faster",
            headers={"Connection": "close"},
        ) from None
    if not body:
        raise _invalid(f"the body is empty: send {'a JSON object' if wanted == 'application/json' else 'a form'}")
    return bytes(body)


def _refuse_size(limit: int) -> NoReturn:
    raise ApiError(413, f"the body is larger than {limit:,} bytes: send less at a time")


def read_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Parse a body that must be a JSON object.

    Args:
        raw: the body.
        max_depth: deepest nesting of objects and arrays.

    Raises:
        ApiError: 400, for what is not JSON, even if other servers take it: NaN, a field twice, half a character.
    """
    if not raw.strip(b" \t\r\n"):
        raise _invalid("the body is empty: send a JSON object")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
        too_deep = raw.count(b"[") + raw.count(b"{") > max_depth and _depth(value) > max_depth
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise _invalid("the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise _invalid("a string holds half of a character (a lone surrogate)") from None
    except RecursionError:
        too_deep = True
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise _invalid(f"the body is not JSON: {str(error)[:200]}") from None
    if too_deep:
        raise _invalid(f"the body is nested deeper than {max_depth}")
    if not isinstance(value, dict):
        raise _invalid(f"the body must be a JSON object, got {json_name(value)}")
    return value


def _invalid(message: str) -> ApiError:
    return bad_request(message, code="invalid_json")


def _depth(value: Any) -> int:
    """Return how deep objects and arrays are nested."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(v) for v in inner if isinstance(v, dict | list)), default=0)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the field {double[:80]!r} occurs twice")
    return found
