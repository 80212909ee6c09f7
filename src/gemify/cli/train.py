"""The verbs that make a GEM: `gemify train` and `pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemify.cli.options import Device, Json, Quiet, echo_err, fail, print_json


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
    from gemify.model.throughput import format_summary
    from gemify.training.distributed import rank as process
    from gemify.training.recipe import PRESETS, Recipe
    from gemify.training.trainer import Stopped
    from gemify.training.trainer import train as run

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    from_file = Recipe.read_yaml(config) if config is not None else {}
    recipe = Recipe.from_dict({**PRESETS[preset], **from_file, **given}, source=str(config or "the flags"))
    try:
        _, summary = run(recipe, output, resume=resume, device=device, show_progress_bar=not quiet)
    except Stopped as stopped:
        fail(str(stopped))
    if process() > 0:
        return  # the first of the run's processes speaks for all
    if as_json:
        print_json({"output": str(output), **summary})
        return
    echo_err(
        f"trained {summary['trainable_parameters']:,} parameters for {summary['steps']} steps: {format_summary(summary)}"
    )
    if "sts_spearman" in summary:
        echo_err(f"STS Spearman {summary['sts_spearman']:.2f}")
    typer.echo(str(output))


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
    from gemify.training.synthetic_pairs import PairConfig, write_pairs

    order = PairConfig(base, data, tuple(task or ["paraphrase"]), count, skip, min_length, max_length, text_column)
    counts = write_pairs(order, output, resume=resume, device=device, precision=precision, show_progress_bar=not quiet)
    if as_json:
        print_json({"output": str(output), "pairs": counts})
        return
    echo_err(", ".join(f"{n:,} {name} pairs" for name, n in counts.items()))
    typer.echo(str(output))
