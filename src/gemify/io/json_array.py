"""A JSON array as a stream of its elements, with one piece of its text in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_ARRAY_PIECE = 1 << 18
"""Characters decoded at a time."""
_SPACE = re.compile(r"[ \t\r\n]*")


def array_elements(text: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON array, each with its text.

    Raises:
        json.JSONDecodeError: It is not an array, ends too early, or has text behind it.
    """
    buffer, at, opened = "", 0, False
    ended = False
    while True:
        begin = _space_end(buffer, at)
        mark = buffer[begin : begin + 1]
        if not opened and mark == "[":
            at, opened = begin + 1, True
            continue
        if opened and mark == "]":
            break
        element = _decode_element(buffer, begin, ended) if opened and mark else None
        if element is not None:
            value, end, at = element
            yield buffer[begin:end], value
            continue
        if ended:
            raise json.JSONDecodeError("array without end", buffer, begin)
        piece = text.read(max(_ARRAY_PIECE, len(buffer)))
        buffer, at, ended = buffer[at:] + piece, 0, not piece
    rest = buffer[begin + 1 :] + text.read(_ARRAY_PIECE)
    if rest.strip():
        raise json.JSONDecodeError("text behind the array", rest, 0)


def _decode_element(buffer: str, begin: int, ended: bool) -> tuple[Any, int, int] | None:
    """The element that begins here, its end and where the next may begin; None if more text may complete it."""
    try:
        value, end = json.JSONDecoder().raw_decode(buffer, begin)
    except json.JSONDecodeError as error:
        cut_off = error.msg.startswith("Unterminated") or error.pos + 16 > len(buffer)
        if ended or not cut_off:
            raise
        return None
    behind = _space_end(buffer, end)
    if behind == len(buffer):
        return None
    if buffer[behind] == "]":
        return value, end, behind
    if buffer[behind] != ",":
        raise json.JSONDecodeError("no comma between elements", buffer, behind)
    return value, end, behind + 1


def _space_end(buffer: str, at: int) -> int:
    match = _SPACE.match(buffer, at)
    return match.end() if match else at
