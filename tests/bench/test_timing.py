"""Rounds in turn, ratios of pairs, and the one form of reports."""

from __future__ import annotations

import json

import pytest

from gemify.bench.timing import make_report, median_ratio, percentiles, rows_by_name, rows_table, run_in_turn


def test_jobs_run_in_turn_and_the_warmup_is_not_kept() -> None:
    calls: list[tuple[str, int]] = []

    def job(name: str) -> object:
        return lambda number: calls.append((name, number)) or 10 * number

    runs = run_in_turn({"a": job("a"), "b": job("b")}, rounds=2, warmup=1)  # type: ignore[dict-item]
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert runs["a"].results == runs["b"].results == [10, 20]
    assert len(runs["a"].seconds) == len(runs["b"].cpu_seconds) == 2
    assert all(s >= 0 for s in runs["a"].seconds)


def test_a_ratio_is_the_median_of_each_rounds_own() -> None:
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="shorter"):
        median_ratio([1.0], [])


def test_percentiles_have_names() -> None:
    assert percentiles([1.0, 2.0, 3.0], (50,), name="load_") == {"load_p50": 2.0}
    assert percentiles([]) == {"p50": 0.0, "p95": 0.0, "p99": 0.0}


def test_a_report_is_json_and_a_table() -> None:
    report = make_report({"texts": 3}, [{"name": "ours", "speed": 1234.5}, {"name": "theirs"}], note="x")
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {"machine", "settings", "rows", "note"}
    assert rows_by_name(report)["ours"]["speed"] == 1234.5
    table = rows_table(report["rows"], {"name": ("encoder", ""), "speed": ("tokens/s", ",.1f")})
    assert table.splitlines()[2] == "| ours | 1,234.5 |"
    assert table.splitlines()[3].startswith("| theirs | ")
