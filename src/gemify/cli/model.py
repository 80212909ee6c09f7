"""The verbs over one GEM: `gemify embed`, `generate`, `recover`, `info` and `export`; `cache` of converted models."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gemify.cli.options import (
    GEM_NAME,
    Base,
    BatchSize,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    MaxTextLength,
    Model,
    OutputDirectory,
    Quantize,
    Quiet,
    Seed,
    SystemPrompt,
    Temperature,
    TextColumn,
    TopP,
    TruncateOption,
    echo_err,
    load_gem,
    print_json,
    read_stdin,
    require_utf8,
    stdin_lines,
)

if TYPE_CHECKING:
    from gemify.model.tokenization import Truncate


def embed(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts. [default: --input, or the lines of stdin]")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="File of rows (.txt, .jsonl, .csv, .parquet, ...; also .gz, .zst)."),
    ] = None,
    text_column: TextColumn = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy, .jsonl or .parquet file. [default: JSONL to stdout]")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Name of the model's prompt to put before each text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt to put before each text.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep only the first N dimensions.")] = None,
    truncate: TruncateOption = "end",
    max_length: MaxTextLength = None,
    batch_size: BatchSize = 64,
    base: Base = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    device: Device = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the layers first: pays off for thousands of texts.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Embed texts."""
    from gemify.io.vectors import check_format, write_vectors
    from gemify.model.encode import format_summary
    from gemify.model.tokenization import require_truncate

    if texts and input is not None:
        raise typer.BadParameter("give texts or --input, not both")
    if output is not None:
        check_format(output)
    require_truncate(truncate)
    listed = [require_utf8(text) for text in texts or ()] or list(_read_texts(input, text_column))
    if not listed:
        raise ValueError("no text given: pass texts as arguments, --input FILE, or lines on stdin")
    gem = load_gem(model, base, dtype, device, quantize, max_length=max_length)
    vectors = gem.encode(
        listed,
        prompt_name=prompt_name,
        prompt=prompt,
        batch_size=batch_size,
        normalize_embeddings=normalize,
        truncate_dim=truncate_dim,
        truncate=cast("Truncate", truncate),
        compile=compile,
        show_progress_bar=not quiet and len(listed) > batch_size,
    )
    report = gem.meter.report()
    if output is None:
        for text, vector in zip(listed, vectors, strict=True):
            print_json({"text": text, "embedding": vector.tolist()})
    else:
        write_vectors(output, listed, vectors, metrics=report)
        typer.echo(str(output))
    if not quiet:
        echo_err(format_summary(report))


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Prompt. [default: stdin]")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    system: SystemPrompt = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    embedding: Annotated[
        bool, typer.Option("--embedding", help="Also print the prompt's embedding (needs --json).")
    ] = False,
    base: Base = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, as the base model does."""
    text = require_utf8(prompt) if prompt is not None else read_stdin()
    if not text.strip():
        raise ValueError("no prompt given: pass one as an argument or on stdin")
    if embedding and not as_json:
        raise typer.BadParameter("--embedding needs --json")
    import torch
    from transformers import TextStreamer

    gem = load_gem(model, base, dtype, device, quantize)
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p)
    if raw or not gem.tokenizer.chat_template:
        prefill = gem.prefill(text)
    else:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
        prefill = gem.prefill_chat(messages)
    if not as_json:
        options["streamer"] = TextStreamer(gem.tokenizer, skip_prompt=True, skip_special_tokens=True)
    vector = {"embedding": gem.embed(prefill).tolist()} if embedding else {}
    answer = gem.generate(prefill, max_new_tokens=max_new_tokens, **options)
    if as_json:
        print_json({"text": answer, **vector})


def recover(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts. [default: the lines of stdin]")] = None,
    max_new_tokens: MaxNewTokens = 64,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Decode texts from the KV cache of their special tokens alone."""
    listed = [require_utf8(text) for text in texts or ()] or list(_read_texts(None, "text"))
    if not listed:
        raise ValueError("no text given: pass texts as arguments, or lines on stdin")
    gem = load_gem(model, base, dtype, device)
    for text, recovered in zip(listed, gem.recover(listed, max_new_tokens=max_new_tokens), strict=True):
        if as_json:
            print_json({"text": text, "recovered": recovered})
        else:
            typer.echo(recovered)


def info(
    model: Annotated[str, typer.Argument(help=GEM_NAME)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the logits with the base model's, bit for bit.")
    ] = False,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show a GEM's configuration; --verify compares its language model with the base model."""
    from gemify.model.config import LATER_FIELDS, GemConfig, resolve_directory

    directory = resolve_directory(model)
    config = GemConfig.from_directory(directory)
    facts: dict[str, Any] = dataclasses.asdict(config)
    facts["bytes"] = sum(f.stat().st_size for f in directory.iterdir() if f.is_file())
    summary = directory / "summary.json"
    if summary.is_file():
        facts["training"] = json.loads(summary.read_text())
    if verify:
        revision = None if base else config.base_revision
        facts["logits_equal_base"] = _logits_equal_base(model, base or config.base, revision, device)
    if as_json:
        print_json(facts)
        return
    for name in LATER_FIELDS:
        if facts[name] == getattr(GemConfig, name):
            del facts[name]
    for name, value in facts.items():
        typer.echo(
            f"{name:20} {json.dumps(value, ensure_ascii=False) if isinstance(value, dict | tuple | list) else value}"
        )


def export(
    model: Model,
    output: OutputDirectory,
    base: Base = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write a GEM as plain directories for sentence-transformers, vLLM, llama.cpp and PEFT (docs/how-to/engines.md)."""
    from gemify.model.config import GemConfig, resolve_directory
    from gemify.model.export import export as write
    from gemify.model.export import require_exportable

    config = GemConfig.from_directory(resolve_directory(model))
    target_dtype = None if dtype == "auto" else dtype
    require_exportable(config, output, target_dtype)  # fails before a model is loaded
    written = write(load_gem(model, base, "auto", "cpu"), output, dtype=target_dtype)
    if as_json:
        print_json({**dataclasses.asdict(written), "directory": str(output)})
        return
    if written.special_tokens:
        echo_err(f"special token: {' '.join(written.special_tokens)}")
    for name in written.embedding:
        echo_err(f"{output / name}: for sentence-transformers and vLLM")
    for name in written.adapters:
        place = "in the embedding pass" if config.tune == "embedding_lora" else "at the special token"
        echo_err(f"{output / name}: acts {place}; vectors without it are untrained")
    typer.echo(str(output))


def _logits_equal_base(model: str, base: str, revision: str | None, device: str | None) -> bool:
    from gemify.evaluation.models import PROBES, same_logits
    from gemify.model.base import load_base

    gem = load_gem(model, base, "auto", device)
    lm, _ = load_base(base, device=device, revision=revision)
    return same_logits(lm, gem.lm, gem.tokenizer, PROBES)


def _read_texts(path: Path | None, column: str) -> Iterator[str]:
    if path is not None:
        from gemify.training.examples import Source

        for row, example in enumerate(Source(str(path), column, keep_empty=True)):
            if example.second is not None:
                raise ValueError(f"{path} row {row + 1}: no column {column!r}: set --text-column")
            yield example.text
    elif not sys.stdin.isatty():
        yield from stdin_lines()


def cache(
    action: Annotated[str, typer.Argument(help="show lists the models, clear removes them.")] = "show",
    as_json: Json = False,
) -> None:
    """Show or clear the cache of converted GGUF models ($GEMIFY_HOME, or gemify in the user's cache directory)."""
    if action not in ("show", "clear"):
        raise typer.BadParameter(f"the action must be show or clear, got {action!r}")
    from gemify.model import gguf_cache

    if action == "clear":
        freed = gguf_cache.clear()
        if as_json:
            print_json({"path": str(gguf_cache.cache_directory()), "freed_bytes": freed})
        else:
            echo_err(f"removed {freed / 1e6:,.0f} MB")
        return
    entries = gguf_cache.list_entries()
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        listed = [{"path": str(entry.path), "bytes": entry.size_bytes} for entry in entries]
        print_json({"path": str(gguf_cache.cache_directory()), "entries": listed, "bytes": total})
        return
    for entry in entries:
        typer.echo(f"{entry.path.name}  {entry.size_bytes / 1e6:,.0f} MB")
    typer.echo(f"{len(entries)} models, {total / 1e6:,.0f} MB in {gguf_cache.cache_directory()}")
