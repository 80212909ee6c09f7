"""The options of `gemify serve`: flags win over the environment, it over a YAML file, the file over defaults."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from gemify.model.tokenization import Truncate

PREFIX = "GEMIFY_"
KEYS_VARIABLE = "GEMIFY_API_KEYS"
"""Holds the keys themselves; ``GEMIFY_API_KEYS_FILE`` is the option ``api_keys``, the path of a file."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value}")
    return value


def _split(value: Any) -> Any:
    """Split a variable's or a file's single string at its commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


_STORE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(.+)", re.DOTALL)
_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
_FIRST_PARTS = frozenset(
    "v1 v2 page mcp rerank tokenize detokenize health ready metrics openapi.json".split()  # noqa: SIM905
)
"""What the server's own paths begin with: a prefix that a proxy strips must not be one of them."""
_Number = BeforeValidator(_refuse_bool)
Count = Annotated[int, _Number, Field(ge=1)]
Seconds = Annotated[float, _Number, Field(ge=1e-3)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split), NoDecode]


class ServerSettings(BaseSettings):
    """Options of a server.

    Built directly, it reads neither environment nor file; `load` does.

    Raises:
        ValueError: a value is not allowed.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    model: str = "starter"
    """A GEM directory or a repo id."""
    base: str | None = None
    """Where the base model is, if not where the GEM says."""
    dtype: str | None = None
    """float32, bfloat16 or float16."""
    quantize: str | None = None
    """Bits of the weights: int8 or int4 (CPUs), or nf4; None: none."""
    device: str | None = None
    """cpu, cuda, mps, ..."""
    trust_remote_code: bool = False
    """Run Python that comes with the base model."""
    served_model_name: Names = ()
    """What clients call the model; answers have the first of several. Empty: its directory's name."""
    store: Names = ()
    """Indexes for /v1/search: ``DIR``, which has the directory's name, or ``NAME=DIR``. The first is the default."""
    keep_kv: bool = False
    """Keep the KV of the index's passages on disk, for answers with ``gemify.search``."""
    kv_bits: Annotated[int, _Number] = 16
    """Of the kept values: 32, 16, 8 or 4."""
    kv_budget: str | None = None
    """Most bytes of the kept KV in a directory, such as 2GB; None: no limit."""
    kv_store: Path | None = None
    """Where it is kept; None: ``kv`` in each store's directory."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen at."""
    port: Annotated[int, _Number, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0: any free one."""
    api_keys: Path | None = None
    """A file of keys, ``name: key`` a line."""
    upload_key: Names = ()
    """Names of the API keys that may put files into the stores and remove them. Empty: none may."""
    allow_no_key: bool = False
    """Serve other machines without keys."""
    cors_origins: Names = ()
    """Origins of web pages that may call."""
    root_path: str = ""
    """Prefix of all paths behind a proxy, which may strip it or not."""
    ssl_certfile: Path | None = None
    """The certificate for TLS, with its chain; None: HTTP."""
    ssl_keyfile: Path | None = None
    """Its key; None: it is in the certificate's file."""

    max_length: Count | None = None
    """Most tokens of a text to embed, up to the base's positions; None: as the model was saved."""
    truncate: Truncate = "error"
    """Of a text to embed that is too long: error, end or start (cut there), or mean (of its parts)."""

    requests_per_minute: Count | None = None
    """Limit of each key."""
    tokens_per_minute: Count | None = None
    """Limit of each key."""
    max_num_seqs: Count = 16
    """Most sequences that are generated at a time."""
    max_queue_size: Count = 2048
    """Most texts and sequences that wait."""
    max_requests: Count = 1024
    """Most requests at a time."""
    max_body_bytes: Count = 16 << 20
    """Largest body of a request."""
    max_bodies_bytes: Count = 256 << 20
    """Memory for the bodies of all requests together."""
    max_depth: Count = 32
    """Deepest nesting of a body's JSON."""
    max_texts: Count = 2048
    """Most texts of an embeddings request."""
    max_prompts: Count = 64
    """Most prompts of a completions request."""
    default_max_tokens: Count = 1024
    """Longest answer of a chat that does not say; less where the model has fewer positions left."""
    prefix_cache_bytes: Annotated[int, _Number, Field(ge=0)] = 512 << 20
    """Memory for the KV of prefixes that requests share."""
    kv_cache_bytes: Count = 4 << 30
    """Memory for the KV of running sequences."""

    timeout: Seconds = 600.0
    """Seconds a request may take."""
    body_timeout: Seconds = 30.0
    """Seconds in which a request's body must have arrived."""
    sse_keep_alive_seconds: Seconds = 15.0
    """Seconds of silence after which a stream sends a comment."""
    drain_seconds: Annotated[float, _Number, Field(ge=0)] = 0.0
    """Seconds after SIGTERM in which /ready answers 503 and everything else is served as before."""
    stop_timeout: Seconds | None = None
    """Seconds accepted requests have to finish after SIGTERM; None: as long as they take."""
    strict: bool = False
    """Refuse requests with unknown fields, which are listed in the header X-Gemify-Ignored otherwise."""
    log_prompts: bool = False
    """Log what clients send."""

    @field_validator("cors_origins")
    @classmethod
    def _require_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"a CORS origin is * or starts with http:// or https://, got {origin!r}")
        return origins

    @field_validator("store")
    @classmethod
    def _require_store_names(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        names = [_named_store(each)[0] for each in given]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stores have the name {double!r}: give NAME=DIR with another name")
        return given

    @field_validator("root_path")
    @classmethod
    def _require_prefix(cls, path: str) -> str:
        path = path.rstrip("/")
        parts = set(path.split("/"))
        if path and (_ROOT_PATH.fullmatch(path) is None or parts & {".", ".."}):
            raise ValueError(f"must be a path such as /gemify, got {path!r}")
        if (first := path[1:].split("/")[0]) in _FIRST_PARTS:
            raise ValueError(f"must not begin with /{first}, as routes of the server do: choose another, got {path!r}")
        return path

    @model_validator(mode="after")
    def _require_certificate(self) -> Self:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile needs ssl_certfile, the certificate of that key")
        return self

    @model_validator(mode="after")
    def _require_room_for_a_body(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes must be at least max_body_bytes, {self.max_body_bytes}, got {self.max_bodies_bytes}"
            )
        return self

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments alone; `load` merges the other sources."""
        return (init_settings,)

    @classmethod
    def load(cls, flags: Mapping[str, Any], config: Path | None = None) -> ServerSettings:
        """Merge flags, environment, file and defaults.

        Args:
            flags: options given on the command line.
            config: a YAML file of options, with ``-`` or ``_`` in their names.

        Raises:
            ValueError: an unknown name or a value that is not allowed, in one line that says where it was given.
        """
        from_file = read_yaml(config) if config is not None else {}
        from_environment = EnvSettingsSource(cls)()
        from_environment.pop("api_keys", None)
        if path := os.environ.get(f"{KEYS_VARIABLE}_FILE"):
            from_environment["api_keys"] = path
        try:
            return cls(**{**from_file, **from_environment, **flags})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            if name in flags:
                source = "--" + name.replace("cors_origins", "cors_origin").replace("_", "-")
            elif name in from_environment:
                source = variable_name(name)
            else:
                source = f"{config}: {name}" if name else str(config or "the options")
            raise ValueError(_one_line(source, name, first)) from error

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
    def stores(self) -> dict[str, str]:
        """Directories or URIs of the stores by their names, the default one first."""
        return dict(map(_named_store, self.store))

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model. The first name is the one in answers."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model)
        return (path.resolve().name if path.is_dir() else self.model,)


def _named_store(given: str) -> tuple[str, str]:
    """Return the name and the URI of a store, given as ``NAME=DIR`` or ``DIR``."""
    if named := _STORE.fullmatch(given):
        return named[1], named[2]
    last = given.rstrip("/").rpartition("/")[2] if "://" in given else Path(given).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:64] or "store", given


def variable_name(option: str) -> str:
    """Return the environment variable of an option."""
    return f"{KEYS_VARIABLE}_FILE" if option == "api_keys" else PREFIX + option.upper()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file's options, with ``-`` or ``_`` in their names."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if read is None:
        return {}
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise ValueError(f"{path} must hold options, `name: value` a line")
    return {name.replace("-", "_"): value for name, value in read.items()}


def _one_line(source: str, name: str, error: Mapping[str, Any]) -> str:
    """Say what is wrong with an option: what was got, and what is allowed."""
    if error["type"] == "extra_forbidden":
        known = ", ".join(ServerSettings.model_fields)
        return f"{source.partition(':')[0]}: unknown option {name!r}: choose from {known}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{source} {message}" if message.startswith("must ") else f"{source}: {message}"
    message = str(error["msg"]).replace("Input should be", "must be").replace("String should have", "must have")
    return f"{source} {message}, got {str(error['input'])[:80]!r}"
