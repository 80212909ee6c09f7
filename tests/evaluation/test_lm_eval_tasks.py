"""Language benchmarks over local files: lm-eval's stock prompts and figures for the same rows; loss and logits."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from gemify.evaluation.lm_eval_prefix_cache import share_prefixes
from gemify.evaluation.lm_eval_tasks import (
    LANGUAGE_TASKS,
    LanguageTask,
    local_file,
    make_harness,
    make_language_tasks,
    run_language_task,
)
from gemify.evaluation.models import compare_logits, compute_text_losses
from gemify.io.rows import load_rows

pytest.importorskip("lm_eval")
from lm_eval.api.model import LM

Rows = list[dict[str, Any]]
HARD = 'It\'s a "test" of {{braces}}, [brackets] — naïve ✓'


class Recorder(LM):
    """A language model whose figures are a hash of what it is asked, and which keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    @staticmethod
    def figure(context: str, continuation: str) -> tuple[float, bool]:
        number = zlib.crc32(f"{context}|{continuation}".encode())
        return -(number % 1000) / 10, number % 2 == 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked += [r.args for r in requests]
        return [self.figure(*r.args) for r in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


def write(data: Path, name: str, rows: Rows) -> Path:
    file = local_file(name)
    assert file is not None
    path = data / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[Any, dict[str, Rows]]:
    """The hub's data sets: (path, name) -> rows of every split. All else in the stock route is lm-eval's own."""
    sets: dict[Any, dict[str, Rows]] = {}

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(rows) for split, rows in sets[path, name].items()})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return sets


def quizzes(count: int = 7) -> Iterator[tuple[str, list[str], int]]:
    for at in range(count):
        question = f"{HARD if at == 1 else 'What is'} number {at}?"
        yield question, [f"answer {c * (at + 1)}{' longer' * ((at + k) % 3)}" for k, c in enumerate("abcd")], at % 4


def lettered(choices: list[str]) -> dict[str, list[str]]:
    return {"text": choices, "label": list("ABCD")}


ARC = [
    (
        {"query": f"Question: {q}", "choices": c, "gold": g},
        {"question": q, "choices": lettered(c), "answerKey": "ABCD"[g]},
    )
    for q, c, g in quizzes()
]
BOOLQ = [
    (
        {"query": f"{HARD}.\nQuestion: is it {q}?", "choices": ["no", "yes"], "gold": g % 2},
        {"passage": f"{HARD}.", "question": f"is it {q}", "idx": 0, "label": g % 2},
    )
    for q, _, g in quizzes()
]
COPA = [
    (
        {"query": "The man's tap, because", "choices": ["it ran.", "he went home."], "gold": 1},
        {
            "premise": "The man's tap,.",
            "question": "cause",
            "choice1": "It ran.",
            "choice2": "He went home.",
            "label": 1,
        },
    ),
    (
        {"query": "She sat therefore", "choices": ["she rested.", "birds sang."], "gold": 0},
        {"premise": "She sat.", "question": "effect", "choice1": "She rested.", "choice2": "Birds sang.", "label": 0},
    ),
]
HELLASWAG = [
    (
        {"ctx": f"Diving: {q} Then he", "endings": c, "gold": g},
        {"activity_label": "Diving", "ctx_a": q, "ctx_b": "Then he", "endings": c, "label": str(g)},
    )
    for q, c, g in quizzes()
    if "[" not in q  # brackets are cut out by lm-eval; the local file's already are
]
OPENBOOKQA = [
    (
        {"query": q, "choices": c, "gold": g},
        {"question_stem": q, "choices": lettered(c), "answerKey": "ABCD"[g]},
    )
    for q, c, g in quizzes()
]
PIQA = [
    (
        {"query": f"Question: {q}\n", "choices": c[:2], "gold": g % 2},
        {"goal": q, "sol1": c[0], "sol2": c[1], "label": g % 2},
    )
    for q, c, g in quizzes()
]
WINOGRANDE = [
    (
        {
            "context_options": ["Ann's cat beat Bob so Ann", "Ann's cat beat Bob so Bob"],
            "continuation": "won.",
            "gold": 0,
        },
        {"sentence": "Ann's cat beat Bob so _ won.", "option1": "Ann", "option2": "Bob", "answer": "1"},
    ),
    (
        {"context_options": ["The cup or the jug: cup", "The cup or the jug: jug"], "continuation": '"7"', "gold": 1},
        {"sentence": 'The cup or the jug: _ "7"', "option1": "cup", "option2": "jug", "answer": "2"},
    ),
    (
        {"context_options": ["Two or three, two", "Two or three, three"], "continuation": "[1]", "gold": 1},
        {"sentence": "Two or three, _ [1]", "option1": "two", "option2": "three", "answer": "2"},
    ),
]
WSC = [
    (
        {
            "context_options": ["The men beat the boys because the men", "The men beat the boys because the boys"],
            "continuation": "were tall.",
            "gold": 0,
        },
        {
            "text": "The men beat the boys because they were tall.",
            "pronoun": "they",
            "pronoun_loc": 30,
            "options": ["The men", "The boys"],
            "label": 0,
        },
    )
]
LAMBADA = [
    ({"text": text}, {"text": text}) for text in ("she said the moon", 'two  spaces\nand a "line" end', "one two")
]

STOCK: dict[str, tuple[tuple[str, str | None], str, list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "arc_challenge": (("allenai/ai2_arc", "ARC-Challenge"), "test", ARC),
    "arc_easy": (("allenai/ai2_arc", "ARC-Easy"), "test", ARC),
    "boolq": (("aps/super_glue", "boolq"), "validation", BOOLQ),
    "copa": (("aps/super_glue", "copa"), "validation", COPA),
    "hellaswag": (("Rowan/hellaswag", None), "validation", HELLASWAG),
    "lambada": (("EleutherAI/lambada_openai", "default"), "test", LAMBADA),
    "openbookqa": (("allenai/openbookqa", "main"), "test", OPENBOOKQA),
    "piqa": (("baber/piqa", None), "validation", PIQA),
    "winogrande": (("allenai/winogrande", "winogrande_xl"), "validation", WINOGRANDE),
    "wsc273": (("lighteval/winograd_wsc", "wsc273"), "test", WSC),
}


def subjects(questions: dict[str, int]) -> Rows:
    """Subjects of so many test questions, five development rows each, mixed up in the file."""
    rows: Rows = []
    for subject, count in questions.items():
        for split, n in (("dev", 5), ("test", count)):
            for at in range(n):
                rows.append(
                    {
                        "subject": subject,
                        "split": split,
                        "question": f" {HARD if at == 1 else ''} {split} {at}? ",
                        "choices": [f"{c}{at}" for c in "wxyz"],
                        "answer": "ABCD"[(at * at + len(subject)) % 4],
                    }
                )
    return rows[::2] + rows[1::2]


def put_on_hub(hub: dict[Any, dict[str, Rows]], rows: Rows) -> None:
    for row in rows:
        splits = hub.setdefault(("cais/mmlu", row["subject"]), {"dev": [], "test": []})
        splits[row["split"]].append({**row, "answer": "ABCD".index(row["answer"])})


def ask(task: LanguageTask, **options: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    recorder = Recorder()
    return run_language_task(recorder, task, **options), recorder.asked


@pytest.mark.parametrize("name", sorted(STOCK))
def test_local_rows_ask_what_the_stock_task_asks(name: str, tmp_path: Path, hub: dict[Any, dict[str, Rows]]) -> None:
    path, split, pairs = STOCK[name]
    hub[path] = {"train": [s for _, s in pairs], split: [s for _, s in pairs]}
    extra = {"source": "x"}  # a column that the task does not know, of differing types
    (local,) = make_language_tasks(
        name, write(tmp_path, name, [{**row, **(extra if at else {"source": 3})} for at, (row, _) in enumerate(pairs)])
    )
    (stock,) = make_language_tasks(name, None)
    ours, ours_asked = ask(local)
    theirs, theirs_asked = ask(stock)
    assert ours_asked == theirs_asked
    assert len(ours_asked) >= len(pairs)
    shared = {k: theirs["metrics"][k] for k in ours["metrics"]}
    assert ours["metrics"] == shared
    assert ours["main"] in shared
    assert {k: v for k, v in ours.items() if k != "metrics"} == {k: v for k, v in theirs.items() if k != "metrics"}


def test_every_local_task_is_compared() -> None:
    assert set(LANGUAGE_TASKS) == {"held_out", "mmlu", *STOCK}


def test_mmlu_asks_what_the_stock_subjects_ask(tmp_path: Path, hub: dict[Any, dict[str, Rows]]) -> None:
    rows = subjects({"virology": 3, "high_school_us_history": 2})
    put_on_hub(hub, rows)
    local = make_language_tasks("mmlu", write(tmp_path, "mmlu", rows))
    assert [t.name for t in local] == ["mmlu_high_school_us_history", "mmlu_virology"]
    stock = {t.name: t for t in make_language_tasks("mmlu", None)}
    assert len(stock) == 57
    assert {t.group for t in [*local, *stock.values()]} == {"mmlu"}
    for task in local:
        (ours, ours_asked), (theirs, theirs_asked) = ask(task), ask(stock[task.name])
        assert ours_asked == theirs_asked
        assert ours == theirs
    first = ask(local[0])[1][0]
    assert first[1] == " A"
    assert first[0].startswith(
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        "dev 0?\nA. w0\nB. x0\nC. y0\nD. z0\nAnswer: C\n\n"  # 22 letters: answer 22 % 4
    )
    assert first[0].endswith("test 1?\nA. w1\nB. x1\nC. y1\nD. z1\nAnswer:")
    assert first[0].count("Answer:") == 6


def test_figures_worked_out_by_hand(tmp_path: Path) -> None:
    (task,) = make_language_tasks("arc_easy", write(tmp_path, "arc_easy", [row for row, _ in ARC]))
    acc, norm = [], []
    for row, _ in ARC:
        scores = np.array([Recorder.figure(f"{row['query']}\nAnswer:", f" {c}")[0] for c in row["choices"]])
        acc.append(float(scores.argmax() == row["gold"]))
        norm.append(float((scores / [len(c) for c in row["choices"]]).argmax() == row["gold"]))
    assert acc != norm
    cell, _ = ask(task)
    assert cell == {
        "task": "arc_easy",
        "group": "arc_easy",
        "n": len(ARC),
        "metrics": {"acc": pytest.approx(np.mean(acc)), "acc_norm": pytest.approx(np.mean(norm))},
        "main": "acc_norm",
        "per_sample": norm,
    }
    cut, asked = ask(task, limit=3)
    assert (cut["n"], cut["per_sample"], len(asked)) == (3, norm[:3], 12)
    assert cut["metrics"]["acc_norm"] == pytest.approx(np.mean(norm[:3]))


def lm_evals_own(harness: Any, names: list[str], *, weight_by_size: bool) -> tuple[float, dict[str, list[float]]]:
    """The group's figure, and every document's, from lm-eval's stock tasks and group aggregation."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    from lm_eval.evaluator import evaluate

    from gemify.evaluation.lm_eval_tasks import task_manager

    manager = task_manager(stock=True)
    metric = {"metric": "acc", "aggregation": "mean", "weight_by_size": weight_by_size}
    group = Group.from_config(GroupConfig(group="all", task=names, aggregate_metric_list=[metric]))  # type: ignore[list-item]
    for task in manager.load(names)["tasks"].values():
        group.add(task)
    loaded = manager.load([group])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=5)
        task.set_fewshot_seed(seed=1234)
    results = evaluate(lm=harness, task_dict=loaded, bootstrap_iters=0)
    assert results is not None
    return results["groups"]["all"]["acc,none"], {n: [s["acc"] for s in results["samples"][n]] for n in names}


def assert_mmlu_is_lm_evals(
    data: Path, hub: dict[Any, dict[str, Rows]], stock: Any, shared: Any
) -> tuple[float, float]:
    cells = [run_language_task(shared, task) for task in make_language_tasks("mmlu", data)]
    names = [cell["task"] for cell in cells]
    macro = float(np.mean([cell["metrics"]["acc"] for cell in cells]))
    micro = float(np.mean([x for cell in cells for x in cell["per_sample"]]))
    answers: dict[tuple[str, str], Any] = {}
    alone = stock.loglikelihood

    def once(requests: Any, **options: Any) -> list[Any]:
        """Both figures from one run."""
        if not answers:
            answers.update(zip((r.args for r in requests), alone(requests, **options), strict=True))
        return [answers[r.args] for r in requests]

    stock.loglikelihood = once
    for weighted, ours in ((False, macro), (True, micro)):
        theirs, samples = lm_evals_own(stock, names, weight_by_size=weighted)
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert samples == {cell["task"]: cell["per_sample"] for cell in cells}
    return macro, micro


def test_mmlu_macro_and_micro_are_lm_evals(tmp_path: Path, hub: dict[Any, dict[str, Rows]]) -> None:
    rows = subjects({"virology": 2, "anatomy": 7, "astronomy": 4})
    put_on_hub(hub, rows)
    lm, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    lm.config.max_position_embeddings = 2048
    stock, shared = make_harness(lm, tokenizer), share_prefixes(make_harness(lm, tokenizer))
    macro, micro = assert_mmlu_is_lm_evals(write(tmp_path, "mmlu", rows), hub, stock, shared)
    assert macro != micro


@pytest.mark.parametrize("name", ["lambada", "hellaswag", "winogrande"])
def test_a_models_figures_are_lm_evals(name: str, tmp_path: Path, hub: dict[Any, dict[str, Rows]]) -> None:
    from lm_eval.evaluator import evaluate

    from gemify.evaluation.lm_eval_tasks import task_manager

    path, split, pairs = STOCK[name]
    hub[path] = {"train": [s for _, s in pairs], split: [s for _, s in pairs]}
    lm, tokenizer = tiny_models.build("gpt2"), tiny_models.tokenizer()
    (task,) = make_language_tasks(name, write(tmp_path, name, [row for row, _ in pairs]))
    ours = run_language_task(share_prefixes(make_harness(lm, tokenizer)), task)
    stock_name = "lambada_openai" if name == "lambada" else name
    loaded = task_manager(stock=True).load([stock_name])
    loaded["tasks"][stock_name].set_fewshot_seed(seed=1234)
    theirs = evaluate(lm=make_harness(lm, tokenizer), task_dict=loaded, bootstrap_iters=0)
    assert theirs is not None
    for metric, value in ours["metrics"].items():
        assert value == pytest.approx(theirs["results"][stock_name][f"{metric},none"], abs=1e-12)
    assert ours["per_sample"] == [s[task.main] for s in theirs["samples"][stock_name]]


@pytest.mark.real
def test_the_starters_mmlu_is_lm_evals(
    starter: Any, shared: Path, tmp_path: Path, hub: dict[Any, dict[str, Rows]]
) -> None:
    path = shared / "lm/mmlu/mmlu.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    seen: dict[tuple[str, str], int] = {}
    rows = []
    keep = {"abstract_algebra": 4, "global_facts": 2}
    for row in load_rows(path, {"subject": str, "split": str}):
        key = (row["subject"], row["split"])
        seen[key] = seen.get(key, 0) + 1
        if row["subject"] in keep and (row["split"] == "dev" or seen[key] <= keep[row["subject"]]):
            rows.append(row)
    assert len(rows) == 2 * 5 + 6
    put_on_hub(hub, rows)
    lm, tokenizer = starter
    stock, ours = make_harness(lm, tokenizer), share_prefixes(make_harness(lm, tokenizer))
    macro, micro = assert_mmlu_is_lm_evals(write(tmp_path, "mmlu", rows), hub, stock, ours)
    assert 0 < macro < 1
    assert macro != micro


# What is refused


def complaint(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_names_and_missing_files_are_said(tmp_path: Path) -> None:
    assert "unknown local language task 'arc'" in complaint(lambda: make_language_tasks("arc", tmp_path))
    for name in LANGUAGE_TASKS[1:]:
        said = complaint(lambda name=name: make_language_tasks(name, tmp_path))  # type: ignore[misc]
        assert said.startswith(f"{name} needs {tmp_path / str(local_file(name))}")
    for group in ("nope", "mmlu_stem", "ai2_arc"):  # a group or tag is many cells
        assert f"unknown language task {group!r}" in complaint(lambda group=group: make_language_tasks(group, None))  # type: ignore[misc]


def test_without_a_network_the_hubs_tasks_say_so() -> None:
    (task,) = make_language_tasks("piqa", None)
    assert complaint(lambda: ask(task)).startswith("cannot load piqa from the hub (")


def test_a_task_without_accuracy_is_refused(hub: dict[Any, dict[str, Rows]]) -> None:
    hub["openai/gsm8k", "main"] = {s: [{"question": "1 + 1?", "answer": "#### 2"}] for s in ("train", "test")}
    (task,) = make_language_tasks("gsm8k", None)
    assert complaint(lambda: ask(task)) == "gsm8k is not scored by acc but by exact_match: leave it out"


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("arc_easy", {"gold": 4}, "gold 4 names none of the 4 choices"),
        ("arc_easy", {"gold": -1}, "gold -1 names none"),
        ("arc_easy", {"gold": "2"}, "row 2: 'gold' must be a whole number, got str"),
        ("arc_easy", {"gold": True}, "row 2: 'gold' must be a whole number, got bool"),
        ("arc_easy", {"choices": ["a", 1]}, "choices"),
        ("arc_easy", {"query": None}, "row 2: 'query' must be text, got NoneType"),
        ("hellaswag", {"endings": []}, "names none of the 0 endings"),
        ("winogrande", {"context_options": "ab"}, "row 2: 'context_options' must be a list, got str"),
        ("lambada", {"text": 3}, "row 2: 'text' must be text, got int"),
    ],
)
def test_broken_rows_are_said(name: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [row for row, _ in STOCK[name][2]]
    rows[1] = {**rows[1], **changed}
    said = complaint(lambda: [ask(t) for t in make_language_tasks(name, write(tmp_path, name, rows))])
    assert str(local_file(name)) in said
    assert message in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"choices": ["a", "b", "c"]}, "anatomy has a row without four choices and an answer A-D"),
        ({"choices": ["a", "b", "c", 4]}, "anatomy has a row without four choices"),
        ({"answer": "E"}, "anatomy has a row without four choices and an answer A-D"),
        ({"answer": 1}, "row 1: 'answer' must be text, got int"),
        ({"split": "train"}, "anatomy has 4 dev and 2 test rows, at least 5 and 1 are needed"),
    ],
)
def test_broken_mmlu_is_said(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = subjects({"anatomy": 2})
    assert rows[0]["split"] == "dev"
    rows[0] = {**rows[0], **changed}
    assert message in complaint(lambda: make_language_tasks("mmlu", write(tmp_path, "mmlu", rows)))
    only = [r for r in rows if r["split"] == "test"]
    assert "0 dev and 2 test" in complaint(lambda: make_language_tasks("mmlu", write(tmp_path, "mmlu", only)))


# Loss and logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_text_losses_are_those_of_each_text_alone(name: str) -> None:
    lm, tokenizer = tiny_models.build(name), tiny_models.tokenizer()
    texts = [
        "a text",
        "",
        "a rather longer text than all the others, to be cut",
        "x",
        "é ✓",
        *("abcdefgh"[:n] for n in range(9)),
    ]
    got = compute_text_losses(lm, tokenizer, texts, max_length=20)
    for text, (loss, count) in zip(texts, got, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"].long()[:, :20]
        assert count == max(0, ids.shape[1] - 1)
        if count:
            with torch.no_grad():
                expected = lm(input_ids=ids, labels=ids).loss.item() * count
            assert loss == pytest.approx(expected, rel=1e-5)
        else:
            assert loss == 0.0


def test_compared_logits_show_a_single_changed_weight() -> None:
    lm, other, tokenizer = tiny_models.build("llama"), tiny_models.build("llama"), tiny_models.tokenizer()
    prompts = ["abc", "def ghi", "a third prompt"]
    assert compare_logits(lm, other, tokenizer, prompts) == {"prompts": 3, "identical": 3, "max_difference": 0.0}
    with torch.no_grad():
        other.lm_head.weight[5, 0] += 1e-3
        hidden = [
            lm.model(**tokenizer(p, return_tensors="pt", return_token_type_ids=False))[0][0, :, 0] for p in prompts
        ]
    found = compare_logits(lm, other, tokenizer, prompts)
    assert (found["prompts"], found["identical"]) == (3, 0)
    assert found["max_difference"] == pytest.approx(max(float(h.abs().max()) for h in hidden) * 1e-3, rel=1e-2)
    seen = tokenizer("c")["input_ids"][0]
    changed = tiny_models.build("llama")
    with torch.no_grad():
        changed.model.embed_tokens.weight[seen, 3] += 1e-3
    found = compare_logits(lm, changed, tokenizer, ["abc", "dog", "xyz"])
    assert (found["prompts"], found["identical"]) == (3, 2)
    assert found["max_difference"] > 0


def test_a_grown_table_is_compared_without_its_new_rows() -> None:
    lm, grown, tokenizer = tiny_models.build("llama"), tiny_models.build("llama"), tiny_models.tokenizer()
    grown.resize_token_embeddings(tiny_models.VOCABULARY + 3)
    assert compare_logits(lm, grown, tokenizer, ["abc"])["max_difference"] < 1e-5
