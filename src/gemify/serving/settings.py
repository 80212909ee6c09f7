"""What `gemify serve` can be told: defaults, a YAML file, flags; each beats the one before."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_ANSWERS = 16


@dataclass(frozen=True)
class ServerSettings:
    """Options of a server. ValueError, one line, for what cannot be."""

    model: str = "starter"
    base: str | None = None
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    served_model_name: str | None = None
    """What clients call the model; None: its directory's name."""
    store: str | None = None
    """An index for /v1/search."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    """A file of keys, ``name: key`` a line."""
    allow_no_key: bool = False
    """Serve other machines without keys."""
    cors_origins: tuple[str, ...] = ()

    requests_per_minute: int | None = None
    """Of each key."""
    tokens_per_minute: int | None = None
    max_num_seqs: int = 16
    """Most answers written at a time."""
    max_queue_size: int = 2048
    """Most texts and answers that wait for their turn."""
    max_requests: int = 1024
    """Most requests at a time."""
    max_body_bytes: int = 16 << 20
    max_bodies_bytes: int = 256 << 20
    """Of the bodies of all requests together."""
    max_depth: int = 32
    """Of a body's JSON."""
    max_texts: int = 2048
    """Most texts of an embeddings request."""
    max_prompts: int = 64
    """Most prompts of a completions request."""
    default_max_tokens: int = 1024
    """Longest answer where the request does not say; less where the model has less room."""
    prefix_cache_bytes: int = 512 << 20
    """Memory for the KV caches that requests with the same beginning share."""

    kv_cache_bytes: int = 4 << 30
    """Memory for the KV caches of the answers being written."""

    timeout: float = 600.0
    """Seconds a request may take."""
    body_timeout: float = 30.0
    """Seconds in which a request must have arrived."""
    drain_seconds: float = 0.0
    """How long, after SIGTERM, /ready says no before no more connections are accepted."""
    stop_timeout: float | None = None
    """Seconds accepted requests have to finish after SIGTERM; None: as long as they take."""
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = (
                0
                if field.name in ("port", "drain_seconds", "prefix_cache_bytes")
                else 1e-3
                if _in_seconds(field)
                else 1
            )
            if not value >= least:
                raise ValueError(f"{field.name} must be at least {least:g}, got {value}")
        if self.port > 65535:
            raise ValueError(f"port must lie in 0..65535, got {self.port}")
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes must be at least max_body_bytes, {self.max_body_bytes}, got {self.max_bodies_bytes}"
            )
        if not self.host:
            raise ValueError("host must not be empty: 127.0.0.1 serves this machine, 0.0.0.0 every other one too")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"a CORS origin is * or starts with http:// or https://, got {origin!r}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model

    @classmethod
    def of(cls, given: Mapping[str, Any], *, source: str) -> ServerSettings:
        """Settings from a file's or the flags' entries; ValueError for unknown names and wrong types."""
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in kinds:
                raise ValueError(f"{source}: unknown setting {name!r}: choose from {', '.join(kinds)}")
            values[name] = _typed(name, kinds[name], value, source)
        return cls(**values)

    @staticmethod
    def from_yaml(path: Path) -> dict[str, Any]:
        """A file's entries, with ``-`` or ``_`` in their names."""
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if read is None:
            return {}
        if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
            raise ValueError(f"{path} must hold settings, `name: value` a line")
        return {name.replace("-", "_"): value for name, value in read.items()}


def _in_seconds(field: dataclasses.Field[Any]) -> bool:
    return "float" in str(field.type)


def _typed(name: str, kind: str, value: Any, source: str) -> Any:
    if value is None and "None" in kind:
        return None
    if kind.startswith("tuple"):
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list | tuple) and all(isinstance(v, str) for v in listed):
            return tuple(listed)
    elif kind.startswith("Path"):
        if isinstance(value, str | Path):
            return Path(value)
    elif kind.startswith("bool"):
        if isinstance(value, bool):
            return value
    elif kind.startswith("int"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind.startswith("float"):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, str):
        return value
    raise ValueError(f"{source}: {name} must be {kind.replace(' | None', '')}, got {value!r}")
