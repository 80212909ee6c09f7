"""SIGKILL at random moments: the same command again ends with the index of a run that nobody disturbed."""

from __future__ import annotations

import random
import shutil
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from test_index import assert_same

from children import index as index_in_child
from conftest import disturb
from gemify import GemModel
from gemify.rag.index import GemIndex

POINTS = 20


def _corpus(root: Path, *, later: bool) -> Path:
    """Many small files and one that takes several commits; ``later``: some changed, some gone, some new."""
    root.mkdir(exist_ok=True)
    for number in range(12):
        path = root / f"{number}.md"
        if later and number in (3, 7):
            path.unlink(missing_ok=True)
            continue
        word = "changed" if later and number % 4 == 0 else "words"
        path.write_text(f"# Number {number}\n\n" + f"Some {word} about {number}. " * (3 + number))
    count = 90 if later else 60
    rows = (f'{{"_id": "{i}", "text": "row {i} {"x" * (i % 40)}"}}\n' for i in range(count))
    (root / "rows.jsonl").write_text("".join(rows))
    if later:
        (root / "new.txt").write_text("A new file. " * 20)
    return root


@pytest.mark.usefixtures("one_thread")
def test_killed_anywhere(tmp_path: Path, base_dir: Path, server: ForkServerContext) -> None:
    gem = GemModel.from_base(str(base_dir))
    disturb(gem)
    gem.save_pretrained(tmp_path / "gem")
    gem = GemModel.from_pretrained(tmp_path / "gem")
    corpus, settings = _corpus(tmp_path / "corpus", later=False), {"tokens": 48, "overlap": 8}
    old = tmp_path / "old"
    GemIndex.open(old, gem, **settings).add(corpus, commit_tokens=300)  # type: ignore[arg-type]
    _corpus(corpus, later=True)
    begin = time.perf_counter()
    whole = GemIndex.open(tmp_path / "whole", gem, **settings)  # type: ignore[arg-type]
    whole.add(corpus, commit_tokens=300)
    span = 1.3 * (time.perf_counter() - begin)
    chance, finished, halves = random.Random(5), 0, 0
    for point in range(POINTS):
        store = tmp_path / f"store{point}"
        if point % 2:  # a store to bring up to date, instead of a new one
            shutil.copytree(old, store)
        ours, theirs = server.Pipe()
        child = server.Process(target=index_in_child, args=(str(tmp_path / "gem"), str(store), str(corpus), theirs))
        child.start()
        theirs.close()
        assert ours.recv() == "ready"
        if not ours.poll(chance.uniform(0, span)):
            child.kill()
        child.join()
        finished += child.exitcode == 0
        again = GemIndex.open(store, gem, **settings)  # type: ignore[arg-type]
        halves += bool(again.store.uncounted())
        again.add(corpus, commit_tokens=300)
        assert_same(again, whole, atol=1e-5)
        scores = [round(p.score, 4) for p in again.search("changed words about 4", mode="fts", k=5)]
        assert scores == [round(p.score, 4) for p in whole.search("changed words about 4", mode="fts", k=5)]
        shutil.rmtree(store)
    assert finished <= POINTS // 2, "most children were killed before they had done"
    assert halves, "some were killed between a commit of chunks and that of their file"
