"""The verbs that make a GEM: `gemify train`, `align`, `mine` and `pairs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemify.cli.options import (
    GEM_NAME,
    BaseModel,
    Device,
    Json,
    OutputDirectory,
    Quiet,
    Resume,
    TextColumn,
    TrainingData,
    TrainingPrecision,
    echo_err,
    fail,
    load_gem,
    print_json,
)
from gemify.io.atomic import atomic_file

_SKIP_BAD = typer.Option("--skip-bad", help="Leave malformed rows out, and say how many.")
_NOT_IN_RECIPE = {"output", "preset", "config", "resume", "report_to", "device", "quiet", "as_json"}
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        help="wandb, trackio, mlflow or another that transformers knows, or none; may be repeated."
        " [default: tensorboard, if it is installed]"
    ),
]


def train(
    output: OutputDirectory,
    data: Annotated[
        str | None,
        typer.Option(help="Texts: a .txt, .jsonl, .csv or .parquet file, or a Hugging Face data set's name."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "--model", "-m", help="Model to convert: directory, repo id, .gguf file, or starter."),
    ] = None,
    tune: Annotated[str | None, typer.Option(help="gated, tokens, embedding_lora, lora or full.")] = None,
    preset: Annotated[str, typer.Option(help="default, paper (GEM, Section 4.2) or align.")] = "default",
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    resume: Resume = False,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    ntp_steps: Annotated[int | None, typer.Option(help="Next-token steps before contrastive ones.")] = None,
    ramp_steps: Annotated[int | None, typer.Option(help="Steps over which alpha rises (0: at once).")] = None,
    alpha_final: Annotated[float | None, typer.Option(help="Final weight of the contrastive loss.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a next-token batch.")] = None,
    contrastive_batch_size: Annotated[int | None, typer.Option(help="Rows of a contrastive batch.")] = None,
    num_negatives: Annotated[int | None, typer.Option(help="Hard negatives that a step draws of a row.")] = None,
    contrastive_chunk_size: Annotated[int | None, typer.Option(help="Rows of it at a time (GradCache).")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Batches per optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate while alpha is 0.")] = None,
    contrastive_lr: Annotated[float | None, typer.Option(help="Learning rate after that.")] = None,
    special_tokens: Annotated[int | None, typer.Option("--special-tokens", "-k", help="How many.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or concat, over the special tokens.")] = None,
    attention: Annotated[str | None, typer.Option(help="Of the embedding pass: causal or bidirectional.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Embedding model to learn from: st:DIR or st:NAME.")] = None,
    projection: Annotated[str | None, typer.Option(help="The map into the teacher's space: keep or drop.")] = None,
    template: Annotated[str | None, typer.Option(help="Template of texts to embed, with {text} for the text.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to read vectors from. [default: the last]")] = None,
    mix: Annotated[float | None, typer.Option(help="p, the share of raw rows (lora, full).")] = None,
    reconstruction: Annotated[float | None, typer.Option(help="Share of reconstruction among special rows.")] = None,
    view: Annotated[str | None, typer.Option(help="How views are made: delete, mask, span or halves.")] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Share of tokens that a view drops.")] = None,
    drop_both: Annotated[bool | None, typer.Option("--drop-both/--drop-one", help="Which views drop tokens.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a text.")] = None,
    min_length: Annotated[int | None, typer.Option(help="Minimum tokens of a text.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text, also a dotted name.")] = None,
    skip_bad: Annotated[bool | None, _SKIP_BAD] = None,
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
    quantize: Annotated[str | None, typer.Option(help="Bits of a frozen base: int8 or int4 (CPUs), nf4, none.")] = None,
    text_cache: Annotated[str | None, typer.Option(help="Memory for kept KV of texts, such as 8GB (gated).")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    report_to: ReportTo = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a language model into a GEM."""
    flags = {name: value for name, value in locals().items() if value is not None and name not in _NOT_IN_RECIPE}
    options: dict[str, Any] = {"resume": resume, "device": device, "show_progress_bar": not quiet}
    summary = _run(flags, output, preset, config, report_to=report_to or (), **options)
    if summary is None:
        return
    if as_json:
        print_json({"output": str(output), **summary})
        return
    from gemify.model.encode import format_summary

    echo_err(
        f"trained {summary['trainable_parameters']:,} parameters for {summary['steps']} steps:"
        f" {format_summary(summary)}"
    )
    if "sts_spearman" in summary:
        echo_err(f"STS Spearman {summary['sts_spearman']:.2f}")
    typer.echo(str(output))


def _run(
    flags: dict[str, Any],
    output: Path,
    preset: str,
    config: Path | None,
    **options: Any,
) -> dict[str, Any] | None:
    """Train by the preset, the recipe file and the flags; the last of them wins. The options are those of `train`.

    Returns:
        The summary of the run; None in any but the first of its processes.
    """
    from gemify.io.signals import StopRequestedError
    from gemify.training.distributed import rank
    from gemify.training.recipe import PRESETS, Recipe
    from gemify.training.trainer import train

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    from_file = Recipe.read_yaml(config) if config is not None else {}
    recipe = Recipe.from_dict({**PRESETS[preset], **from_file, **flags}, source=str(config or "the flags"))
    try:
        _, summary = train(recipe, output, **options)
    except StopRequestedError as stopped:
        fail(str(stopped))
    if "skipped_rows" in summary and rank() == 0:
        echo_err(f"skipped {summary['skipped_rows']:,} malformed rows, the first: {summary['first_skipped']}")
    return summary if rank() == 0 else None


def align(
    teacher: Annotated[str, typer.Option(help="The model that wrote the index: st:DIR or st:NAME.")],
    data: Annotated[str | None, typer.Option(help="Texts or pairs to train on, as for gemify train.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the trained GEM.")] = None,
    base: Annotated[
        str, typer.Option(help="Model to convert: directory, repo id, .gguf file, or starter.")
    ] = "starter",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"Train nothing and measure this one: {GEM_NAME}")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Held-out rows with anchor (a question) and positive (its passage) to measure.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a GEM into the space of the embedding model that wrote your index, and say what it finds there."""
    if model is None and (data is None or output is None):
        raise typer.BadParameter("give --data and --output to train, or --model to measure a GEM that there is")
    if model is not None and (data or output or config or max_steps or resume or pairs is None):
        raise typer.BadParameter("--model only measures: it needs --pairs, and no option of training")
    measured = _read_pairs(pairs) if pairs is not None else None  # before hours of training
    record: dict[str, Any] = {"model": model or str(output)}
    if model is None and output is not None:
        flags = {"base": base, "data": data, "teacher": teacher, "max_steps": max_steps}
        flags = {name: value for name, value in flags.items() if value is not None}
        summary = _run(flags, output, "align", config, resume=resume, device=device, show_progress_bar=not quiet)
        if summary is None:
            return
        record |= {"summary": summary}
    if measured is not None:
        record |= _measure_alignment(record["model"], teacher, *measured, device=device)
        if output is not None:
            with atomic_file(output / "alignment.json") as stage:
                stage.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(record)
        return
    if measured is not None:
        echo_err(_alignment_table(record))
    typer.echo(record["model"])


def _read_pairs(path: Path) -> tuple[list[str], list[str], list[int]]:
    """Questions, the passages that differ, and which passage belongs to each question."""
    from gemify.io.rows import load_rows

    rows = load_rows(path, {"anchor": str, "positive": str})
    passages = {row["positive"]: None for row in rows}
    number = {passage: n for n, passage in enumerate(passages)}
    return [row["anchor"] for row in rows], list(passages), [number[row["positive"]] for row in rows]


def _measure_alignment(
    model: str, teacher: str, questions: list[str], passages: list[str], passage_of: list[int], *, device: str | None
) -> dict[str, Any]:
    """Search each pair's passage among all of them, by the GEM's vectors and by the teacher's."""
    from gemify.evaluation.alignment import measure_alignment
    from gemify.training.teacher import Teacher

    gem, by_teacher = load_gem(model, None, "auto", device), Teacher(teacher, device=device)
    query, document = (by_teacher.prompts.get(name, "") for name in ("query", "document"))
    result = measure_alignment(
        (gem.encode_query(questions), gem.encode_document(passages)),
        (by_teacher.vectors(questions, prompt=query), by_teacher.vectors(passages, prompt=document)),
        passage_of,
    )
    return {"teacher": teacher, "questions": len(questions), "passages": len(passages), **result}


def _alignment_table(record: dict[str, Any]) -> str:
    from gemify.io.tables import markdown_table

    rows = [
        (s["questions"], s["passages"], f"{s['ndcg_at_10']:.1f}", f"{s['recall_at_1']:.1f}", f"{s['kept']:.1f} %")
        for s in record["searches"]
    ]
    return (
        f"{record['questions']:,} questions, {record['passages']:,} passages; mean cosine to the teacher's vectors:"
        f" questions {record['question_cosine']:.3f}, passages {record['passage_cosine']:.3f}\n"
        + markdown_table(("questions by", "passages by", "nDCG@10", "recall@1", "of the teacher's"), rows, numeric=True)
    )


def mine(
    data: Annotated[str, typer.Option(help="Pairs: a file of rows or a data set, as for gemify train.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file: anchor, positive, negative_1, ...")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Whose vectors say what is near: st:DIR, st:NAME or a GEM.")
    ] = "starter",
    corpus: Annotated[str | None, typer.Option(help="Texts that are candidates beside the positives.")] = None,
    num_negatives: Annotated[int, typer.Option(help="Negatives of a pair; a pair with fewer is left out.")] = 4,
    range_min: Annotated[int, typer.Option(help="Nearest candidates to leave out: they may be right.")] = 0,
    range_max: Annotated[int | None, typer.Option(help="Nearest candidates to look at. [default: as needed]")] = None,
    max_score: Annotated[float | None, typer.Option(help="Highest cosine of a negative.")] = None,
    absolute_margin: Annotated[float | None, typer.Option(help="Least distance below the positive's cosine.")] = None,
    relative_margin: Annotated[float | None, typer.Option(help="The same as a share of the positive's cosine.")] = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find hard negatives of pairs: passages of other pairs that a model puts near a question."""
    from gemify.training.hard_negatives import MiningConfig
    from gemify.training.hard_negatives import mine as run

    config = MiningConfig(num_negatives, range_min, range_max, max_score, absolute_margin, relative_margin)
    counts = run(data, output, model, config, corpus=corpus, device=device, show_progress_bar=not quiet)
    if as_json:
        print_json({"output": str(output), **counts})
        return
    echo_err(f"{counts['written']:,} of {counts['pairs']:,} pairs, from {counts['candidates']:,} candidates")
    typer.echo(str(output))


def pairs(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write: anchor, positive, task.")],
    data: TrainingData,
    base: BaseModel = "starter",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="paraphrase, question or keywords; may be repeated.")
    ] = None,
    num_texts: Annotated[int, typer.Option(help="Number of texts to write pairs for.")] = 10_000,
    skip: Annotated[int, typer.Option(help="Number of texts to skip first.")] = 0,
    min_length: Annotated[int, typer.Option(help="Minimum tokens of a text; shorter ones are skipped.")] = 8,
    max_length: Annotated[int, typer.Option(help="Maximum tokens of a text; longer ones are skipped.")] = 64,
    text_column: TextColumn = "text",
    skip_bad: Annotated[bool, _SKIP_BAD] = False,
    resume: Resume = False,
    precision: TrainingPrecision = "auto",
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate training pairs with a language model: paraphrases, questions or search words of plain texts."""
    from gemify.training.synthetic_pairs import PairConfig, write_pairs

    tasks = tuple(task or ["paraphrase"])
    config = PairConfig(base, data, tasks, num_texts, skip, min_length, max_length, text_column, skip_bad)
    counts = write_pairs(config, output, resume=resume, device=device, precision=precision, show_progress_bar=not quiet)
    if as_json:
        print_json({"output": str(output), "pairs": counts})
        return
    echo_err(", ".join(f"{n:,} {name} pairs" for name, n in counts.items()))
    typer.echo(str(output))
