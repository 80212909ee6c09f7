"""`gemify bench peers`: which servers it compares, and what it records of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import tiny_models
from gemify.bench.peers import COLUMNS, bench_peers, list_peers, plot, to_markdown
from gemify.bench.timing import rows_by_name
from gemify.model.base import starter_gguf
from tiny_gems import make_gem

LLAMA_CPP = os.environ.get("GEMIFY_LLAMA_CPP_PYTHON")


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-python is no interpreter: give --llama-cpp"):
        list_peers("starter", llama_cpp="no-python", gguf=tmp_path)
    with pytest.raises(ValueError, match=r"llama.cpp needs a GGUF file, and got .*: give --gguf"):
        list_peers("starter", llama_cpp=sys.executable, gguf=tmp_path / "none.gguf")
    with pytest.raises(ValueError, match=r"1 requests hold no (chat|embedding): send more"):
        bench_peers(list_peers("starter"), requests=1)


@pytest.mark.long
def test_every_server_has_its_figures(tmp_path: Path, minilm: Path) -> None:
    """llama.cpp's too, where GEMIFY_LLAMA_CPP_PYTHON names an environment with xllamacpp."""
    gem = make_gem(tiny_models.save(tmp_path / "base"))
    gem.save_pretrained(tmp_path / "gem")
    peers = list_peers(str(tmp_path / "gem"), encoder=str(minilm), llama_cpp=LLAMA_CPP, gguf=starter_gguf(), clients=4)
    report = bench_peers(peers, requests=8, clients=4, max_tokens=4, threads=1, rounds=1, show_progress_bar=False)
    rows = rows_by_name(report)
    assert list(rows) == ["gemify", *(["llama.cpp"] if LLAMA_CPP else []), "sentence-transformers"]
    encodes_only = {"one_stream", "streams", "mixed"}
    for name, row in rows.items():
        wanted = set(COLUMNS) - (encodes_only if name == "sentence-transformers" else set())
        assert set(row) == wanted
        assert all(value > 0 for key, value in row.items() if key != "name")
        assert f"| {name} |" in to_markdown(report)
    assert [text.get_text() for text in plot(report, "streams").axes[0].get_yticklabels()] == list(rows)[:-1]
