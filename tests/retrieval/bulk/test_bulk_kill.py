"""SIGKILL at random moments, a Ray worker killed half-way: the same call ends with the corpus of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from embedding_child import embed

from children import killed_at
from gemify import GemModel
from gemify.retrieval.bulk.run import EmbedReport, embed_corpus
from rows_of_words import read_back, write_inputs
from tiny_gems import save_gem

POINTS = 8


@pytest.fixture
def model(tmp_path: Path, base_dir: Path) -> Path:
    return save_gem(base_dir, tmp_path / "gem")


def again(model: Path, output: Path, inputs: list[Path], **options: object) -> EmbedReport:
    return embed_corpus(
        inputs,
        output,
        GemModel.from_pretrained(model),
        model_name=str(model),
        shard_rows=16,
        **options,  # type: ignore[arg-type]
    )


def data_files(output: Path) -> int:
    return len(list((output / "corpus.lance" / "data").iterdir()))


@pytest.mark.usefixtures("one_thread")
def test_killed_anywhere_a_corpus_is_the_same(tmp_path: Path, model: Path, server: ForkServerContext) -> None:
    """A moment is a step of writing and some time after."""
    inputs = write_inputs(tmp_path / "in")

    def run(output: Path, **when: Any) -> tuple[int, int]:
        return killed_at(server, embed, str(model), str(output), inputs, **when)

    steps, code = run(tmp_path / "whole")
    assert code == 0
    whole = read_back(tmp_path / "whole")
    assert whole["id"].to_pylist() == [f"d{n}" for n in range(150)]
    chance, killed, begun = random.Random(3), 0, 0
    for point in range(POINTS):
        output = tmp_path / f"out{point}"
        _, code = run(output, kill_after=chance.randrange(1, steps), wait=chance.uniform(0, 0.01))
        killed += code == -signal.SIGKILL
        done = len(list((output / "done").glob("[0-9]*.json"))) if (output / "done").is_dir() else 0
        begun += 0 < done < 11
        report = again(model, output, inputs)
        assert (report.rows, report.left) == (150, 0)
        assert report.embedded < 150 or done == 0
        assert read_back(output).equals(whole)
        assert data_files(output) == data_files(tmp_path / "whole"), "what a killed run left is swept away"
    assert killed > POINTS // 2
    assert begun, "some were killed with some of the shards done"


@pytest.mark.usefixtures("one_thread")
def test_a_killed_ray_worker_changes_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of a real Ray; one is killed as soon as a few shards are done."""
    ray = pytest.importorskip("ray", reason="the executor ray needs Ray: pip install 'gemify[ray]'")
    from gemify.retrieval.bulk.executors import ShardWorker

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    inputs, output = write_inputs(tmp_path / "in", 300), tmp_path / "out"
    whole = again(model, tmp_path / "whole", inputs)
    pids = tmp_path / "pids"
    pids.mkdir()

    class Telling(ShardWorker):
        """Leaves its process id where the test finds it, and takes its time."""

        def __call__(self, batch: dict) -> dict:  # type: ignore[type-arg]
            (pids / str(os.getpid())).touch()
            time.sleep(0.1)
            return super().__call__(batch)

    monkeypatch.setattr("gemify.retrieval.bulk.executors.ShardWorker", Telling)
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        while not killed and not over.wait(0.02):
            there = sorted(int(p.name) for p in pids.iterdir())
            if len(there) == 2 and len(list(output.glob("done/[0-9]*.json"))) >= 4:
                os.kill(there[0], signal.SIGKILL)
                killed.append(there[0])

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        report = again(model, output, inputs, executor="ray", workers=2)
    except RuntimeError as error:
        if "Ray did not start" in str(error):
            pytest.skip(f"this machine is too busy: {error}")
        raise
    finally:
        over.set()
    assert not ray.is_initialized(), "a Ray of our own is shut down"
    assert killed, "one was killed half-way"
    assert {p.name for p in pids.iterdir()} >= {str(killed[0])}
    assert (report.rows, report.left, report.embedded) == (300, 0, whole.embedded)
    assert read_back(output).equals(read_back(tmp_path / "whole"))
    assert data_files(output) == data_files(tmp_path / "whole")
