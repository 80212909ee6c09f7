"""`gemify bench train` on a tiny model: what it compares, and what it records. No timing decides anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemify.bench.timing import rows_by_name
from gemify.bench.train import KINDS, bench_train
from gemify.cli.main import app

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_kind_is_timed_against_the_plain_step_on_the_same_tokens(
    base_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = [
        "--base",
        str(base_dir),
        "--steps",
        "2",
        "--batch-size",
        "6",
        "--contrastive-batch-size",
        "4",
        "--device",
        "cpu",
        "-q",
    ]
    outputs = ["-o", str(tmp_path / "record.json"), "--plot", str(tmp_path / "plot.svg")]
    done = CliRunner().invoke(app, ["bench", "train", "--data", str(texts_file), *options, *outputs])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "record.json").read_text())
    rows = rows_by_name(report)
    assert set(rows) == set(KINDS)
    for kind, row in rows.items():
        assert f"| {kind} |" in done.output
        assert len(row["ratios"]) == len(row["cpu_ratios"]) == 2
        assert row["seconds"] > 0
        assert row["tokens"] >= row["plain_tokens"] > 0
        assert abs(row["tokens"] - row["plain_tokens"]) <= 2 * 6  # ours holds a special token in some rows
    assert rows["contrastive"]["tokens"] == rows["contrastive"]["plain_tokens"]
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_an_unknown_kind_is_refused(texts_file: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind of step 'fast': choose from full, gated, contrastive"):
        bench_train(str(texts_file), kinds=["fast"])
