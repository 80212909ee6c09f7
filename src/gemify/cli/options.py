"""What the verbs share: every option that two of them have, and how they load, print and fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gemify.io.tables import first_line

if TYPE_CHECKING:
    from gemify.model.gem import GemModel

# The model.
GEM_NAME = "starter, starter-gated, a GEM directory or a Hugging Face repo id."
Model = Annotated[str, typer.Option("--model", "-m", help=GEM_NAME)]
StoreModel = Annotated[str | None, typer.Option("--model", "-m", help=f"{GEM_NAME} [default: the store's]")]
NewStoreModel = Annotated[
    str | None, typer.Option("--model", "-m", help=f"{GEM_NAME} [default: the store's, or starter]")
]
Base = Annotated[str | None, typer.Option("--base", help="Load the base model from here instead.")]
BaseModel = Annotated[
    str, typer.Option("--base", "--model", "-m", help="Base model: directory, repo id, .gguf file, or starter.")
]
Dtype = Annotated[
    str,
    typer.Option(help="Of the weights: auto (as stored, if the CPU is fast in it), float32, bfloat16 or float16."),
]
ExactDtype = Annotated[str, typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float16.")]
Quantize = Annotated[str, typer.Option(help="Bits of the weights: int8 or int4 (CPUs), nf4 (bitsandbytes) or none.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... [default: the accelerator if there is one]")]
TrainingPrecision = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
AttnImplementation = Annotated[str, typer.Option(help="sdpa, eager or flex_attention (GPUs).")]
Encoder = Annotated[str | None, typer.Option(help="A sentence-transformers model: st:PATH or st:NAME.")]

# Texts.
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
TitleColumn = Annotated[str, typer.Option(help="Column that holds the title.")]
TrainingData = Annotated[
    str, typer.Option(help="Texts: a .txt, .jsonl, .csv or .parquet file, or a Hugging Face data set's name.")
]
SquadData = Annotated[
    Path, typer.Option(help="Directory with corpus.jsonl and queries.jsonl (or .gz), in SQuAD's form.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Maximum texts in a batch.")]
MaxLength = Annotated[int, typer.Option(min=8, help="Maximum tokens of a text.")]

# A store of passages.
StoreUri = Annotated[str, typer.Option("--store", "-s", help="Directory of the store, or a URI such as s3://...")]
TopK = Annotated[int, typer.Option("-k", min=1, help="Number of passages to retrieve.")]
SearchMode = Annotated[str, typer.Option(help="vector (meaning), fts (words, BM25) or hybrid.")]
Rerank = Annotated[
    str,
    typer.Option(help="Sort what is found anew, by the same model: bi (vectors), lm (odds of yes, slow) or none."),
]
Where = Annotated[
    str | None,
    typer.Option(help="Only passages whose metadata fits, in SQL: \"lang = 'de' and date > date '2025-01-01'\"."),
]
KeepKv = Annotated[
    bool, typer.Option("--keep-kv", help="Keep the passages' KV caches on disk and use them. They contain the text.")
]
KvBits = Annotated[
    int, typer.Option(help="Bits of a kept cache's values: 32, 16, 8 or 4. As many as --dtype has are exact.")
]
KvBudget = Annotated[
    str | None, typer.Option(help="Maximum size of all kept caches, such as 500MB or 2GB. [default: unlimited]")
]
KvStoreDir = Annotated[Path | None, typer.Option("--kv-store", help="Directory of kept caches. [default: STORE/kv]")]

# Length.
TruncateOption = Annotated[
    str,
    typer.Option(
        "--truncate",
        help="Of a text that is too long: end or start (cut there), mean (of its parts) or error.",
    ),
]
MaxTextLength = Annotated[
    int | None,
    typer.Option(
        "--max-length", help="Most tokens of a text, up to the base's positions. [default: as the model was saved]"
    ),
]

# Generation.
SystemPrompt = Annotated[str | None, typer.Option("--system-prompt", help="System message of the chat.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling: the share of probability to keep.")]
Seed = Annotated[int | None, typer.Option(help="Random seed.")]

# Output.
OutputDirectory = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
ReportFile = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the record to.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Image file (.svg or .png) to draw.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def load_gem(
    model: str,
    base: str | None,
    dtype: str,
    device: str | None,
    quantize: str = "none",
    *,
    max_length: int | None = None,
) -> GemModel:
    """Load a GEM as the options name it."""
    from gemify.model.base import parse_dtype
    from gemify.model.gem import GemModel

    precision = "auto" if dtype == "auto" else parse_dtype(dtype)
    return GemModel.from_pretrained(
        model, base=base, max_length=max_length, dtype=precision, device=device, quantize=quantize
    )


def store_model_name(store: str, model: str | None) -> str:
    """The model to search a store with: the one given, else the one that wrote it, else ``starter``."""
    from gemify.retrieval.vector_table import open_store

    return model or open_store(store).meta.model or "starter"


def absolute_model_name(model: str) -> str:
    """A model's name that is valid in any working directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def require_utf8(text: str) -> str:
    """Return an argument's text.

    Raises:
        ValueError: It holds bytes that are not UTF-8.
    """
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise ValueError("an argument is not UTF-8 text: convert it (iconv -f latin1 -t utf-8), or give it as a file")
    return text


def read_stdin() -> str:
    """Return all of stdin as text. Raises ValueError if it is not UTF-8."""
    return "\n".join(stdin_lines())


def stdin_lines() -> Iterator[str]:
    """Yield the lines of stdin as those of a text file are read."""
    from gemify.io.rows import line_row

    raw = getattr(sys.stdin, "buffer", None)  # a replaced stdin may have none
    lines = raw if raw is not None else (line.encode("utf-8", "surrogateescape") for line in sys.stdin)
    for number, line in enumerate(lines, start=1):
        try:
            row = line_row(number, line, "stdin", "text", "text")
            assert row is not None
            yield str(row.parse()["text"])
        except ValueError as error:
            where = "" if str(error).startswith("stdin") else f"stdin row {number}: "
            raise ValueError(f"{where}{error}") from error


def parse_lengths(text: str) -> list[int]:
    """The whole numbers of a list such as ``250,1000``."""
    try:
        return [int(length) for length in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--lengths must be whole numbers with commas between, got {text!r}") from error


def print_json(value: object) -> None:
    """Write one JSON line to stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def echo_err(text: str) -> None:
    """Write a line to stderr, which carries everything but results."""
    typer.echo(text, err=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with one line on stderr."""
    echo_err(f"gemify: error: {first_line(message) or 'unknown error'}")
    sys.exit(code)


def write_report(report: dict[str, Any], table: str, output: Path | None, as_json: bool) -> None:
    """Write a record to ``output`` if it is given, and print it as JSON or as a table."""
    from gemify.io.atomic import atomic_file

    if output is not None:
        with atomic_file(output) as stage:
            stage.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        echo_err(str(output))
    typer.echo(json.dumps(report) if as_json else table)
