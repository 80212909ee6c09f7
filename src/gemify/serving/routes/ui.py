"""GET / and /page/*: a small web page that uses the routes. It loads nothing from anywhere else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Request
from starlette.responses import Response

from gemify.serving.errors import ApiError

router = APIRouter(include_in_schema=False)

_CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
_FILES = files("gemify.serving") / "page"


@router.get("/")
async def index(request: Request) -> Response:
    """Return the page."""
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str, request: Request) -> Response:
    """Return a script, a style or a picture of the page."""
    return _file(name)


def _file(name: str) -> Response:
    content_type = _CONTENT_TYPES.get(PurePosixPath(name).suffix)
    if content_type is None or name not in _names():
        raise ApiError(404, f"there is no {name[:80]!r} in the page", code="not_found")
    headers = {
        "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response((_FILES / name).read_bytes(), media_type=f"{content_type}; charset=utf-8", headers=headers)


@cache
def _names() -> frozenset[str]:
    """Return the names of the page's files. No other name becomes a path."""
    return frozenset(path.name for path in _FILES.iterdir())
