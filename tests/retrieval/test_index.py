"""The index over changing files."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bag_of_words import BagOfWords
from gemify import GemModel
from gemify.io.signals import StopRequestedError
from gemify.retrieval.index import GemIndex

FACTS = {
    "owl.md": "# Owls\n\nOwls hunt mice at night.\n\n## Ears\n\nTheir ears sit at different heights.\n",
    "lark.txt": "Larks sing at dawn.\n",
    "deep/code.py": "def add(a, b):\n    return a + b\n",
    "rows.jsonl": '{"_id": "r1", "title": "Moon", "text": "The moon circles the earth."}\n'
    '{"_id": "r2", "text": "Tides."}\n',
}


def write(root: Path, facts: dict[str, str] = FACTS) -> Path:
    for name, text in facts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def contents(index: GemIndex) -> list[dict[str, Any]]:
    return sorted(index.store.rows(), key=lambda row: (row["file"], row["ordinal"]))


def assert_same(one: GemIndex, two: GemIndex, atol: float = 1e-6) -> None:
    a, b = contents(one), contents(two)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left.pop("vector"), right.pop("vector"), atol=atol)
        assert left == right
    assert {p: (r.version, r.chunks) for p, r in one.store.files().items()} == {
        p: (r.version, r.chunks) for p, r in two.store.files().items()
    }
    assert one.store.pending_versions() == two.store.pending_versions() == {}


def test_files_become_passages_with_places(tmp_path: Path, bag: BagOfWords) -> None:
    root = write(tmp_path / "docs")
    index = GemIndex.open(tmp_path / "store", bag)
    report = index.add(root)
    assert len(report.added) == 4
    assert report.chunks == len(index) == 6
    assert report.tokens > 0
    assert report.tokens_per_second > 0
    for mode in ("vector", "fts", "hybrid"):
        (best, *_) = index.search("mice at night", mode=mode, k=3)  # type: ignore[arg-type]
        assert (best.file, best.location, best.heading) == (str(root / "owl.md"), "lines 1-3", "Owls")
        assert "hunt mice" in best.text
    assert index.search("Moon", mode="fts")[0].location == "row r1"  # by its title, which the text does not hold
    assert [p.file for p in index.search("zebra", mode="fts")] == []


def test_a_vector_at_hand_needs_no_model(tmp_path: Path, bag: BagOfWords) -> None:
    GemIndex.open(tmp_path / "s", bag).add(write(tmp_path / "docs"))
    index = GemIndex.open(tmp_path / "s", None, create=False)
    vector = bag.encode_query("larks sing at dawn")
    assert "Larks" in index.search("", mode="vector", vector=vector)[0].text
    assert "Larks" in index.search("dawn", vector=vector)[0].text
    assert "Larks" in index.search("dawn", mode="fts")[0].text
    with pytest.raises(ValueError, match="needs a model"):
        index.search("dawn")
    with pytest.raises(ValueError, match="needs a model"):
        index.add(tmp_path / "docs")


def test_only_what_changed_is_embedded(tmp_path: Path, bag: BagOfWords) -> None:
    root = write(tmp_path / "docs")
    index = GemIndex.open(tmp_path / "s", bag)
    index.add(root)
    bag.embedded.clear()
    (root / "lark.txt").touch()
    report = index.add(root)
    assert (report.unchanged, report.added, report.changed, report.removed, bag.embedded) == (4, (), (), (), [])
    (root / "lark.txt").write_text("Larks nest on the ground.\n")
    (root / "deep/code.py").unlink()
    (root / "new.txt").write_text("Wrens are loud.\n")
    report = index.add(root)
    assert [Path(p).name for p in (*report.changed, *report.removed, *report.added)] == [
        "lark.txt",
        "code.py",
        "new.txt",
    ]
    assert bag.embedded == ["Larks nest on the ground.", "Wrens are loud."]
    fresh = GemIndex.open(tmp_path / "fresh", bag)
    fresh.add(root)
    assert_same(index, fresh)
    assert not index.search("dawn", mode="fts")


def test_a_moved_directory_keeps_its_passages(tmp_path: Path, bag: BagOfWords) -> None:
    """Nothing is embedded again; what changed beside the move is; what is left behind and gone can be forgotten."""
    root = write(tmp_path / "docs")
    (root / "o'brien.txt").write_text("Quotes are harmless.\n")
    (root / "twin.txt").write_text("Quotes are harmless.\n")
    index = GemIndex.open(tmp_path / "s", bag)
    index.add(root)
    new = tmp_path / "else where" / "it's"
    new.parent.mkdir()
    root.rename(new)
    (new / "lark.txt").write_text("Larks nest on the ground.\n")
    (new / "owl.md").rename(new / "owl.txt")  # read another way
    bag.embedded.clear()
    report = index.add(new)
    assert {Path(p).name for p in report.moved} == {"code.py", "rows.jsonl", "o'brien.txt", "twin.txt"}
    assert {Path(p).name for p in report.added} == {"lark.txt", "owl.txt"}
    assert len(bag.embedded) == 2
    assert (report.unchanged, report.removed) == (0, ())
    left = {str(root / name) for name in ("lark.txt", "owl.md")}
    assert left <= set(index.store.files())
    index.store.remove([p for p in index.store.files() if p.startswith(str(root))])
    index.store.optimize()
    fresh = GemIndex.open(tmp_path / "fresh", bag)
    fresh.add(new)
    assert_same(index, fresh)
    assert {p.file for p in index.search("Moon", mode="fts")} == {str(new / "rows.jsonl")}


def test_files_elsewhere_stay(tmp_path: Path, bag: BagOfWords) -> None:
    index = GemIndex.open(tmp_path / "s", bag)
    index.add([write(tmp_path / "a"), write(tmp_path / "b") / "lark.txt"])
    (tmp_path / "b" / "lark.txt").unlink()
    report = index.add(tmp_path / "a")
    assert report.removed == ()
    assert len(index.store.files()) == 5


def test_a_file_that_breaks_keeps_what_was_known_of_it(tmp_path: Path, bag: BagOfWords) -> None:
    root = write(tmp_path / "docs")
    index = GemIndex.open(tmp_path / "s", bag)
    index.add(root)
    (root / "lark.txt").write_bytes(b"\0\0")
    (root / "rows.jsonl").write_text('{"_id": "r1", "text": "Sun."}\nbroken\n')
    (root / "z.pdf").write_bytes(b"%PDF-1.4 nothing")
    report = index.add(root)
    reasons = {Path(s.path).name: s.reason for s in report.skipped}
    assert "stays" in reasons["lark.txt"]
    assert reasons["rows.jsonl"].startswith("row 2: not JSON")
    assert "cannot be read as PDF" in reasons["z.pdf"]
    assert "Larks" in index.search("dawn", mode="fts")[0].text
    assert index.search("Sun", mode="fts")
    assert not index.search("Moon", mode="fts")


def test_small_commits_and_one_make_the_same_index(tmp_path: Path, bag: BagOfWords) -> None:
    rows = "".join(json.dumps({"_id": str(i), "text": f"fact {i} " * (1 + i % 30)}) + "\n" for i in range(120))
    root = write(tmp_path / "docs", FACTS | {"many.jsonl": rows, "empty.txt": ""})
    one, two = (
        GemIndex.open(tmp_path / "one", bag, tokens=40, overlap=5),
        GemIndex.open(tmp_path / "two", bag, tokens=40, overlap=5),
    )
    one.add(root)
    two.add(root, commit_tokens=100)
    assert_same(one, two)
    three = GemIndex.open(tmp_path / "three", bag, tokens=40, overlap=5)
    while three.add(root, limit=1).added:
        pass
    assert_same(one, three)


class Interrupting(BagOfWords):
    """Sends a signal, or fails, while it embeds for the n-th time."""

    def __init__(self, at: int, number: int | None) -> None:
        super().__init__()
        self.left, self.number = at, number

    def encode_document(self, inputs: Any, **options: Any) -> np.ndarray:
        self.left -= 1
        if self.left == 0:
            if self.number is None:
                raise MemoryError("out of memory")
            signal.raise_signal(self.number)
        return super().encode_document(inputs, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_a_stop_leaves_whole_commits_and_the_next_run_goes_on(
    tmp_path: Path, bag: BagOfWords, number: int | None
) -> None:
    rows = "".join(json.dumps({"text": f"fact {i} " * 5}) + "\n" for i in range(60))
    root = write(tmp_path / "docs", {"many.jsonl": rows, "a.txt": "first"})
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopping = Interrupting(3, number)
    index = GemIndex.open(tmp_path / "s", stopping)
    with pytest.raises(MemoryError if number is None else StopRequestedError):
        index.add(root, commit_tokens=200)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert len(index) == 1, "of the file begun nothing counts yet"
    assert [p.text for p in index.search("fact", mode="hybrid")] == ["first"]
    begun = len(stopping.embedded)
    again = GemIndex.open(tmp_path / "s", bag)
    again.add(root, commit_tokens=200)
    assert len(bag.embedded) == 61 - begun, "what was committed is not embedded again"
    fresh = GemIndex.open(tmp_path / "fresh", bag)
    fresh.add(root)
    assert_same(again, fresh)


def test_half_characters_and_odd_names_stop_nothing(tmp_path: Path, bag: BagOfWords) -> None:
    root = write(
        tmp_path / "docs", {"rows.jsonl": '{"_id": "\\ud83d", "title": "\\ud83d", "text": "An owl \\ud83d."}\n'}
    )
    odd = os.path.join(os.fsencode(root), b"caf\xe9.txt")
    with open(odd, "wb") as file:
        file.write(b"larks")
    index = GemIndex.open(tmp_path / "store", bag)
    report = index.add(root)
    assert [p.text for p in index.search("owl", mode="fts")] == ["An owl ?."]
    assert [(Path(s.path).name, s.reason) for s in report.skipped] == [("caf?.txt", "its name is not UTF-8: rename it")]


def test_a_store_among_the_documents_is_none_of_them(tmp_path: Path, bag: BagOfWords) -> None:
    root = write(tmp_path / "docs", {"lark.txt": "Larks sing at dawn.\n"})
    index = GemIndex.open(root / "store", bag)
    for added in ([str(root / "lark.txt")], []):
        assert list(index.add([root, root / "store"]).added) == added
    assert len(index) == 1


def test_a_file_that_was_named_stays_as_long_as_it_is_there(tmp_path: Path, bag: BagOfWords) -> None:
    root = write(tmp_path / "docs", {"notes": "Owls hunt.\n", "lark.txt": "Larks sing.\n"})
    index = GemIndex.open(tmp_path / "store", bag)
    index.add([root, root / "notes"])
    assert index.add(root).removed == ()
    assert len(index) == 2
    (root / "notes").unlink()
    assert index.add(root).removed == (str(root / "notes"),)


def test_a_thread_may_index(tmp_path: Path, bag: BagOfWords) -> None:
    index = GemIndex.open(tmp_path / "s", bag)
    thread = threading.Thread(target=index.add, args=(write(tmp_path / "docs"),))
    thread.start()
    thread.join()
    assert len(index) == 6


def test_columns_are_part_of_what_a_file_is(tmp_path: Path, bag: BagOfWords) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n')
    index = GemIndex.open(tmp_path / "s", bag)
    index.add(path)
    report = index.add(path, text_column="body")
    assert report.changed == (str(path),)
    assert [row["text"] for row in index.store.rows()] == ["two"]


def test_another_models_store_is_refused(tmp_path: Path, bag: BagOfWords) -> None:
    GemIndex.open(tmp_path / "s", bag, model_name="mine")
    with pytest.raises(ValueError, match=r"made by another model \(mine, fingerprint bag; this one has other\)"):
        GemIndex.open(tmp_path / "s", BagOfWords(name="other"))
    with pytest.raises(ValueError, match="vectors of 32 numbers by mine, this model gives 16"):
        GemIndex.open(tmp_path / "s", BagOfWords(dimension=16))
    for given, words in (
        ({"tokens": 100}, "tokens 256, not 100"),
        ({"precision": "int8"}, "precision float32, not int8"),
        ({"context": False}, "context True, not False"),
    ):
        with pytest.raises(ValueError, match=words):
            GemIndex.open(tmp_path / "s", bag, **given)  # type: ignore[arg-type]
    GemIndex.open(tmp_path / "s", bag, tokens=256, precision="float32")


def test_wrong_inputs(tmp_path: Path, bag: BagOfWords) -> None:
    with pytest.raises(ValueError, match="no store at"):
        GemIndex.open(tmp_path / "none", bag, create=False)
    with pytest.raises(ValueError, match="needs a model"):
        GemIndex.open(tmp_path / "none", None)
    with pytest.raises(ValueError, match="600 tokens do not fit the model, which reads 512"):
        GemIndex.open(tmp_path / "s", bag, tokens=600)
    index = GemIndex.open(tmp_path / "s", bag)
    assert index.search("anything") == []
    for given, words in (
        ({"query": " "}, "query is empty"),
        ({"query": "a", "k": 0}, "k must be at least 1"),
        ({"query": "a", "mode": "magic"}, "unknown mode 'magic'"),
        ({"query": "a", "vector": np.zeros(3)}, "vector of 32 numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            index.search(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        index.add(tmp_path, limit=0)
    with pytest.raises(ValueError, match="no such file"):
        index.add(tmp_path / "missing")


def test_a_file_that_was_named_and_is_no_more_is_removed(tmp_path: Path, bag: BagOfWords) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"about {name}")
    named = [tmp_path / "a.txt", tmp_path / "b.txt"]
    index = GemIndex.open(tmp_path / "s", bag, tokens=16, overlap=0)
    index.add(named)
    named[1].unlink()
    report = index.add(named)
    assert report.removed == (str(named[1]),)
    assert len(index) == 1
    with pytest.raises(ValueError, match=r"no such file or directory: .*b\.txt"):
        index.add(named)  # nothing is known of it any more


def test_vectors_that_are_not_finite_leave_no_passage(tmp_path: Path, gem: GemModel) -> None:
    root = write(tmp_path / "docs", {"a.txt": "The cat sat."})
    index = GemIndex.open(tmp_path / "s", gem, tokens=32, overlap=4)
    with torch.no_grad():
        gem.lm.get_decoder().layers[0].mlp.down_proj.weight.mul_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"not finite .*: load it with float32 or bfloat16"):
        index.add(root)
    assert len(index) == 0


def test_a_gem_is_a_model_for_the_index(tmp_path: Path, gem: GemModel) -> None:
    index = GemIndex.open(tmp_path / "s", gem, tokens=64, overlap=8)
    index.add(write(tmp_path / "docs"))
    for row in contents(index):
        context = row["heading"] or row["title"]  # here the heading names the title
        text = f"{context}\n{row['text']}" if context else row["text"]
        vector = gem.encode_document(text, normalize_embeddings=True)
        np.testing.assert_allclose(row["vector"], vector, atol=1e-5)
    passage = index.search("Larks sing at dawn.", mode="vector", k=1)[0]
    assert (passage.text, round(passage.score, 4)) == ("Larks sing at dawn.", 1.0)


def test_a_fingerprint_names_the_vectors(base_dir: Path, gem: GemModel, tmp_path: Path) -> None:
    gem.save_pretrained(tmp_path / "gem")
    again = GemModel.from_pretrained(tmp_path / "gem", dtype="bfloat16")
    assert again.fingerprint == gem.fingerprint
    assert GemModel.from_base(str(base_dir)).fingerprint != gem.fingerprint
    assert again.max_seq_length == gem.config.max_length - 1


@pytest.mark.parametrize("made", ["now", "earlier"])
def test_a_store_and_its_documents_move_together(tmp_path: Path, bag: BagOfWords, made: str) -> None:
    """The paths are right at once, and nothing is embedded or moved; what lies elsewhere keeps its absolute path."""
    (tmp_path / "it's").mkdir()
    root, outside = write(tmp_path / "it's" / "docs"), write(tmp_path / "outside", {"wren.txt": "Wrens are loud.\n"})
    index = GemIndex.open(tmp_path / "it's" / "store", bag)
    index.add([root, outside])
    if made == "earlier":  # all paths were absolute
        start = str(tmp_path / "it's") + os.sep
        quoted = start.replace("'", "''")
        index.store._files.update(where="path LIKE 'docs%'", values_sql={"path": f"concat('{quoted}', path)"})
        assert set(index.store.files()) == {str(p) for d in (root, outside) for p in d.rglob("*") if p.is_file()}
        assert index.add(root).unchanged == 4
    (tmp_path / "it's").rename(tmp_path / "b")
    bag.embedded.clear()
    index = GemIndex.open(tmp_path / "b" / "store", bag, create=False)
    assert index.search("mice at night", k=1)[0].file == str(tmp_path / "b" / "docs" / "owl.md")
    assert index.search("Wrens", mode="fts")[0].file == str(outside / "wren.txt")
    assert {p.file for p in index.passages()} == set(index.files())
    report = index.add([tmp_path / "b" / "docs", outside])
    assert (report.unchanged, report.moved, report.added, report.removed, bag.embedded) == (5, (), (), (), [])
    (tmp_path / "b" / "docs" / "lark.txt").unlink()
    assert index.add(tmp_path / "b" / "docs").removed == (str(tmp_path / "b" / "docs" / "lark.txt"),)
    assert len(index.files()) == 4
