"""`gemify bench serve` with real servers of a tiny model: what it compares, and what it records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_models
from gemify.bench.serve import ServerSettings, bench_serve
from gemify.bench.timing import rows_by_name
from gemify.cli.main import app
from tiny_gems import make_gem


def test_every_arrangement_of_servers_answers_the_same_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gem = make_gem(tiny_models.save(tmp_path / "base"))
    gem.save_pretrained(tmp_path / "gem")
    flags = ["--num-requests", "12", "--max-concurrency", "4", "--max-new-tokens", "3", "--rounds", "1", "-q"]
    command = ["bench", "serve", "-m", str(tmp_path / "gem"), *flags, "-o", str(tmp_path / "record.json")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "record.json").read_text())
    rows = rows_by_name(record)
    assert list(rows) == ["one", "chat alone", "embeddings alone", "two"]
    for name, row in rows.items():
        assert f"| {name} |" in done.output
        assert (row["generated_tokens_per_second"] > 0) is (name != "embeddings alone")
        assert (row["embedded_tokens_per_second"] > 0) is (name != "chat alone")
        assert row["peak_memory_mb"] > 0
        assert row["first_token_p50"] <= row["first_token_p95"] <= row["first_token_p99"]
    assert record["ratios"]["memory, one / two"] < 1
    assert record["settings"]["requests"] == 12


def test_traffic_of_one_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 requests hold no (chat|embedding): send more"):
        bench_serve(ServerSettings("missing"), requests=1)
