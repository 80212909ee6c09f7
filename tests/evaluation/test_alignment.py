"""An index that another embedding model wrote, searched by a GEM: the figures, and the stores that people have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemify import GemModel
from gemify.evaluation.alignment import measure_alignment

PASSAGES = [
    "The city council voted to close the old bridge over the river for repairs until spring.",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar and oxygen in the leaves of plants.",
    "A mortgage is a loan for a house; the bank may take the house if the loan is not paid back.",
    "The orchestra played Beethoven's ninth symphony, and the audience stood up to applaud.",
    "To reset your password, open the settings, choose security and follow the link in the message we send.",
    "Penguins are birds that cannot fly; they swim in cold seas and feed their chicks on land.",
    "The recipe needs three eggs, a cup of flour, some butter and a pinch of salt; bake it for forty minutes.",
    "The striker scored twice in the second half, and the team won the cup for the first time.",
    "A vaccine trains the immune system to recognise a virus before it makes the body ill.",
    "The telescope in orbit took pictures of a galaxy that is thirteen billion light years away.",
    "Trains to the airport leave every twenty minutes from platform four of the central station.",
    "The novel tells of a whaling captain who hunts a white whale across the oceans.",
]
QUESTIONS = [
    "Why can cars not cross the river?",
    "How do plants make oxygen?",
    "What happens if I do not pay for my house?",
    "Which music was performed?",
    "I forgot my password",
    "Which bird swims in icy water?",
    "How long does the cake stay in the oven?",
    "Who won the football match?",
    "How does the body learn to fight a virus?",
    "pictures of distant stars",
    "How do I get to my flight?",
    "a book about a whale",
]


def vectors(rows: int, seed: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def expected_search(questions: np.ndarray, passages: np.ndarray, passage_of: list[int]) -> tuple[float, float]:
    """nDCG@10 and recall@1 in percent by sorting, one question at a time."""
    gains, firsts = [], []
    for question, own in zip(questions, passage_of, strict=True):
        cosines = [float(p @ question / np.linalg.norm(p) / np.linalg.norm(question)) for p in passages]
        rank = sorted(range(len(passages)), key=lambda n: -cosines[n]).index(own)
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
        firsts.append(rank == 0)
    return 100 * float(np.mean(gains)), 100 * float(np.mean(firsts))


def test_the_figures_are_those_of_sorting() -> None:
    passage_of = [0, 3, 3, 29, 11]
    gem, teacher = (vectors(5, 1), vectors(30, 2)), (vectors(5, 3), vectors(30, 4))
    for n, own in enumerate(passage_of):  # so that something is found
        gem[0][n] += 2 * gem[1][own]
        teacher[0][n] += 3 * teacher[1][own]
        gem[0][n] += 2 * teacher[1][own]
    got = measure_alignment(gem, teacher, passage_of)
    by = {"GEM": gem, "teacher": teacher}
    assert [(s["questions"], s["passages"]) for s in got["searches"]] == [
        ("teacher", "teacher"),
        ("GEM", "teacher"),
        ("GEM", "GEM"),
    ]
    own = got["searches"][0]["ndcg_at_10"]
    for search in got["searches"]:
        ndcg, recall = expected_search(by[search["questions"]][0], by[search["passages"]][1], passage_of)
        assert (search["ndcg_at_10"], search["recall_at_1"]) == pytest.approx((ndcg, recall))
        assert search["kept"] == pytest.approx(100 * ndcg / own)


def test_a_tie_is_no_hit() -> None:
    same = np.ones((2, 4), dtype=np.float32)
    [search, *_] = measure_alignment((same, same), (same, same), [0, 1])["searches"]
    assert search["recall_at_1"] == 0.0
    assert search["ndcg_at_10"] == pytest.approx(100 / math.log2(3))


def test_another_space_and_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the model's vectors have 8 numbers, the teacher's 4: train it"):
        measure_alignment((vectors(2, 0), vectors(2, 1)), (vectors(2, 0, 4), vectors(2, 1, 4)), [0, 1])
    with pytest.raises(ValueError, match="no pairs to measure with"):
        measure_alignment((vectors(0, 0), vectors(2, 1)), (vectors(0, 0), vectors(2, 1)), [])


@pytest.fixture(scope="module")
def minilm_vectors(minilm: Path) -> np.ndarray:
    """What an index by sentence-transformers holds of the passages."""
    st = pytest.importorskip("sentence_transformers")
    return np.asarray(st.SentenceTransformer(str(minilm), device="cpu").encode(PASSAGES, normalize_embeddings=True))


@pytest.fixture(scope="module")
def question_vectors() -> np.ndarray:
    return np.asarray(GemModel.from_pretrained("starter").encode_query(QUESTIONS))


def search_faiss(passages_ND: np.ndarray, questions_ND: np.ndarray, tmp_path: Path) -> list[int]:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(passages_ND.shape[1])
    index.add(passages_ND)
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    return [int(row[0]) for row in faiss.read_index(str(tmp_path / "index.faiss")).search(questions_ND, 1)[1]]


def search_lancedb(passages_ND: np.ndarray, questions_ND: np.ndarray, tmp_path: Path) -> list[int]:
    database = pytest.importorskip("lancedb").connect(tmp_path)
    rows = [{"n": n, "vector": vector.tolist()} for n, vector in enumerate(passages_ND)]
    table = database.create_table("passages", rows)
    return [int(table.search(q).distance_type("cosine").limit(1).to_list()[0]["n"]) for q in questions_ND]


def search_chroma(passages_ND: np.ndarray, questions_ND: np.ndarray, tmp_path: Path) -> list[int]:
    client: Any = pytest.importorskip("chromadb").PersistentClient(path=str(tmp_path))
    collection = client.create_collection("passages", embedding_function=None)
    collection.add(ids=[str(n) for n in range(len(passages_ND))], embeddings=passages_ND, documents=PASSAGES)
    found = collection.query(query_embeddings=questions_ND, n_results=1)["ids"]
    return [int(ids[0]) for ids in found]


@pytest.mark.real
@pytest.mark.parametrize("search", [search_faiss, search_lancedb, search_chroma])
def test_questions_of_the_starter_search_minilms_index(
    search: Any, minilm_vectors: np.ndarray, question_vectors: np.ndarray, tmp_path: Path
) -> None:
    found = search(minilm_vectors, question_vectors, tmp_path)
    assert sum(one == own for own, one in enumerate(found)) >= 10, found  # of 12; by chance 1
