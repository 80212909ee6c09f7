"""`gemify bench encode` at tiny size: the encoders, their vectors and the record. No timing is judged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemify import GemModel
from gemify.bench.encode import ENCODERS, bench_encode, read_texts, to_markdown
from gemify.bench.timing import rows_by_name
from gemify.cli.main import app
from tiny_gems import make_gem, randomize

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [f"text number {i} " + "word " * (i % 5) for i in range(8)]
QUICK = [name for name in ENCODERS if "compiled" not in name]


def test_all_encoders_on_a_gated_model(gem: GemModel, tmp_path: Path) -> None:
    gem.save_pretrained(tmp_path / "gem")
    report = bench_encode(str(tmp_path / "gem"), TEXTS, encoders=QUICK, rounds=2, show_progress_bar=False)
    rows = rows_by_name(report)
    assert list(rows) == QUICK
    tokens = sum(len(ids) + 1 for ids in gem.text_tokenizer(TEXTS, max_tokens=None))
    assert report["settings"]["tokens"] == tokens
    assert report["settings"]["texts"] == 8
    ours, theirs = rows["gemify"], rows["sentence-transformers"]
    assert ours["max_difference"] < 1e-4  # the export has our vectors
    assert theirs["speedup"] == theirs["cpu_speedup"] == 1.0
    longest = max(len(ids) + 1 for ids in gem.text_tokenizer(TEXTS, max_tokens=None))
    assert theirs["padding"] == pytest.approx(1 - tokens / (8 * longest), abs=1e-4)  # one batch of its 32
    assert ours["padding"] < theirs["padding"]
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["tokens_per_second"] > 0
    assert all(name in to_markdown(report) for name in QUICK)


def test_a_gem_with_an_embedding_pass_of_its_own(base_dir: Path, tmp_path: Path) -> None:
    """Its export holds merged weights and is no GEM: ours is the GEM itself, with the same vectors."""
    own = make_gem(base_dir, tune="embedding_lora", special_tokens=0, attention="bidirectional")
    own.save_pretrained(tmp_path / "gem")
    report = bench_encode(str(tmp_path / "gem"), TEXTS, encoders=QUICK, rounds=1, show_progress_bar=False)
    rows = rows_by_name(report)
    assert list(rows) == [name for name in QUICK if name != "gemify, gated"]
    assert rows["gemify"]["max_difference"] < 1e-4


def test_the_plain_encoder_has_the_trained_row(gem: GemModel, tmp_path: Path) -> None:
    """Of a gated model the export keeps the special token's row: another row, other vectors."""
    from gemify.bench.encode import without_gate

    expected = gem.adapter.rows.rows_KD.clone() if gem.adapter else None
    plain = without_gate(gem)
    assert plain.config.tune == "tokens"
    assert plain.adapter is not None
    assert (plain.adapter.rows.rows_KD == expected).all()
    before = plain.encode(TEXTS[:2])
    randomize(plain, seed=5)
    assert abs(plain.encode(TEXTS[:2]) - before).max() > 1e-3


def test_several_special_tokens_are_refused(base_dir: Path, tmp_path: Path) -> None:
    GemModel.from_base(str(base_dir), tune="tokens", special_tokens=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="2 special tokens is as many encoders"):
        bench_encode(str(tmp_path / "two"), TEXTS, show_progress_bar=False)
    with pytest.raises(ValueError, match="unknown encoder 'fast'"):
        bench_encode("starter", TEXTS, encoders=["fast"], show_progress_bar=False)


def test_texts_are_taken_evenly(tmp_path: Path) -> None:
    rows = [{"title": f"t{i}", "text": f"body {i}"} for i in range(11)]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(tmp_path, 3) == ["t0 body 0", "t5 body 5", "t10 body 10"]
    assert len(read_texts(tmp_path / "corpus.jsonl.gz", 100)) == 11
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(ValueError, match="row 1: no column 'text'"):
        read_texts(tmp_path / "bad.jsonl", 3)
    with pytest.raises(ValueError, match=r"holds no corpus\.jsonl"):
        read_texts(tmp_path / "nothing", 3)


def test_the_command_writes_record_and_plot(gem: GemModel, tmp_path: Path) -> None:
    gem.save_pretrained(tmp_path / "gem")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out, image = tmp_path / "record.json", tmp_path / "plot.png"
    command = ["bench", "encode", "--data", str(tmp_path / "texts.jsonl"), "-m", str(tmp_path / "gem"), "--rounds", "1"]
    only = ["--only", "gemify", "--only", "sentence-transformers"]
    result = CliRunner().invoke(app, [*command, *only, "-o", str(out), "--plot", str(image), "-q"])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert set(rows_by_name(record)) == {"gemify", "sentence-transformers"}
    assert record["settings"]["rounds"] == 1
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "| gemify |" in result.output


def test_texts_are_read_whole(tmp_path: Path) -> None:
    """What ends a line elsewhere is a character of a text; a file that is none is said in one line."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "owls\u2028hunt"}\r\n{"text": "bees\x85"}\n', encoding="utf-8")
    assert read_texts(path, 5) == ["owls\u2028hunt", "bees\x85".strip()]
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="row 1: not UTF-8 text"):
        read_texts(path, 5)
    whole = gzip.compress(b'{"text": "owls"}\n' * 99)
    for damaged in (b"no gzip", whole[:-9]):
        (tmp_path / "rows.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a damaged \.gz file"):
            read_texts(tmp_path / "rows.jsonl.gz", 5)
