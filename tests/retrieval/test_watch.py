"""A watched index is, after any changes, the index of a run over what is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from test_index import assert_same

from bag_of_words import BagOfWords
from gemify.io.signals import StopFlag
from gemify.retrieval.index import GemIndex
from gemify.retrieval.ingest import IndexReport
from gemify.retrieval.watch import watch_files


@contextmanager
def watching(index: GemIndex, *paths: Path) -> Iterator[list[IndexReport]]:
    """Watch in a thread, from after the first report on."""
    stop, reports = StopFlag(), list[IndexReport]()

    def follow() -> None:
        for report in watch_files(index, paths, stop_flag=stop):
            reports.append(report)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        wait_until(lambda: bool(reports))
        yield reports
    finally:
        stop.is_set = True
        thread.join()


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_changes_bursts_renames_and_deletions(tmp_path: Path) -> None:
    root, bag = tmp_path / "docs", BagOfWords()
    (root / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c", "deep/d"):
        (root / f"{name}.txt").write_text(f"File {name} at first.\n")
    (tmp_path / "alone.md").write_text("Alone.\n")
    (tmp_path / "beside.md").write_text("Not asked for.\n")
    index = GemIndex.open(root / "store", bag)  # its own writing must not wake it for ever
    reader = GemIndex.open(root / "store", bag)
    with watching(index, root, tmp_path / "alone.md") as reports:
        assert len(reports[0].added) == 5
        (root / "a.txt").write_text("File a changed.\n")
        wait_until(lambda: len(reports) == 2)
        assert reader.search("changed", mode="fts")
        assert reports[-1].changed == (str(root / "a.txt"),)
        assert reports[-1].unchanged == 0  # others were not looked into
        (tmp_path / "alone.new").write_text("Alone, saved as editors do.\n")
        (tmp_path / "alone.new").replace(tmp_path / "alone.md")
        (tmp_path / "beside.md").write_text("Still not asked for.\n")
        wait_until(lambda: bool(reader.search("editors", mode="fts")))
        bag.embedded.clear()
        (root / "deep").rename(root / "moved")
        wait_until(lambda: str(root / "moved" / "c.txt") in reader.files())
        assert not bag.embedded
        (root / "b.txt").unlink()
        for number in range(200):
            path = root / "new" / str(number % 10) / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Number {number} of a burst.\n")
        wait_until(lambda: len(reader.files()) == 204 and str(root / "b.txt") not in reader.files())
        (root / ".gitignore").write_text("a.txt\n")
        wait_until(lambda: reports[-1].unread.get("excluded") == 1)  # a change that bears on all files
    (root / ".gitignore").unlink()
    fresh = GemIndex.open(root / "fresh", bag)
    fresh.add([root, tmp_path / "alone.md"])
    assert_same(index, fresh)


def test_a_watch_waits_for_another_writer(tmp_path: Path) -> None:
    root = tmp_path / "docs"
    root.mkdir()
    (root / "a.txt").write_text("First.\n")
    index = GemIndex.open(tmp_path / "store", BagOfWords())
    with watching(index, root) as reports:
        with GemIndex.open(tmp_path / "store", None).store.write_lock():  # type: ignore[union-attr]
            (root / "b.txt").write_text("Second.\n")
            time.sleep(1)
            assert len(reports) == 1
            assert len(index.files()) == 1
        wait_until(lambda: len(index.files()) == 2)
