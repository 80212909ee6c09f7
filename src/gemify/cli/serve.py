"""The verbs that serve other programs: `gemify serve` and `mcp`."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gemify.cli.ask import ask_options, generate_options, open_rag
from gemify.cli.options import KvBudget, KvStoreDir, MaxTextLength, fail

ServedStores = Annotated[
    list[str] | None,
    typer.Option(
        "--store", "-s", help="Index, for /v1/search and the page: DIR, or NAME=DIR; may be repeated. [default: none]"
    ),
]
UploadKeys = Annotated[
    list[str] | None,
    typer.Option("--upload-key", help="Name of an API key that may add files to the stores; may be repeated."),
]


def serve(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id. [default: starter]")
    ] = None,
    store: ServedStores = None,
    keep_kv: Annotated[
        bool | None, typer.Option("--keep-kv", help="Keep the passages' KV caches on disk and use them in answers.")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Bits of a kept cache's values: 32, 16, 8 or 4. [default: 16]")
    ] = None,
    kv_budget: KvBudget = None,
    kv_store: KvStoreDir = None,
    host: Annotated[str | None, typer.Option(help="Where to listen. [default: 127.0.0.1: this machine alone]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one. [default: 8000]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of options; environment and flags win over it.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of `name: key` lines. [default: the environment's GEMIFY_API_KEYS]")
    ] = None,
    upload_key: UploadKeys = None,
    allow_no_key: Annotated[bool | None, typer.Option("--allow-no-key", help="Serve others without keys.")] = None,
    max_length: MaxTextLength = None,
    truncate: Annotated[
        str | None,
        typer.Option(help="Of a text that is too long: error, end, start or mean, unless it says. [default: error]"),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of each key. [default: no limit]")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Of each key. [default: no limit]")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Most answers at a time. [default: 16]")] = None,
    max_queue_size: Annotated[int | None, typer.Option(min=1, help="Most that wait. [default: 2048]")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="A web page's origin that may call; may be repeated.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds a request may take. [default: 600]")] = None,
    root_path: Annotated[str | None, typer.Option(help="Prefix of all paths behind a proxy. [default: none]")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for HTTPS. [default: none]")] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Key of the certificate. [default: in the certificate's file]")
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to serve on after SIGTERM, while /ready answers 503. [default: 0]"),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model; repeat it, or use commas, for several. Answers have the first."
            " [default: the directory's name]"
        ),
    ] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Refuse requests with unknown fields.")] = None,
    log_prompts: Annotated[bool | None, typer.Option("--log-prompts", help="Log what clients send.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the base model.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Look for the base model here instead.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32]")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Bits of the weights: int8 or int4 (CPUs), or nf4. [default: none]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... [default: the accelerator if any]")] = None,
) -> None:
    """Serve chat and embeddings at once from one model, in OpenAI's API, with a web page at /."""
    flags: dict[str, Any] = {name: value for name, value in locals().items() if value is not None and name != "config"}
    if "cors_origin" in flags:
        flags["cors_origins"] = tuple(flags.pop("cors_origin"))
    if "served_model_name" in flags:
        flags["served_model_name"] = ",".join(flags["served_model_name"])
    from gemify.serving.server import require_certificate
    from gemify.serving.server import serve as run
    from gemify.serving.settings import ServerSettings

    settings = ServerSettings.load(flags, config)
    try:
        require_certificate(settings)
    except (ValueError, OSError) as error:
        fail(str(error), code=2)
    run(settings)


def mcp(**options: Any) -> None:
    """Give a store's search and answers to MCP clients, which start this command and speak over stdin and stdout."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the protocol's
        from gemify.serving.mcp_server import create_local_server

        rag = open_rag(options)
        server = create_local_server(rag, **generate_options(options))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: a thread that waits for stdin would go on waiting
    server.run("stdio")


mcp.__signature__ = ask_options("as_json")  # type: ignore[attr-defined]
