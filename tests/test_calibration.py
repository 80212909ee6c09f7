"""The harness gives the figures that others give: real models, real data, through `gemify eval`."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import SHARED
from gemify.evaluation.results import ResultStore
from gemify.evaluation.suite import Plan, evaluate

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (SHARED / "mteb").is_dir(), reason="needs the evaluation data, see tests/conftest.py"),
]


def test_minilm_scores_its_published_figure(minilm: Path, tmp_path: Path) -> None:
    (entry,) = evaluate(
        None,
        plan=Plan(("STSBenchmark",)),
        output=tmp_path,
        data=SHARED,
        encoders=[f"st:{minilm}"],
        show_progress_bar=False,
    )
    assert ResultStore(tmp_path).scores(entry)["STSBenchmark"]["score"] == pytest.approx(82.03, abs=0.05)


def test_the_mean_pooled_base_scores_what_it_did(tmp_path: Path) -> None:
    (entry,) = evaluate(
        None,
        plan=Plan(("STSBenchmark",)),
        output=tmp_path,
        data=SHARED,
        base="starter",
        baselines=["mean"],
        dtype="bfloat16",
        show_progress_bar=False,
    )
    assert ResultStore(tmp_path).scores(entry)["STSBenchmark"]["score"] == pytest.approx(37.15, abs=0.1)
