"""API keys, compared in constant time, and rate limits for each key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from gemify.serving.errors import ApiError, too_many_requests
from gemify.serving.settings import KEYS_VARIABLE

logger = logging.getLogger("gemify.serving")

ANONYMOUS = "anonymous"
"""The name of every client if there are no keys."""
_MIN_KEY_LENGTH = 8
_NAME = re.compile(r"[\w.@-]{1,64}")


class KeyRing:
    """API keys by name. Only their hashes are kept.

    Args:
        keys: names and keys.

    Raises:
        ValueError: a key is too short or given twice.
    """

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        self._hashes: dict[str, bytes] = {}
        for name, key in keys:
            if len(key) < _MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"the API key {name!r} must be at least {_MIN_KEY_LENGTH} printable ASCII characters without"
                    f" spaces, got {len(key)}"
                )
            if name in self._hashes or _hash(key) in self._hashes.values():
                raise ValueError(f"the API key {name!r} is given twice: leave one out")
            self._hashes[name] = _hash(key)

    @classmethod
    def read(cls, path: Path | None) -> KeyRing:
        """Read the keys of a file; without one, of GEMIFY_API_KEYS, separated by commas or lines."""
        if path is None:
            return cls(_parse(re.split(r"[,\n]", os.environ.get(KEYS_VARIABLE, ""))))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text file: write `name: key` lines") from error
        if path.stat().st_mode & 0o077 and os.name == "posix":
            logger.warning("%s can be read by other users of this machine: chmod 600 it", path)
        found = _parse(lines)
        if not found:
            raise ValueError(f"{path} holds no API key: write `name: key` lines")
        return cls(found)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, name: str) -> bool:
        return name in self._hashes

    def find_name(self, key: str) -> str | None:
        """Return the name of a key, or None. Runs in constant time for unknown keys."""
        hashed, found = _hash(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(hashed, known):
                found = name
        return found

    def authenticate(self, authorization: str | None) -> str:
        """Return the name of the key in an Authorization header; ApiError 401 if there is no valid key."""
        if not self._hashes:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        name = self.find_name(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            reason = "no API key was given" if not authorization else "the API key is not known here"
            raise ApiError(
                401,
                f"{reason}: send the header Authorization: Bearer KEY, or x-api-key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name


class RateLimiter:
    """Limits of requests and tokens a minute, for each key by itself.

    Args:
        requests_per_minute: counted over the last 60 seconds; None: no limit.
        tokens_per_minute: counted in fixed minutes; None: no limit.
        on_tokens: hears the name and the tokens that are counted.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        *,
        on_tokens: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        self._on_tokens = on_tokens
        storage = MemoryStorage()
        self._moving, self._fixed = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)
        self._requests = RateLimitItemPerMinute(requests_per_minute) if requests_per_minute else None
        self._tokens = RateLimitItemPerMinute(tokens_per_minute, namespace="TOKENS") if tokens_per_minute else None

    def count_request(self, name: str) -> None:
        """Count a request of a key; ApiError 429 if there were too many."""
        if self._requests is not None and not self._moving.hit(self._requests, name):
            until = self._moving.get_window_stats(self._requests, name).reset_time
            raise too_many_requests(
                f"more than {self._requests.amount} requests a minute: wait", until - time.time(), code=_EXCEEDED
            )

    def check_tokens(self, name: str, tokens: int) -> None:
        """Raise ApiError 429 if a prompt's tokens exceed what is left of this minute's."""
        if self._tokens is None:
            return
        if not self._fixed.test(self._tokens, name, cost=min(tokens, self._tokens.amount)):
            until = self._fixed.get_window_stats(self._tokens, name).reset_time
            raise too_many_requests(
                f"more than {self._tokens.amount} tokens a minute: wait", until - time.time(), code=_EXCEEDED
            )

    def add_tokens(self, name: str, tokens: int) -> None:
        """Count tokens: a prompt's when it is accepted, an answer's when it has been generated."""
        self._on_tokens(name, tokens)
        if self._tokens is not None and tokens:
            self._fixed.hit(self._tokens, name, cost=tokens)


_EXCEEDED = "rate_limit_exceeded"


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _parse(lines: Iterable[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.rpartition(":")
        named = name.strip() if colon else f"key-{len(found) + 1}"
        if not _NAME.fullmatch(named):
            raise ValueError(f"the name of API key {len(found) + 1} must be letters, digits, . @ _ or -: `name: key`")
        found.append((named, key.strip()))
    return found
