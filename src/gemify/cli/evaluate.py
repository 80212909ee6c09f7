"""The verbs that measure: `gemify eval`, `report` and `reproduce`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from gemify.cli.options import Base, BatchSize, Device, ExactDtype, Quantize, Quiet, echo_err, print_json

Limit = Annotated[int | None, typer.Option(min=2, help="Rows per task: a subset run, labelled as such in all results.")]
Data = Annotated[
    Path | None, typer.Option(help="Directory of local data (mteb/, lm/, text/); none: the Hugging Face hub.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory of the results; what is there is not run again.")
]


def evaluate(
    output: Output,
    model: Annotated[str | None, typer.Option("--model", "-m", help="starter, a GEM directory or a repo id.")] = None,
    suite: Annotated[str, typer.Option(help="quick, gem16, llm2vec15, mteb, lm or all.")] = "quick",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="A task by name instead of a suite's; may be repeated.")
    ] = None,
    data: Data = None,
    baselines: Annotated[
        str, typer.Option(help="On the same base: mean,weighted-mean,last,prompteol,echo, or all.")
    ] = "",
    encoder: Annotated[
        list[str] | None, typer.Option(help="st:PATH or st:NAME, a sentence-transformers model; may be repeated.")
    ] = None,
    base: Base = None,
    instructions: Annotated[
        bool, typer.Option("--instructions/--no-instructions", help="Put each task's instruction before its texts.")
    ] = False,
    limit: Limit = None,
    dtype: ExactDtype = "float32",
    quantize: Quantize = "none",
    batch_size: BatchSize = 64,
    card: Annotated[
        bool, typer.Option("--card", help="Write the results into the GEM's model card (README.md).")
    ] = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure both sides: vectors, language kept, recovery, cost; compared with the base and any baselines."""
    from gemify.evaluation.baselines import BASELINES
    from gemify.evaluation.report.render import write_card, write_report
    from gemify.evaluation.results import ResultStore
    from gemify.evaluation.suite import Plan
    from gemify.evaluation.suite import evaluate as run

    if card and model is None:
        raise typer.BadParameter("--card needs --model")
    if card and model is not None and not Path(model).is_dir():
        raise typer.BadParameter(f"--card writes into the GEM's own directory, and {model} is none")
    chosen = list(BASELINES) if baselines == "all" else [b.strip() for b in baselines.split(",") if b.strip()]
    try:
        entries = run(
            model,
            plan=Plan.of(suite, data=data, tasks=task or ()),
            output=output,
            data=data,
            baselines=chosen,
            encoders=encoder or (),
            base=base,
            limit=limit,
            dtype=dtype,
            quantize=quantize,
            device=device,
            instructions=instructions,
            batch_size=batch_size,
            show_progress_bar=not quiet,
            on_estimate=_estimate,
        )
    except BaseException:
        if (output / "models").is_dir():
            with contextlib.suppress(Exception):  # a report that fails must not hide why the evaluation did
                write_report([output], output)
        raise
    for path in write_report([output], output):
        if path.suffix in (".md", ".html"):
            typer.echo(str(path))
    if card and model is not None:
        typer.echo(str(write_card(Path(model), ResultStore(output), entries[0])))


def report(
    directories: Annotated[list[Path], typer.Argument(help="Result directories of `gemify eval`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report goes.")] = Path("report"),
) -> None:
    """Put evaluations side by side: Markdown, a self-contained page, plots."""
    from gemify.evaluation.report.render import write_report

    for path in write_report(directories, output):
        typer.echo(str(path))


def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6 of the paper (6: Appendix B, recovery).")],
    output: Output,
    training_data: Annotated[str, typer.Option("--training-data", help="Text to train on; see `gemify train --data`.")],
    data: Data = None,
    scale: Annotated[str, typer.Option(help="starter (a laptop), or paper (a GPU and the hub).")] = "starter",
    base: Annotated[str | None, typer.Option("--base", help="Another base model than the scale's.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Other training steps than the scale's.")] = None,
    limit: Limit = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is left to run as JSON, and run nothing.")
    ] = False,
) -> None:
    """Run one of the paper's tables, and show its figures with ours."""
    from gemify.io.signals import StopRequestedError
    from gemify.reproduce.run import estimate_seconds, plan_cells
    from gemify.reproduce.run import reproduce as run

    options: dict[str, Any] = {"scale": scale, "base": base, "steps": steps, "limit": limit}
    cells = plan_cells(table, output=output, training_data=training_data, **options)
    if as_json:
        print_json([{"name": c.name, "label": c.label, "steps": c.steps} for c in cells])
        return
    seconds = estimate_seconds(cells, output)
    echo_err(f"{len(cells)} cells to run" + (f", about {_minutes(seconds)}" if seconds else ""))
    try:
        path = run(
            table,
            output=output,
            data=data,
            training_data=training_data,
            device=device,
            show_progress_bar=not quiet,
            on_cell=lambda cell: echo_err(f"{table}: {cell.label}"),
            **options,
        )
    except StopRequestedError as stopped:
        raise ValueError(str(stopped)) from stopped
    typer.echo(str(path))


def _estimate(pending: int, cells: int, seconds: float) -> None:
    if pending:
        echo_err(f"{pending} of {cells} cells to run, about {_minutes(seconds)}")
    else:
        echo_err(f"all {cells} cells are finished")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
