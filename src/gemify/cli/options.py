"""What the verbs share: options, each declared once, and how they load, print and fail."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from gemify.model.gem import GemModel
    from gemify.rag.kv_store import KvStore

Model = Annotated[
    str, typer.Option("--model", "-m", help="starter, starter-multi, a GEM directory or a Hugging Face repo id.")
]
StoreModel = Annotated[
    str | None, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id. [default: the store's]")
]
Base = Annotated[str | None, typer.Option("--base", help="Look for the base model here instead.")]
BaseModel = Annotated[
    str, typer.Option("--base", "--model", "-m", help="Base model: directory, repo id, .gguf, or starter.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... [default: the accelerator if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
StoreUri = Annotated[str, typer.Option("--store", "-s", help="Directory of the index, or a URI such as s3://...")]
ReportFile = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of the record.")]
KeepKv = Annotated[
    bool, typer.Option("--keep-kv", help="Keep passages' KV caches on disk, and use them. They hold the text itself.")
]
KvBits = Annotated[
    int, typer.Option(help="Of kept caches: 32, 16, 8 or 4. 32 is exact; 16 is, for a model in 16 bits (--dtype).")
]
KvBudget = Annotated[
    str | None, typer.Option(help="Most bytes of kept caches, such as 500MB or 2GB. [default: no end]")
]
KvStoreDir = Annotated[Path | None, typer.Option("--kv-store", help="Where they are kept. [default: STORE/kv]")]


def load_gem(model: str, base: str | None, dtype: str | None, device: str | None) -> Any:
    from gemify.model.gem import GemModel

    loading: Any = {"device": device} if dtype is None else {"device": device, "dtype": dtype}
    return GemModel.from_pretrained(model, base=base, **loading)


def absolute_model_name(model: str) -> str:
    """A model's name that still finds it from another working directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def kv_store_of(given: Mapping[str, Any]) -> Callable[[GemModel], KvStore] | None:
    """What a verb's arguments say of kept caches, checked before a model is loaded: the store, given the model."""
    from gemify.model.fingerprint import cache_fingerprint
    from gemify.rag.kv_store import KvStore

    if not given["keep_kv"]:
        if given["kv_budget"] is not None or given["kv_store"] is not None:
            raise ValueError("--kv-budget and --kv-store say where caches are kept: they need --keep-kv")
        return None
    if given["kv_store"] is None and "://" in given["store"]:
        raise ValueError(f"caches are kept on a disk, and {given['store']} is none: give --kv-store DIR")
    directory = given["kv_store"] or Path(given["store"]) / "kv"
    bits, budget = given["kv_bits"], bytes_of(given["kv_budget"])
    KvStore(directory, fingerprint="", bits=bits, budget_bytes=budget)

    def keeping(gem: GemModel) -> KvStore:
        name = cache_fingerprint(gem.lm, gem.config, gem.adapter)
        return KvStore(directory, fingerprint=name, bits=bits, budget_bytes=budget)

    return keeping


def bytes_of(text: str | None) -> int | None:
    """Bytes of a size such as 500MB; ValueError for what is none."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"a size must be a number of bytes such as 500MB or 2GB, got {text!r}")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def print_json(value: Any) -> None:
    """Write one JSON line to stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def echo_err(text: str) -> None:
    """Write a line to stderr, where talk goes."""
    typer.echo(text, err=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with one line on stderr."""
    echo_err(f"gemify: error: {first_line(message) or 'unknown error'}")
    sys.exit(code)


def first_line(error: BaseException | str) -> str:
    """An error's text cut to its first line; its type's name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_report(report: Any, table: str, output: Path | None, as_json: bool) -> None:
    """Write a record to a JSON file if one is asked for, and print it as JSON or as a table."""
    from gemify.io.atomic import atomic_file

    if output is not None:
        with atomic_file(output) as stage:
            stage.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(str(output), err=True)
    typer.echo(json.dumps(report) if as_json else table)
