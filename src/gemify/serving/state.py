"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from gemify.rag.pipeline import SearchIndex
from gemify.serving.auth import ANONYMOUS, KeyRing, RateLimiter
from gemify.serving.errors import ApiError, too_many_requests
from gemify.serving.metrics import Metrics
from gemify.serving.rag import RagService
from gemify.serving.settings import ServerSettings
from gemify.serving.tokenization import RequestTokenizer

if TYPE_CHECKING:
    from gemify.engine.engine import Engine


@dataclass
class AppState:
    """The engine, the index, and what is known about those who ask."""

    engine: Engine
    settings: ServerSettings
    index: SearchIndex | None
    keys: KeyRing
    rate_limiter: RateLimiter
    metrics: Metrics
    tokenizer: RequestTokenizer
    rag: RagService | None
    """None: no index, or no chat template."""
    ready: bool = False
    """The model has answered."""
    stopping: bool = False
    body_bytes: int = 0
    """Of all requests being answered."""
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        return self.settings.model_name

    @property
    def requires_local_host(self) -> bool:
        """Anybody on this machine may ask: then a web page that its user looks at must not pass for this machine's own."""
        return self.settings.is_local and not len(self.keys) and not self.settings.allow_no_key

    def require_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not here: this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def require_index(self) -> SearchIndex:
        if self.index is None:
            raise ApiError(
                404,
                "this server has no index: start it with --store DIR (`gemify index` makes one)",
                code="no_index",
            )
        return self.index


def get_state(request: Request) -> AppState:
    """The state of the application that got a request."""
    state: AppState = request.app.state.gemify
    return state


def get_key_name(request: Request) -> str:
    """The name of the key a request came with."""
    return str(request.scope.get("gemify.key", ANONYMOUS))


def reserve_body_bytes(request: Request, size: int) -> None:
    """Count bytes of a body that this request holds until it has been answered; ApiError 429 where there is no room."""
    state = get_state(request)
    most = state.settings.max_bodies_bytes
    if state.body_bytes + size > most:
        raise too_many_requests(f"the bodies of all requests hold {most:,} bytes already: wait", 1, code="queue_full")
    state.body_bytes += size
    request.scope["gemify.bytes"] = request.scope.get("gemify.bytes", 0) + size


def add_log_fields(request: Request, **facts: Any) -> None:
    """Add to what the log says of this request."""
    request.scope.setdefault("gemify.notes", {}).update(facts)
