"""The command `gemify`: one thin function a verb. Results go to stdout, talk to stderr; exit codes 0, 1, 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from gemify import __version__
from gemify.cli.ask import ask, chat
from gemify.cli.bench import bench
from gemify.cli.evaluate import evaluate, report, reproduce
from gemify.cli.index import embed_corpus, forget, index, search
from gemify.cli.model import cache, embed, export, generate, info, recover
from gemify.cli.options import fail
from gemify.cli.serve import mcp, serve
from gemify.cli.train import align, mine, pairs, train
from gemify.io.extras import describe_missing
from gemify.io.tables import first_line

VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "align": align,
    "pairs": pairs,
    "mine": mine,
    "embed": embed,
    "generate": generate,
    "recover": recover,
    "info": info,
    "eval": evaluate,
    "report": report,
    "reproduce": reproduce,
    "embed-corpus": embed_corpus,
    "index": index,
    "forget": forget,
    "search": search,
    "ask": ask,
    "chat": chat,
    "serve": serve,
    "mcp": mcp,
    "export": export,
    "cache": cache,
}

app = typer.Typer(
    name="gemify",
    help="One LLM that writes and embeds: train, embed, generate, recover, and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: every foreseeable failure is one line on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="gemify: %(message)s", stream=sys.stderr)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it may warn
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it misses optional kernels
    debug = bool(os.environ.get("GEMIFY_DEBUG"))
    try:
        app()
    except ModuleNotFoundError as error:
        if debug:
            raise
        fail(describe_missing(error))
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if debug:
            raise
        fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if debug:
            raise
        fail(f"{first_line(error)} (GEMIFY_DEBUG=1 shows where)")
