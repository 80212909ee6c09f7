"""SIGKILL at random moments: the same command again ends with the index of a run that nobody disturbed."""

from __future__ import annotations

import random
import shutil
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from test_index import assert_same

from children import META, killed_at
from children import index as index_in_child
from gemify import GemModel
from gemify.retrieval.index import GemIndex
from tiny_gems import make_gem

POINTS = 14


def _corpus(root: Path, *, later: bool) -> Path:
    """Many small files and one that takes several commits; ``later``: some changed, some gone, some new."""
    root.mkdir(exist_ok=True)
    for number in range(12):
        path = root / f"{number}.md"
        if later and number in (3, 7):
            path.unlink(missing_ok=True)
            continue
        word = "changed" if later and number % 4 == 0 else "words"
        front = f"---\nlang: de\nyear: {number}\n---\n" if later and number % 3 == 0 else ""
        path.write_text(f"{front}# Number {number}\n\n" + f"Some {word} about {number}. " * (3 + number))
    count = 90 if later else 60
    rows = (f'{{"_id": "{i}", "text": "row {i} {"x" * (i % 40)}"}}\n' for i in range(count))
    (root / "rows.jsonl").write_text("".join(rows))
    if later:
        (root / "new.txt").write_text("A new file. " * 20)
    return root


@pytest.mark.usefixtures("one_thread")
def test_killed_anywhere(tmp_path: Path, base_dir: Path, server: ForkServerContext) -> None:
    """Half of the stores are new, half are brought up to date, where also the metadata of every file changes.

    A moment is a step of writing and some time after. What is killed is a run that watches.
    """
    gem = make_gem(base_dir)
    gem.save_pretrained(tmp_path / "gem")
    gem = GemModel.from_pretrained(tmp_path / "gem")
    corpus, settings = _corpus(tmp_path / "corpus", later=False), {"tokens": 48, "overlap": 8}
    old = tmp_path / "old"
    GemIndex.open(old, gem, **settings).add(corpus, commit_tokens=300)  # type: ignore[arg-type]
    _corpus(corpus, later=True)

    def run(store: Path, **when: Any) -> tuple[int, int]:
        return killed_at(server, index_in_child, str(tmp_path / "gem"), str(store), str(corpus), **when)

    shutil.copytree(old, tmp_path / "updated")
    all_steps = []
    for name in ("new", "updated"):
        steps, code = run(tmp_path / name)
        assert code == 0
        all_steps.append(steps)
    whole = GemIndex.open(tmp_path / "new", gem)
    assert_same(GemIndex.open(tmp_path / "updated", gem), whole, atol=1e-5)
    assert len(whole.search("words", k=100, where="project = 'atlas' and lang = 'de' and year > 0")) > 2
    words = [round(p.score, 4) for p in whole.search("changed words about 4", mode="fts", k=5)]

    chance, killed, halves = random.Random(5), 0, 0
    for point in range(POINTS):
        store = tmp_path / f"store{point}"
        if point % 2:
            shutil.copytree(old, store)
        _, code = run(store, kill_after=chance.randrange(1, all_steps[point % 2]), wait=chance.uniform(0, 0.02))
        killed += code == -signal.SIGKILL
        again = GemIndex.open(store, gem, **settings)  # type: ignore[arg-type]
        halves += bool(again.store.pending_versions())
        again.add(corpus, commit_tokens=300, meta=META)
        assert_same(again, whole, atol=1e-5)
        assert [round(p.score, 4) for p in again.search("changed words about 4", mode="fts", k=5)] == words
        shutil.rmtree(store)
    assert killed > POINTS // 2
    assert halves, "some were killed between a commit of chunks and that of their file"
