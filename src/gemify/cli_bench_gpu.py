"""The verb `gemify bench gpu`: training and encoding against what the device can do."""

from __future__ import annotations

from typing import Annotated

import typer

from gemify.cli_bench import Device, Dtype, Json, Output, give


def gpu(
    shape: Annotated[
        list[str] | None, typer.Option(help="1b, 8b (Llama's, random weights) or tiny; may be repeated. [1b, 8b]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Columns of a batch.")] = 16384,
    train_length: Annotated[int, typer.Option(min=4, help="Tokens of a row to train on.")] = 2048,
    encode_length: Annotated[int, typer.Option(min=2, help="Tokens of a text to encode.")] = 512,
    lengths: Annotated[str, typer.Option(help="Of the rows whose memory is measured.")] = "1024,2048,4096,8192",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    matmul: Annotated[int, typer.Option(min=1, help="Side of the matrices that show the ceiling.")] = 8192,
    attention: Annotated[str, typer.Option(help="sdpa, eager or flex_attention.")] = "sdpa",
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of the device on paper. [default: by its name]")
    ] = None,
    dtype: Dtype = "bfloat16",
    output: Output = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """FLOP utilisation of training and encoding at real shapes, and how memory grows with a row."""
    from gemify.bench.gpu import Setup, as_table, bench_gpu, require_device
    from gemify.evaluation.subjects import Settings

    try:
        rows = tuple(int(length) for length in lengths.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--lengths must be whole numbers with commas between, got {lengths!r}") from error
    setup = Setup(
        require_device(device),
        dtype=Settings(dtype).torch_dtype,
        attention=attention,
        tokens=tokens,
        train_length=train_length,
        encode_length=encode_length,
        lengths=rows,
        rounds=rounds,
        matmul=matmul,
        peak_tflops=peak_tflops,
    )
    report = bench_gpu(shape or ["1b", "8b"], setup)
    give(report, as_table(report), output, as_json)


def register(bench: typer.Typer) -> None:
    bench.command()(gpu)
