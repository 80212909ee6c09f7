"""Mining: what sentence-transformers finds with its own model, from a cache, by a GEM too, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemify import GemModel
from gemify.training.examples import Source
from gemify.training.hard_negatives import MiningConfig, mine
from gemify.training.teacher import Teacher
from tiny_gems import save_gem

st = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")
datasets = pytest.importorskip("datasets")
PASSAGES = [
    "the cat sat on the mat",
    "a dog ran to the river",
    "the river is long",
    "seven small stones",
    "a mat on the floor",
    "small boats on the river",
    "the dog and the cat",
    "stones on the mat",
]
PAIRS = [
    (question, PASSAGES[n])
    for n, question in enumerate(
        ["who sat", "who ran", "what is long", "how many stones", "what is on the floor", "what is on the river"]
    )
]
PAIRS.append(("who sat", PASSAGES[6]))  # two right answers


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMIFY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in PAIRS))
    return path


@pytest.fixture(scope="module")
def encoder_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    parts = [models.Transformer(str(base_dir)), models.Pooling(32, "mean"), models.Normalize()]
    st.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "who: "}).save(str(directory))
    return directory


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {"num_negatives": 2},
        {"num_negatives": 1, "range_min": 2, "range_max": 5},
        {"num_negatives": 1, "relative_margin": 0.02},
        {"num_negatives": 1, "max_score": 0.7},
    ],
)
def test_the_negatives_are_sentence_transformers(
    encoder_dir: Path, data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    (tmp_path / "more.txt").write_text(PASSAGES[7] + "\n")
    counts = mine(
        str(data),
        tmp_path / "out.jsonl",
        f"st:{encoder_dir}",
        MiningConfig(**options),
        corpus=str(tmp_path / "more.txt"),
        device="cpu",
        show_progress_bar=False,
    )
    pairs = datasets.Dataset.from_dict({"anchor": [a for a, _ in PAIRS], "positive": [p for _, p in PAIRS]})
    expected = st.util.mine_hard_negatives(
        pairs,
        st.SentenceTransformer(str(encoder_dir), device="cpu"),
        corpus=[PASSAGES[7]],
        output_format="n-tuple",
        verbose=False,
        **options,
    )
    found = read(tmp_path / "out.jsonl")
    assert found == list(expected)
    assert counts == {"pairs": 7, "candidates": 8, "written": len(found)}
    for row in found:
        right = {p for a, p in PAIRS if a == row["anchor"]}
        assert not right & {text for name, text in row.items() if name.startswith("negative_")}


def test_a_gem_mines_and_its_vectors_are_kept(base_dir: Path, data: Path, tmp_path: Path, home: Path) -> None:
    gem = save_gem(base_dir, tmp_path / "gem")
    options = {"device": "cpu", "show_progress_bar": False}
    mine(str(data), tmp_path / "one.jsonl", str(gem), MiningConfig(num_negatives=1), **options)
    [keys] = home.rglob("keys.bin")
    kept = keys.read_bytes()
    model = GemModel.from_pretrained(gem)
    for row in read(tmp_path / "one.jsonl"):
        others = [p for p in dict.fromkeys(p for _, p in PAIRS) if (row["anchor"], p) not in PAIRS]
        scores = model.similarity(model.encode(row["anchor"]), model.encode(others))[0].numpy()
        assert scores[others.index(row["negative_1"])] == pytest.approx(float(np.max(scores)), abs=1e-3)
    mine(str(data), tmp_path / "two.jsonl", str(gem), MiningConfig(num_negatives=1), **options)
    assert keys.read_bytes() == kept  # nothing was computed again
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_a_changed_gem_has_a_cache_of_its_own(base_dir: Path, tmp_path: Path) -> None:
    one, other = save_gem(base_dir, tmp_path / "one"), save_gem(base_dir, tmp_path / "other", max_length=16)
    directories = {Teacher(str(name), device="cpu").directory for name in (one, other)}
    assert len(directories) == 2
    teacher = Teacher(str(one), device="cpu")
    plain = GemModel.from_pretrained(one).encode(PASSAGES, normalize_embeddings=True)
    np.testing.assert_allclose(teacher.vectors(PASSAGES), plain, atol=1e-3)


def test_mined_rows_are_trained_on(base_dir: Path, data: Path, tmp_path: Path) -> None:
    gem = save_gem(base_dir, tmp_path / "gem")
    mine(str(data), tmp_path / "out.jsonl", str(gem), MiningConfig(num_negatives=2), show_progress_bar=False)
    examples = list(Source(str(tmp_path / "out.jsonl")))
    assert [len(e.negatives) for e in examples] == [2] * len(PAIRS)


def test_what_cannot_be_mined_is_refused(data: Path, tmp_path: Path, base_dir: Path) -> None:
    gem = str(save_gem(base_dir, tmp_path / "gem"))
    (tmp_path / "texts.txt").write_text("a text\nanother\n")
    with pytest.raises(ValueError, match=r"texts.txt holds no pairs: give rows with anchor and positive"):
        mine(str(tmp_path / "texts.txt"), tmp_path / "o.jsonl", gem, MiningConfig())
    with pytest.raises(ValueError, match=r"o.csv must end in .jsonl"):
        mine(str(data), tmp_path / "o.csv", gem, MiningConfig())
    with pytest.raises(ValueError, match=r"num_negatives must be at least 1"):
        mine(str(data), tmp_path / "o.jsonl", gem, MiningConfig(num_negatives=0), show_progress_bar=False)
    assert not (tmp_path / "o.jsonl").exists()
