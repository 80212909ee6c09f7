"""Learning another embedding model's vectors: the teacher's cache, the losses, whole runs, killing and resuming."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from test_trainer import curve, weights

from gemify import GemModel
from gemify.cli.main import app
from gemify.paper.objectives import cosine_loss, info_nce, matryoshka_loss, similarity_loss
from gemify.training.recipe import Recipe
from gemify.training.teacher import Teacher
from gemify.training.trainer import train

st = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.models")
losses = pytest.importorskip("sentence_transformers.losses")
TEXTS = ["a cat on a mat", "x", "the river is long", "the cat sat"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMIFY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def teacher_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence-transformers model of 12 dimensions."""
    torch.manual_seed(5)
    body = models.Transformer(str(base_dir))
    width = 32
    parts = [body, models.Pooling(width, "mean"), models.Dense(width, 12, activation_function=torch.nn.Tanh())]
    directory = tmp_path_factory.mktemp("teacher")
    st.SentenceTransformer(modules=parts, device="cpu").save(str(directory))
    return directory


def recipe(base_dir: Path, data: Any, teacher_dir: Path, **options: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "base": str(base_dir),
            "data": data,
            "teacher": f"st:{teacher_dir}",
            "tune": "embedding_lora",
            "attention": "bidirectional",
            "special_tokens": 0,
            "max_steps": 6,
            "ntp_steps": 0,
            "batch_size": 8,
            "contrastive_batch_size": 8,
            "contrastive_lr": 1e-2,
            "warmup_steps": 0,
            "ridge_texts": 16,
            "similarity_weight": 0.3,
            "save_steps": 2,
            **options,
        }
    )


def test_vectors_are_the_teachers_and_kept(teacher_dir: Path, home: Path) -> None:
    plain = st.SentenceTransformer(str(teacher_dir), device="cpu").encode(TEXTS, normalize_embeddings=True)
    teacher = Teacher(f"st:{teacher_dir}", device="cpu")
    assert teacher.dim == 12
    np.testing.assert_allclose(teacher.vectors(TEXTS[:3]), plain[:3], atol=1e-3)  # kept in float16
    np.testing.assert_allclose(teacher.vectors(TEXTS[::-1]), plain[::-1], atol=1e-3)
    [keys] = home.rglob("keys.bin")
    assert keys.stat().st_size == 8 * len(TEXTS)
    again = Teacher(f"st:{teacher_dir}", device="cpu")
    assert (again.vectors(TEXTS) == teacher.vectors(TEXTS)).all()
    assert keys.stat().st_size == 8 * len(TEXTS)


def test_what_a_killed_run_left_half_written_is_not_read(teacher_dir: Path, home: Path) -> None:
    expected = Teacher(f"st:{teacher_dir}", device="cpu").vectors(TEXTS)
    [keys], [vectors] = home.rglob("keys.bin"), home.rglob("vectors.bin")
    keys.write_bytes(keys.read_bytes()[: 2 * 8 + 3])  # two whole keys
    vectors.write_bytes(vectors.read_bytes() + b"half a row")
    assert (Teacher(f"st:{teacher_dir}", device="cpu").vectors(TEXTS) == expected).all()
    assert keys.stat().st_size == 8 * len(TEXTS)
    vectors.write_bytes(vectors.read_bytes()[:-5])  # keys without their vectors, as after a power cut
    assert (Teacher(f"st:{teacher_dir}", device="cpu").vectors(TEXTS) == expected).all()
    assert (keys.stat().st_size, vectors.stat().st_size) == (8 * len(TEXTS), 2 * 12 * len(TEXTS))


def test_unknown_teachers_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the teacher ./minilm: .*write st:PATH"):
        Teacher("./minilm")
    with pytest.raises(ValueError, match=r"cannot load the teacher st:.*/none"):
        Teacher(f"st:{tmp_path / 'none'}")


def test_the_cosine_loss_is_sentence_transformers(teacher_dir: Path) -> None:
    model = st.SentenceTransformer(str(teacher_dir), device="cpu")
    features, targets = model.tokenize(TEXTS), torch.randn(len(TEXTS), 12)
    theirs = losses.EmbedDistillLoss(model, distance_metric="cosine")([features], targets)
    ours = cosine_loss(model(model.tokenize(TEXTS))["sentence_embedding"], targets)
    torch.testing.assert_close(ours, theirs)


def test_the_contrastive_loss_of_cut_vectors_is_sentence_transformers(teacher_dir: Path) -> None:
    """Its MatryoshkaLoss around its MultipleNegativesRankingLoss is the sum where ours is the mean."""
    generator = torch.Generator().manual_seed(2)
    q_BD, d_BD = (torch.randn(6, 12, generator=generator) for _ in range(2))
    model = st.SentenceTransformer(str(teacher_dir), device="cpu")
    inner = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    theirs = losses.MatryoshkaLoss(model, inner, matryoshka_dims=[12, 8, 3])
    embeddings = iter([q_BD, d_BD])
    model.forward = lambda features, **_: {"sentence_embedding": next(embeddings)}  # type: ignore[method-assign]
    expected = theirs([{}, {}], None) / 3
    ours = matryoshka_loss(lambda dim: info_nce(q_BD[:, :dim], d_BD[:, :dim], 20.0), (3, 8), 12)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_cut_vectors_learn_the_teachers_similarities(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    """Vectors cut to 2 of 12 numbers: nearer to the teacher's similarities than without ``matryoshka_dims``."""
    texts = [line for line in texts_file.read_text().splitlines() if line.strip()][:40]
    targets_NP = torch.tensor(Teacher(f"st:{teacher_dir}").vectors(texts))
    found = {}
    for dims in ([], [2]):
        options = {"max_steps": 60, "batch_size": 16, "cosine_weight": 0.0, "similarity_weight": 1.0}
        made = recipe(base_dir, str(texts_file), teacher_dir, matryoshka_dims=dims, contrastive_lr=1e-2, **options)
        gem, _ = train(made, tmp_path / str(len(dims)), show_progress_bar=False)
        found[len(dims)] = float(similarity_loss(torch.tensor(gem.encode(texts, truncate_dim=2)), targets_NP))
    assert found[1] < found[0]


def test_the_similarity_loss_is_the_divergence_of_the_teachers_rows() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 7)), rng.standard_normal((5, 4))
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        a, b = (np.array([v[i] @ v[j] / np.linalg.norm(v[i]) / np.linalg.norm(v[j]) for j in others]) for v in (x, y))
        expected += (softmax(20 * b) * (log_softmax(20 * b) - log_softmax(20 * a))).sum() / 5
    got = similarity_loss(torch.tensor(x), torch.tensor(y))
    assert float(got) == pytest.approx(expected, rel=1e-4)
    assert float(similarity_loss(torch.tensor(y), torch.tensor(y))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("projection", ["keep", "drop"])
def test_a_run_moves_towards_the_teacher(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path, projection: str
) -> None:
    made = recipe(base_dir, str(texts_file), teacher_dir, max_steps=30, projection=projection)
    gem, summary = train(made, tmp_path / "run", show_progress_bar=False)
    curve_of = [row["distillation"] for row in curve(tmp_path / "run") if "loss" in row]
    assert sum(curve_of[-5:]) < 0.8 * sum(curve_of[:5])
    assert summary["distillation"] == curve_of[-1]
    again = GemModel.from_pretrained(tmp_path / "run")
    assert (again.encode(TEXTS) == gem.encode(TEXTS)).all()
    assert gem.get_embedding_dim() == (12 if projection == "keep" else 32)
    assert (tmp_path / "run" / "projection.safetensors").is_file() == (projection == "keep")


def test_a_gated_gem_learns_from_a_teacher_after_next_tokens(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    options = {"tune": "gated", "attention": "causal", "special_tokens": 1, "ntp_steps": 2}
    gem, _ = train(recipe(base_dir, str(texts_file), teacher_dir, **options), tmp_path / "run", show_progress_bar=False)
    rows = [row for row in curve(tmp_path / "run") if "loss" in row]
    assert ["distillation" in row for row in rows] == [False] * 2 + [True] * 4
    np.testing.assert_allclose(gem.embed(gem.prefill(TEXTS)).numpy(), gem.encode(TEXTS), atol=1e-5)


def test_sources_are_mixed_by_weight_and_pairs_are_contrasted(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = texts_file.read_text().splitlines()
    rows = [{"anchor": a, "positive": b} for a, b in zip(lines[::2], lines[1::2], strict=False)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"path": str(texts_file), "weight": 3}, {"path": str(pairs), "batch_size": 4}]
    made = recipe(base_dir, data, teacher_dir, max_steps=24)
    assert Recipe.from_dict(Recipe.read_yaml(written(made, tmp_path))) == made
    train(made, tmp_path / "run", show_progress_bar=False)
    rows = [row for row in curve(tmp_path / "run") if "loss" in row]
    assert 2 <= sum("contrastive" in row for row in rows) <= 12


def written(made: Recipe, directory: Path) -> Path:
    (directory / "written.yaml").write_text(made.to_yaml())
    return directory / "written.yaml"


def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    made = recipe(base_dir, str(texts_file), teacher_dir, max_steps=8, save_total_limit=9)
    train(made, tmp_path / "whole", show_progress_bar=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    for step in (6, 8):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"checkpoint-{step}")
    train(made, tmp_path / "killed", resume=True, show_progress_bar=False)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for read in (lambda run: weights(run, "embedding_lora"), lambda run: load_file(run / "projection.safetensors")):
        ours, theirs = read(tmp_path / "killed"), read(tmp_path / "whole")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tune": "embedding_lora", "special_tokens": 0}, "acts in the embedding pass only"),
        ({"attention": "bidirectional"}, "needs an embedding pass of its own, tune 'gated' has none"),
        ({"data": [{"path": "x.txt", "weight": 0}]}, "the weight of x.txt must be a positive number, got 0"),
        ({"data": [{"path": "x.txt", "kind": "a"}]}, "an entry of data must be a name, or path with"),
        ({"teacher": "st:x", "cosine_weight": 0.0}, "nothing is learned from the teacher"),
        (
            {"tune": "embedding_lora", "special_tokens": 0, "ntp_steps": 0, "gradient_checkpointing": True},
            "set contrastive_chunk_size instead",
        ),
        ({"similarity_weight": -1.0}, "similarity_weight must not be negative"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_a_run_is_shipped_without_what_its_vectors_do_not_need(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    """The layers above the one that is read, and a rank that is not used, add nothing to the vectors."""
    ship = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "ship_starter.py"))
    made = recipe(base_dir, [{"path": str(texts_file)}], teacher_dir, layer=1, rank=8)
    gem, _ = train(made, tmp_path / "run", show_progress_bar=False)
    state = load_file(tmp_path / "run" / "adapter_model.safetensors")
    ship["main"](tmp_path / "run", tmp_path / "whole")
    whole = GemModel.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(whole.encode(TEXTS), gem.encode(TEXTS), atol=3e-3)  # float16
    shipped = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert {name for name in state if ".layers.0." in name} == set(shipped) < set(state)
    assert Recipe.read_yaml(tmp_path / "whole" / "recipe.yaml")["data"][0]["path"] == texts_file.name
    ship["main"](tmp_path / "run", tmp_path / "small", 2)
    small = load_file(tmp_path / "small" / "adapter_model.safetensors")
    for name in (n for n in small if ".lora_A." in n):
        other = name.replace(".lora_A.", ".lora_B.")
        expected = torch.linalg.svd(state[other] @ state[name])
        best = expected.U[:, :2] * expected.S[:2] @ expected.Vh[:2]
        torch.testing.assert_close(small[other].float() @ small[name].float(), best, atol=2e-3, rtol=2e-2)
    assert GemModel.from_pretrained(tmp_path / "small").encode("a text").shape == (12,)


def test_align_trains_into_the_teachers_space_and_says_what_an_index_keeps(
    base_dir: Path,
    teacher_dir: Path,
    texts_file: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_prompts = st.SentenceTransformer(str(teacher_dir), device="cpu")
    with_prompts.prompts = {"query": "who: ", "document": "it: "}
    with_prompts.save(str(tmp_path / "teacher"))
    pairs, output, teacher = tmp_path / "pairs.jsonl", tmp_path / "gem", f"st:{tmp_path / 'teacher'}"
    rows = [
        ("who sat", "the cat sat on the mat"),
        ("what is long", "the river is long"),
        ("where", "the cat sat on the mat"),
    ]
    pairs.write_text("".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in rows))

    def align(*arguments: object) -> dict[str, Any]:
        argv = ["gemify", "align", "--teacher", teacher, *map(str, arguments), "--device", "cpu", "--json"]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as exit:
            app()
        assert not exit.value.code
        record: dict[str, Any] = json.loads(capsys.readouterr().out)
        return record

    trained = align(
        "--base", base_dir, "--data", texts_file, "--output", output, "--max-steps", 3, "--pairs", pairs, "--quiet"
    )
    assert json.loads((output / "alignment.json").read_text()) == trained
    assert (trained["questions"], trained["passages"]) == (3, 2)
    assert trained["summary"]["steps"] == 3
    gem = GemModel.from_pretrained(output)
    assert (gem.config.tune, gem.config.attention, gem.config.teacher) == (
        "embedding_lora",
        "bidirectional",
        str(tmp_path / "teacher"),
    )
    known = with_prompts.encode_query([a for a, _ in rows])  # as it would search its own index
    ours = gem.encode([a for a, _ in rows])
    cosine = (ours * known).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(known, axis=1)
    assert trained["question_cosine"] == pytest.approx(float(cosine.mean()), abs=1e-3)  # kept in float16
    measured = align("--model", output, "--pairs", pairs)
    assert measured["searches"] == trained["searches"]


def test_triplets_with_missing_negatives_are_taught_and_contrasted(
    base_dir: Path, texts_file: Path, teacher_dir: Path, home: Path, tmp_path: Path
) -> None:
    lines = texts_file.read_text().splitlines()
    rows = [{"anchor": a, "positive": b} for a, b in zip(lines[::2], lines[1::2], strict=False)]
    for number, row in enumerate(rows):
        row |= {"negative": lines[number]} if number % 2 else {}
    (tmp_path / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:4]))
    made = recipe(base_dir, str(tmp_path / "triplets.jsonl"), teacher_dir, max_steps=8, similarity_weight=0.5)
    train(made, tmp_path / "run", show_progress_bar=False)
    steps = [row for row in curve(tmp_path / "run") if "loss" in row]
    assert len(steps) == 8
    assert all(np.isfinite([row["contrastive"], row["distillation"]]).all() for row in steps)
