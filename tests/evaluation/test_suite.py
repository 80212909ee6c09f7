"""`evaluate` on tiny models and tiny data: what is measured, what is kept, what is never measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mteb")
pytest.importorskip("lm_eval")

from scipy.stats import spearmanr

import gemify.evaluation.suite
import tiny_data
import tiny_models
from gemify import GemModel
from gemify.evaluation.baselines import BaselineEncoder
from gemify.evaluation.models import encoder_entry
from gemify.evaluation.mteb_runner import is_finished, mteb_model, run_task
from gemify.evaluation.mteb_tasks import GEM16, LLM2VEC15, LOCAL_TASKS, make_task
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.evaluation.suite import SUITES, Plan, evaluate
from gemify.model.base import load_base
from tiny_gems import save_gem

pytestmark = pytest.mark.usefixtures("one_thread")

LANGUAGE = ("held_out", "hellaswag", "lambada")
PLAN = Plan(("STSBenchmark", "Banking77Dev"), LANGUAGE, recovery=10, prompts=4)
STS = Plan(("STSBenchmark",))
CELLS = 2 + 2 + 2 * len(LANGUAGE) + 1  # vectors, recovery from one and from two tokens, language twice, gate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.write(tmp_path_factory.mktemp("data") / "all")


def save(base: Path, directory: Path, seed: int) -> str:
    return str(save_gem(base, directory, special_tokens=2, seed=seed))


@pytest.fixture(scope="module")
def model(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(base_dir, tmp_path_factory.mktemp("saved") / "one", 1)


@pytest.fixture(scope="module")
def sibling(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(base_dir, tmp_path_factory.mktemp("saved") / "two", 2)


class Run:
    """Calls `evaluate`, and keeps what it says it will do."""

    def __init__(self, output: Path, data: Path) -> None:
        self.output, self.data = output, data
        self.estimates: list[tuple[int, int]] = []

    def __call__(self, model: str | None, plan: Plan = PLAN, **options: Any) -> list[ModelEntry]:
        def hear(pending: int, cells: int, seconds: float) -> None:
            assert (seconds > 0) == (pending > 0)
            self.estimates.append((pending, cells))

        settings = {"data": self.data, "device": "cpu", "show_progress_bar": False, "on_estimate": hear, **options}
        return evaluate(model, plan=plan, output=self.output, **settings)

    @property
    def store(self) -> ResultStore:
        return ResultStore(self.output)

    def files(self) -> dict[str, tuple[int, bytes]]:
        """Every measured cell: when it was written, and what it says."""
        found = [p for p in self.output.rglob("*.json") if p.relative_to(self.output).parts[0] != "models"]
        return {str(p.relative_to(self.output)): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    return Run(tmp_path / "out", data)


@pytest.fixture
def own(tmp_path: Path) -> Run:
    """With data of its own, to break."""
    return Run(tmp_path / "out", tiny_data.write(tmp_path / "data"))


@pytest.fixture(scope="module")
def done(model: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished evaluation. Tests may look, and may ask for what is there already."""
    made = Run(tmp_path_factory.mktemp("done") / "out", data)
    made(model)
    return made


def one(run: Run, name: str) -> ModelEntry:
    (found,) = [s for s in run.store.entries() if s.name == name]
    return found


# What is measured


def test_every_cell_is_measured(done: Run, model: str) -> None:
    assert done.estimates[0] == (CELLS, CELLS)
    store, gem, base = done.store, one(done, "gem/one"), one(done, "llama/base")
    assert len(store.entries()) == 2
    assert (gem.facts["kind"], gem.facts["tune"], gem.facts["special_tokens"]) == ("gem", "gated", 2)
    assert gem.facts["base_subject"] == {"name": base.name, "revision": base.revision}
    assert (base.facts["kind"], base.facts["limit"]) == ("base", None)
    assert set(store.scores(gem)) == set(PLAN.vectors)
    assert set(store.cells("language", gem)) == set(store.cells("language", base)) == set(LANGUAGE)
    whole, first = (store.read("recovery", gem, t) for t in ("special_tokens", "special_tokens_first1"))
    assert whole is not None
    assert first is not None
    assert (whole["k"], first["k"]) == (2, 1)
    assert [r["text"] for r in whole["rows"]] == [r["text"] for r in first["rows"]]
    assert {r["tokens"] for r in whole["rows"]} <= set(range(4, 97))
    cell = store.read("language", gem, "hellaswag")
    assert cell is not None
    assert (cell["n"], len(cell["per_sample"]), cell["main"]) == (5, 5, "acc_norm")
    assert store.cells("cost", gem) == {}


def test_scores_are_those_of_the_saved_model(done: Run, model: str) -> None:
    rows = tiny_data.read_rows(done.data / "mteb/sts/STSBenchmark.test.jsonl.gz")
    gem = GemModel.from_pretrained(model, dtype=torch.float32)
    first, second = (gem.encode([r[n] for r in rows], normalize_embeddings=True) for n in ("sentence1", "sentence2"))
    expected = 100 * spearmanr((first * second).sum(1), [r["score"] for r in rows]).statistic
    assert done.store.scores(one(done, "gem/one"))["STSBenchmark"]["score"] == pytest.approx(expected, abs=0.05)


def test_a_gated_gems_language_is_the_bases_in_every_sample(done: Run) -> None:
    gem, base = one(done, "gem/one"), one(done, "llama/base")
    for task in LANGUAGE:
        ours, theirs = (done.store.read("language", s, task) for s in (gem, base))
        assert ours is not None
        assert theirs is not None
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
        assert len(set(ours["per_sample"])) > 1 or task != "held_out"
    gate = done.store.read("gate", gem, "logits")
    assert gate is not None
    assert (gate["prompts"], gate["identical"], gate["max_difference"]) == (4, 4, 0.0)


def test_a_full_gem_with_other_weights_is_told_from_its_base(base_dir: Path, tmp_path: Path, run: Run) -> None:
    gem = GemModel.from_base(str(base_dir), tune="full")
    with torch.no_grad():
        for p in gem.lm.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * p.std()
    gem.save_pretrained(tmp_path / "full")
    run(str(tmp_path / "full"), Plan(language=("held_out",), prompts=3))
    ours, theirs = (run.store.read("language", one(run, n), "held_out") for n in ("gem/full", "llama/base"))
    assert ours is not None
    assert theirs is not None
    assert all(a != b for a, b in zip(ours["per_sample"], theirs["per_sample"], strict=True))
    gate = run.store.read("gate", one(run, "gem/full"), "logits")
    assert gate is not None
    assert (gate["prompts"], gate["identical"]) == (3, 0)
    assert gate["max_difference"] > 0.01


def test_without_special_tokens_nothing_is_recovered(base_dir: Path, tmp_path: Path, run: Run) -> None:
    gem = GemModel.from_base(str(base_dir), tune="lora", special_tokens=0)
    gem.save_pretrained(tmp_path / "simcse")
    run(str(tmp_path / "simcse"), Plan(("STSBenchmark",), recovery=10))
    assert run.estimates == [(1, 1)]
    assert "SimCSE" in one(run, "gem/simcse").facts["label"]


# What is kept


def test_a_second_call_measures_nothing(done: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.files()
    registered = {p: p.read_bytes() for p in (done.output / "models").rglob("*.json")}
    monkeypatch.setattr(GemModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded for nothing"))
    done(model)
    assert done.estimates[-1] == (0, CELLS)
    assert done.files() == before
    assert {p: p.read_bytes() for p in (done.output / "models").rglob("*.json")} == registered


def test_language_is_measured_again_where_sums_round_otherwise(run: Run, model: str) -> None:
    """Else rounding would stand in the table as a difference between a gated GEM and its base."""
    plan = Plan(("STSBenchmark",), ("hellaswag",))
    run(model, plan)
    threads = torch.get_num_threads()
    vectors = {name: file for name, file in run.files().items() if "STSBenchmark" in name}
    try:
        torch.set_num_threads(threads + 1)
        run(model, plan)
        gem, base = (s for s in run.store.entries() if s.facts["kind"] in ("gem", "base"))
        cells = [run.store.read("language", entry, "hellaswag") for entry in (gem, base)]
    finally:
        torch.set_num_threads(threads)
    assert run.estimates == [(3, 3), (2, 3)]
    assert vectors.items() <= run.files().items()
    for cell in cells:
        assert cell is not None
        assert cell["arithmetic"].endswith(f"cpu, {threads + 1} threads")


def test_an_interruption_keeps_what_is_finished(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gemify.evaluation.suite.run_language_task

    def interrupted(harness: Any, task: Any, **options: Any) -> dict[str, Any]:
        if task.name == "lambada":
            raise KeyboardInterrupt
        return real(harness, task, **options)

    plan = Plan(("STSBenchmark",), LANGUAGE, prompts=2)
    with monkeypatch.context() as patch:
        patch.setattr(gemify.evaluation.suite, "run_language_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, plan)
    before = run.files()
    assert {Path(p).stem for p in before} == {"STSBenchmark", "model_meta", "held_out", "hellaswag"}
    assert not list(run.output.rglob("*.part"))
    run(model, plan)
    assert run.estimates == [(8, 8), (5, 8)]
    after = run.files()
    assert {p: after[p] for p in before if "model_meta" not in p} == {
        p: before[p] for p in before if "model_meta" not in p
    }
    assert {Path(p).stem for p in set(after) - set(before)} == {"lambada", "logits", "held_out", "hellaswag"}
    run(model, plan)
    assert run.estimates[-1] == (0, 8)


def test_a_broken_file_fails_its_cells_only(own: Run, model: str, caplog: pytest.LogCaptureFixture) -> None:
    sts, lambada = own.data / "mteb/sts/STSBenchmark.test.jsonl.gz", own.data / "lm/lambada/test.jsonl.gz"
    sound = {path: path.read_bytes() for path in (sts, lambada)}
    rows = tiny_data.read_rows(sts)
    tiny_data.write_rows(sts, [rows[0], {**rows[1], "score": None}, *rows[2:]])
    lambada.write_bytes(sound[lambada][:-20])
    plan = Plan(("STSBenchmark", "STS12"), ("hellaswag", "lambada"))
    with pytest.raises(ValueError) as error:
        own(model, plan)
    said = str(error.value)
    assert "\n" not in said
    assert "3 of 6 cells failed" in said
    assert "GEM gated: one: STSBenchmark" in said
    assert f"{sts} row 2: 'score' must be a number" in said
    assert any(f"lambada: {lambada}: a damaged .gz file" in record.getMessage() for record in caplog.records)
    kept = own.files()
    assert {Path(p).stem for p in kept} == {"STS12", "model_meta", "hellaswag"}
    for path, content in sound.items():
        path.write_bytes(content)
    own(model, plan)
    assert own.estimates == [(6, 6), (3, 6)]
    assert {Path(p).stem for p in own.files()} == {"STS12", "STSBenchmark", "model_meta", "hellaswag", "lambada"}
    assert {p: c for p, c in own.files().items() if p in kept and "meta" not in p} == {
        p: c for p, c in kept.items() if "meta" not in p
    }


def test_every_setting_has_results_of_its_own(run: Run, model: str) -> None:
    plan = Plan(("STSBenchmark",), ("held_out",))
    settings: list[dict[str, Any]] = [{}, {"limit": 3}, {"instructions": True}, {"dtype": "bfloat16"}]
    scores = []
    for options in settings:
        gem = run(model, plan, **options)[0]
        scores.append(run.store.scores(gem)["STSBenchmark"]["score"])
        assert [gem.facts[n] for n in ("dtype", "limit", "instructions")] == [
            options.get(n, default) for n, default in (("dtype", "float32"), ("limit", None), ("instructions", False))
        ]
        cell = run.store.read("language", gem, "held_out")
        assert cell is not None
        assert cell["n"] == options.get("limit", 60)
    revisions = {s.revision.partition("-")[2] for s in run.store.entries() if s.name == "gem/one"}
    assert revisions == {"float32", "float32-limit3", "float32-instructions", "bfloat16"}
    assert len(set(scores)) == 4
    # The base's language does not depend on instructions: measured once, and the facts say so.
    assert run.estimates == [(3, 3), (3, 3), (2, 3), (3, 3)]
    bases = [s for s in run.store.entries() if s.name == "llama/base"]
    assert {s.revision.partition("-")[2] for s in bases} == {"float32", "float32-limit3", "bfloat16"}
    assert not any(s.facts["instructions"] for s in bases)


def test_two_gems_share_their_bases_cells(run: Run, model: str, sibling: str) -> None:
    plan = Plan(language=("held_out", "hellaswag"))
    run(model, plan)
    before = run.files()
    run(sibling, plan)
    assert run.estimates == [(4, 4), (2, 4)]
    after = run.files()
    assert {p: after[p] for p in before} == before
    assert [s.name for s in run.store.entries()] == ["gem/one", "gem/two", "llama/base"]


def test_a_gem_on_another_base_is_another_model(run: Run, model: str, tmp_path: Path) -> None:
    other = tiny_models.build("llama", seed=5)
    other.save_pretrained(tmp_path / "llama")
    tiny_models.tokenizer().save_pretrained(tmp_path / "llama")
    mine = run(model, STS)[0]
    theirs = run(model, STS, base=str(tmp_path / "llama"))[0]
    assert run.estimates == [(1, 1), (1, 1)]
    assert mine.revision != theirs.revision
    assert run.store.scores(mine)["STSBenchmark"]["score"] != run.store.scores(theirs)["STSBenchmark"]["score"]


def test_the_same_base_found_elsewhere_is_the_same_model(run: Run, model: str, base_dir: Path) -> None:
    assert run(model, STS)[0] == run(model, STS, base=str(base_dir))[0]
    assert run.estimates == [(1, 1), (0, 1)]


def test_benchmarks_cut_by_the_plan_are_named_so(run: Run, model: str) -> None:
    plan = Plan(language=("hellaswag",), language_limit=3)
    gem = run(model, plan)[0]
    cell = run.store.read("language", gem, "hellaswag_first3")
    assert cell is not None
    assert (cell["n"], cell["group"]) == (3, "hellaswag, first 3")
    whole = run(model, Plan(language=("hellaswag",)))[0]
    assert whole == gem
    assert set(run.store.cells("language", whole)) == {"hellaswag", "hellaswag_first3"}
    assert run.estimates[-1] == (2, 2)


# Baselines and other encoders


def test_baselines_are_measured_on_the_gems_base(run: Run, model: str, base_dir: Path) -> None:
    entries = run(model, STS, baselines=("mean", "prompteol"))
    assert [s.name for s in entries] == ["gem/one", "llama/mean", "llama/prompteol"]
    assert [s.facts["kind"] for s in entries] == ["gem", "baseline", "baseline"]
    rows = tiny_data.read_rows(run.data / "mteb/sts/STSBenchmark.test.jsonl.gz")
    for entry, method in zip(entries[1:], ("mean", "prompteol"), strict=True):
        encoder = BaselineEncoder(*load_base(str(base_dir), dtype=torch.float32), method)  # type: ignore[arg-type]
        one, two = (torch.tensor(encoder.encode([r[n] for r in rows])) for n in ("sentence1", "sentence2"))
        found = spearmanr(torch.cosine_similarity(one, two), [r["score"] for r in rows]).statistic
        assert run.store.scores(entry)["STSBenchmark"]["score"] == pytest.approx(100 * found, abs=0.05)
    alone = run(None, STS, base=str(base_dir), baselines=("mean",))  # without a GEM: the same baseline
    assert alone == [entries[1]]
    assert run.estimates == [(3, 3), (0, 1)]


def test_a_sentence_transformer_is_measured_under_its_own_name(run: Run, base_dir: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer

    body = models.Transformer(str(base_dir))
    made = SentenceTransformer(modules=[body, models.Pooling(body.get_word_embedding_dimension(), "mean")])
    made.save(str(tmp_path / "mine"))
    (entry,) = run(None, STS, encoders=[f"st:{tmp_path / 'mine'}"])
    assert (entry.name, entry.facts["kind"], entry.facts["label"]) == ("st/mine", "encoder", "mine")
    (toy,) = [s for s in run.store.entries() if s.name == "st/mine"]
    rows = tiny_data.read_rows(run.data / "mteb/sts/STSBenchmark.test.jsonl.gz")
    one, two = (made.encode([r[n] for r in rows], convert_to_tensor=True).cpu() for n in ("sentence1", "sentence2"))
    found = spearmanr(torch.cosine_similarity(one, two), [r["score"] for r in rows]).statistic
    assert run.store.scores(toy)["STSBenchmark"]["score"] == pytest.approx(100 * found, abs=0.05)
    changed = next((tmp_path / "mine").rglob("*.safetensors"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    assert encoder_entry(f"st:{tmp_path / 'mine'}", _settings())[0].revision != entry.revision


def _settings() -> Any:
    from gemify.evaluation.models import EvalSettings

    return EvalSettings()


def test_encoders_of_one_short_name_are_told_apart() -> None:
    one, two = (encoder_entry(f"st:{owner}/small", _settings())[0] for owner in ("anna", "bert"))
    assert one.name != two.name
    assert one.facts["label"] == two.facts["label"] == "small"


# Errors, before anything is measured


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": Plan(("STSBenchmrk",))}, "STSBenchmrk is not among the local tasks"),
        ({"plan": Plan(("SICK-R",))}, "SICK-R is not among the local tasks"),
        ({"plan": Plan(language=("hellaswog",))}, "unknown local language task 'hellaswog': choose from"),
        ({"plan": Plan(language=("piqa",))}, "piqa needs .*piqa.val.jsonl.gz, which does not exist"),
        ({"baselines": ("median",)}, "unknown baseline 'median': choose from mean"),
        ({"dtype": "float8"}, "unknown dtype 'float8': choose one of float32"),
        ({"limit": 1}, "limit must be at least 2 rows, got 1"),
        ({"encoders": ["mine"]}, "unknown encoder 'mine': write st:PATH"),
        ({"encoders": ["st:"]}, "unknown encoder 'st:': write st:PATH"),
        ({"encoders": ["hf:mine"]}, "unknown encoder 'hf:mine'"),
        ({"data": Path("/no/such")}, "no such data directory: /no/such"),
        ({"model": "/no/gem"}, "no such GEM directory"),
        ({"model": None}, "nothing to evaluate: give --model"),
        ({"model": None, "base": "BASE", "plan": STS}, "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    options: dict[str, Any], said: str, run: Run, model: str, base_dir: Path
) -> None:
    given = {"model": model, **options}
    if given.get("base"):
        given["base"] = str(base_dir)
    with pytest.raises(ValueError, match=said) as error:
        run(given.pop("model"), **given)
    assert "\n" not in str(error.value)
    assert not run.output.exists()


def test_missing_text_is_said_first(own: Run, model: str) -> None:
    (own.data / "text/texts.txt.gz").unlink()
    for plan in (Plan(language=("held_out",)), Plan(recovery=5), Plan(cost=True), Plan(prompts=2)):
        with pytest.raises(ValueError, match=r"held-out text is read from .*, which has none"):
            own(model, plan)
    assert not own.output.exists()
    own(model, STS)  # needs none
    assert own.estimates == [(1, 1)]


def test_results_cannot_be_kept_in_a_file(run: Run, model: str) -> None:
    run.output.write_text("")
    with pytest.raises(ValueError, match="it is a file, give a directory"):
        run(model, STS)


def test_the_mteb_directory_itself_will_do(run: Run, model: str) -> None:
    run(model, STS, data=run.data / "mteb")
    run(model, STS)
    assert run.estimates == [(1, 1), (0, 1)]


def test_a_damaged_cell_is_said_and_a_damaged_result_measured_again(run: Run, model: str) -> None:
    gem = run(model, Plan(("STSBenchmark",), ("held_out",)))[0]
    path = run.store.path("language", gem, "held_out")
    path.write_text('{"task": ')
    with pytest.raises(ValueError, match=r"held_out\.json is damaged: delete it and evaluate again"):
        run.store.cells("language", gem)
    (result,) = (run.output / "results" / gem.folder).glob("STS*.json")
    whole = json.loads(result.read_text())
    result.write_text(result.read_text()[:50])
    run(model, STS)
    assert run.estimates[-1] == (1, 1)
    assert json.loads(result.read_text())["scores"] == whole["scores"]


# Plans


def test_plans_of_the_suites(data: Path) -> None:
    local: Callable[[str], Plan] = lambda name: Plan.of(name, data=data)  # noqa: E731
    assert local("quick").language_limit == 100
    assert local("quick").cost
    assert set(local("quick").vectors) <= set(LOCAL_TASKS)
    assert (local("gem16").vectors, local("llm2vec15").vectors) == (GEM16, LLM2VEC15)
    assert local("mteb").vectors == local("all").vectors == tuple(LOCAL_TASKS)
    assert local("mteb").language == ()
    assert local("lm").vectors == ()
    assert {"mmlu", "held_out", "hellaswag"} <= set(local("lm").language)
    assert local("lm").prompts == local("all").prompts == 200
    assert local("all").attack
    hub = {name: Plan.of(name, data=None) for name in SUITES}  # offline: names only
    assert len(hub["mteb"].vectors) == 56
    assert {"STSBenchmark", "ArguAna", "SummEval"} <= set(hub["all"].vectors)
    assert hub["quick"] == local("quick")
    with pytest.raises(ValueError, match="unknown suite 'quik': choose one of quick, gem16"):
        Plan.of("quik", data=None)


def test_tasks_by_name_replace_a_suites(data: Path) -> None:
    plan = Plan.of("quick", data=data, tasks=["STS12", "hellaswag", "held_out", "MRPC"])
    assert plan == Plan(("STS12", "MRPC"), ("hellaswag", "held_out"))


def test_run_task_and_evaluate_share_their_results(run: Run, model: str) -> None:
    """The library's two doors lead to the same files."""
    from gemify.evaluation.mteb_tasks import make_task

    gem = run(model, STS)[0]
    toy = tiny_data.Trigrams()
    score = run_task(toy, make_task("STSBenchmark", run.data), gem, run.store)
    assert toy.asked == []
    assert score == pytest.approx(run.store.scores(gem)["STSBenchmark"]["score"])


def test_mteb_runs_a_gem_as_one_of_its_models(model: str, data: Path, tmp_path: Path) -> None:
    import mteb

    run = Run(tmp_path / "ours", data)
    (entry,) = [e for e in run(model, STS) if e.facts["kind"] == "gem"]
    meta = mteb_model(model, device="cpu")
    assert (meta.name, meta.revision, meta.max_tokens) == (entry.name, entry.revision, 512)
    result = mteb.evaluate(
        meta, make_task("STSBenchmark", data), cache=mteb.ResultCache(cache_path=tmp_path / "theirs"), co2_tracker=False
    )
    assert 100 * result.task_results[0].get_score() == pytest.approx(run.store.scores(entry)["STSBenchmark"]["score"])
    assert is_finished(ResultStore(tmp_path / "theirs"), entry, "STSBenchmark")
