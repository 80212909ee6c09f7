"""The command `gemify`: one thin function a verb. Results go to stdout, talk to stderr; exit codes 0, 1, 2."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gemify import __version__
from gemify.cli_ask import register as register_ask
from gemify.cli_bench import bench
from gemify.cli_bench_encode import register as register_bench_encode
from gemify.cli_bench_gpu import register as register_bench_gpu
from gemify.cli_corpus import register as register_corpus
from gemify.cli_evaluation import register as register_evaluation
from gemify.cli_export import register as register_export
from gemify.cli_rag import register as register_rag
from gemify.cli_serve import register as register_serve

app = typer.Typer(
    name="gemify",
    help="One LLM that writes and embeds: train, embed, generate, recover, and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="starter, starter-multi, a GEM directory or a Hugging Face repo id.")
]
Base = Annotated[str | None, typer.Option("--base", help="Look for the base model here instead.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... [default: the accelerator if there is one]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run and of the finished GEM.")],
    data: Annotated[
        str | None, typer.Option(help=".txt, .jsonl or .parquet file, or a Hugging Face data set name.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "--model", "-m", help="Model to convert: directory, repo id, .gguf, or starter."),
    ] = None,
    tune: Annotated[str | None, typer.Option(help="gated, tokens, lora or full.")] = None,
    preset: Annotated[str, typer.Option(help="default, or paper (GEM, Section 4.2).")] = "default",
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    ntp_steps: Annotated[int | None, typer.Option(help="Steps of next-token prediction before the contrast.")] = None,
    ramp_steps: Annotated[int | None, typer.Option(help="Steps over which alpha rises (0: a jump).")] = None,
    alpha_final: Annotated[float | None, typer.Option(help="Weight of the contrastive loss at the end.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a next-token batch.")] = None,
    contrastive_batch_size: Annotated[int | None, typer.Option(help="Rows of a contrastive batch.")] = None,
    contrastive_chunk_size: Annotated[int | None, typer.Option(help="Rows of it held at a time (GradCache).")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Batches an optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate while alpha is 0.")] = None,
    contrastive_lr: Annotated[float | None, typer.Option(help="Learning rate after.")] = None,
    special_tokens: Annotated[int | None, typer.Option("--special-tokens", "-k", help="How many of them.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or concat, over the special tokens.")] = None,
    template: Annotated[str | None, typer.Option(help="Words around texts to embed, {text} for the text.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer that vectors are read from; none: the last.")] = None,
    mix: Annotated[float | None, typer.Option(help="p, the share of raw rows (lora, full).")] = None,
    reconstruction: Annotated[float | None, typer.Option(help="Share of reconstruction among special rows.")] = None,
    view: Annotated[str | None, typer.Option(help="How views are made: delete, mask, span or halves.")] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Share of tokens a view drops.")] = None,
    drop_both: Annotated[
        bool | None, typer.Option("--drop-both/--drop-one", help="Drop from both views, or one.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout inside the adapter.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a training text.")] = None,
    min_length: Annotated[int | None, typer.Option(help="Fewest tokens of a training text.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face data set.")] = None,
    eval_pairs: Annotated[str | None, typer.Option(help="STS pairs (.jsonl) to score during training.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between two scorings.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory (lora, full)."),
    ] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager or flex_attention (GPUs).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a language model into a GEM."""
    given = {k: v for k, v in locals().items() if v is not None}
    for name in ("output", "preset", "config", "resume", "device", "quiet", "as_json"):
        given.pop(name, None)
    from gemify.model.meter import in_words
    from gemify.training.processes import rank as process
    from gemify.training.recipe import PRESETS, Recipe
    from gemify.training.trainer import Stopped
    from gemify.training.trainer import train as run

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    from_file = Recipe.from_yaml(config) if config is not None else {}
    recipe = Recipe.of({**PRESETS[preset], **from_file, **given}, source=str(config or "the flags"))
    try:
        _, summary = run(recipe, output, resume=resume, device=device, show_progress_bar=not quiet)
    except Stopped as stopped:
        _fail(str(stopped))
    if process() > 0:
        return  # the first of the run's processes speaks for all
    if as_json:
        _print({"output": str(output), **summary})
        return
    _say(f"trained {summary['trainable_parameters']:,} parameters for {summary['steps']} steps: {in_words(summary)}")
    if "sts_spearman" in summary:
        _say(f"STS Spearman {summary['sts_spearman']:.2f}")
    typer.echo(str(output))


@app.command()
def pairs(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl file to write: anchor, positive, task.")],
    data: Annotated[str, typer.Option(help="Texts: .txt, .jsonl or .parquet file, or a Hugging Face data set name.")],
    base: Annotated[
        str, typer.Option("--base", "--model", "-m", help="Who writes: directory, repo id, .gguf, or starter.")
    ] = "starter",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="paraphrase, question or keywords; repeatable.")
    ] = None,
    count: Annotated[int, typer.Option(help="Texts to write about.")] = 10_000,
    skip: Annotated[int, typer.Option(help="Texts to leave out at the beginning.")] = 0,
    min_length: Annotated[int, typer.Option(help="Fewest tokens of a text.")] = 8,
    max_length: Annotated[int, typer.Option(help="Most tokens of a text; longer ones are left out.")] = 64,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUTPUT.part.")] = False,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let a language model write pairs for contrast: paraphrases, questions, search words of plain texts."""
    from gemify.training.writing import Order, write_pairs

    order = Order(base, data, tuple(task or ["paraphrase"]), count, skip, min_length, max_length, text_column)
    counts = write_pairs(order, output, resume=resume, device=device, precision=precision, show_progress_bar=not quiet)
    if as_json:
        _print({"output": str(output), "pairs": counts})
        return
    _say(", ".join(f"{n:,} {name} pairs" for name, n in counts.items()))
    typer.echo(str(output))


@app.command()
def embed(
    model: Model,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none: read --input or stdin, a text a line.")
    ] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help=".txt, .jsonl or .parquet file, a text a row.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy, .jsonl or .parquet; none: JSONL to stdout.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Prompt of the model to put before every text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt to put before every text.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep the first so many dimensions.")] = None,
    batch_size: Annotated[int, typer.Option(help="Most texts a batch.")] = 64,
    base: Base = None,
    device: Device = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the layers first: worth it for thousands of texts.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Embed texts."""
    from gemify.evaluation.vectors import check_format, write_vectors
    from gemify.model.meter import in_words

    if texts and input is not None:
        raise typer.BadParameter("give texts or --input, not both")
    if output is not None:
        check_format(output)
    listed = list(texts) if texts else list(_read_texts(input, text_column))
    if not listed:
        raise ValueError("no text given: pass texts as arguments, --input FILE, or lines on stdin")
    gem = _load(model, base, device)
    vectors = gem.encode(
        listed,
        prompt_name=prompt_name,
        prompt=prompt,
        batch_size=batch_size,
        normalize_embeddings=normalize,
        truncate_dim=truncate_dim,
        compile=compile,
        show_progress_bar=not quiet and len(listed) > batch_size,
    )
    report = gem.meter.report()
    if output is None:
        for text, vector in zip(listed, vectors, strict=True):
            _print({"text": text, "embedding": vector.tolist()})
    else:
        write_vectors(output, listed, vectors, metrics=report)
        typer.echo(str(output))
    if not quiet:
        _say(in_words(report))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Prompt; none: read stdin.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat format.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    embedding: Annotated[
        bool, typer.Option("--embedding", help="Also give the prompt's embedding (with --json).")
    ] = False,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, as the base model does."""
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise ValueError("no prompt given: pass one as an argument or on stdin")
    if embedding and not as_json:
        raise typer.BadParameter("--embedding needs --json")
    import torch
    from transformers import TextStreamer

    gem = _load(model, base, device)
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p)
    if raw or not gem.tokenizer.chat_template:
        handle = gem.prefill(text)
    else:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
        handle = gem.prefill_chat(messages)
    if not as_json:
        options["streamer"] = TextStreamer(gem.tokenizer, skip_prompt=True, skip_special_tokens=True)
    vector = {"embedding": gem.embed(handle).tolist()} if embedding else {}
    answer = gem.generate(handle, max_new_tokens=max_new_tokens, **options)
    if as_json:
        _print({"text": answer, **vector})


@app.command()
def recover(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: lines on stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest recovery.")] = 64,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Decode texts from their special tokens alone: what an embedding's KV remembers."""
    listed = list(texts) if texts else list(_read_texts(None, "text"))
    if not listed:
        raise ValueError("no text given: pass texts as arguments, or lines on stdin")
    gem = _load(model, base, device)
    for text, back in zip(listed, gem.recover(listed, max_new_tokens=max_new_tokens), strict=True):
        if as_json:
            _print({"text": text, "recovered": back})
        else:
            typer.echo(back)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="starter, starter-multi, a GEM directory or a Hugging Face repo id.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits with the base model's, bit for bit.")
    ] = False,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what a GEM is, and with --verify that its language model is the base, untouched."""
    import dataclasses

    from gemify.model.config import GemConfig, resolve_directory
    from gemify.model.template import PLAIN

    directory = resolve_directory(model)
    config = GemConfig.from_directory(directory)
    facts: dict[str, Any] = dataclasses.asdict(config)
    facts["bytes"] = sum(f.stat().st_size for f in directory.iterdir() if f.is_file())
    summary = directory / "summary.json"
    if summary.is_file():
        facts["training"] = json.loads(summary.read_text())
    if verify:
        facts["logits_equal_base"] = _verify(model, base or config.base, None if base else config.base_revision, device)
    if as_json:
        _print(facts)
        return
    if config.template == PLAIN:
        del facts["template"]
    if config.layer is None:
        del facts["layer"]
    for name, value in facts.items():
        typer.echo(
            f"{name:20} {json.dumps(value, ensure_ascii=False) if isinstance(value, dict | tuple | list) else value}"
        )


register_evaluation(app)
register_corpus(app)
register_rag(app)
register_ask(app)
register_serve(app)
register_export(app)
register_bench_gpu(bench)
register_bench_encode(bench)
app.add_typer(bench, name="bench")


def _verify(model: str, base: str, revision: str | None, device: str | None) -> bool:
    from gemify.evaluation.language import PROBES, same_logits
    from gemify.model.base import load_base

    gem = _load(model, base, device)
    lm, _ = load_base(base, device=device, revision=revision)
    return same_logits(lm, gem.lm, gem.tokenizer, PROBES)


def _load(model: str, base: str | None, device: str | None) -> Any:
    from gemify.model.gem import GemModel

    return GemModel.from_pretrained(model, base=base, device=device)


def _read_texts(path: Path | None, column: str) -> Iterator[str]:
    if path is not None:
        from gemify.training.data import Source

        for row, example in enumerate(Source(str(path), column, keep_empty=True)):
            if example.second is not None:
                raise ValueError(f"{path} row {row + 1}: no column {column!r}: set --text-column")
            yield example.text
    elif not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    _say(f"gemify: error: {message.splitlines()[0] if message else 'unknown error'}")
    sys.exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> None:
    """Entry point: every foreseeable failure is one line on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="gemify: %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of our dependencies, to their developers
    debug = bool(os.environ.get("GEMIFY_DEBUG"))
    try:
        app()
    except ModuleNotFoundError as error:
        if debug:
            raise
        _fail(f"{error.name} is not installed: pip install 'gemify[all]'")
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if debug:
            raise
        _fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if debug:
            raise
        _fail(f"{_first_line(error)} (GEMIFY_DEBUG=1 shows where)")
