"""The report of a small made-up store: every figure in it is worked out by hand here."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("markdown_it")

from PIL import Image

from gemify.evaluation import mteb_tasks
from gemify.evaluation.report import comparison, plots
from gemify.evaluation.report.comparison import SUBSET, language_rows, load_models
from gemify.evaluation.report.render import card_section, eval_results, write_report
from gemify.evaluation.report.sections import PUBLISHED, write_sections
from gemify.evaluation.results import ModelEntry, ResultStore
from gemify.io.tables import escape_markdown

EVIL = "<script>alert(1)</script> | a `pipe` & *stars*"
BASE = ModelEntry("starter/base", "aa-float32", {"label": "starter", "kind": "base", "dtype": "float32", "limit": None})


def gem_entry(name: str = "gem/run1", revision: str = "bb-float32", **facts: Any) -> ModelEntry:
    return ModelEntry(
        name,
        revision,
        {
            "label": "GEM gated4",
            "kind": "gem",
            "tune": "gated",
            "base": "starter",
            "base_subject": {"name": BASE.name, "revision": BASE.revision},
            "special_tokens": 4,
            "dtype": "float32",
            "limit": None,
            "instructions": False,
            "training": {"steps": 45, "loss": 0.0648, "tokens": 38259, "seconds": 218.2, "padding": 0.119},
            "curve": [{"step": 1, "loss": 7.9, "ntp": 7.9}, {"step": 2, "loss": 0.5, "contrastive": 0.5}],
            **facts,
        },
    )


def score(store: ResultStore, entry: ModelEntry, **tasks: float) -> None:
    """Embedding results as mteb writes them; scores from 0 to 1."""
    for task, value in tasks.items():
        path = store.directory / "results" / entry.folder / f"{task.replace('SICK_R', 'SICK-R')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"main_score": value, "hf_subset": "default"}]
        path.write_text(json.dumps({"scores": {"test": rows}, "evaluation_time": 1.0, "task_name": path.stem}))
    (store.directory / "results" / entry.folder / "model_meta.json").write_text("{}")


def language(
    store: ResultStore, entry: ModelEntry, task: str, samples: list[float], group: str = "", **kind: Any
) -> None:
    main = kind.get("main", "acc")
    value = kind.get("value", sum(samples) / len(samples))
    cell = {"task": task, "group": group or task, "n": len(samples), "metrics": {main: value}, "main": main}
    store.write("language", entry, task, {**cell, "per_sample": samples, "seconds": 1.0})


def recovered(text: str, back: str, tokens: int, f1: float) -> dict[str, Any]:
    return {
        "text": text,
        "recovered": back,
        "tokens": tokens,
        "exact": text == back,
        "token_f1": f1,
        "rouge_l": f1 / 2,
    }


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    """A GEM with a cell of every kind, and its base."""
    made, gem = ResultStore(tmp_path / "results"), gem_entry()
    made.register(BASE)
    made.register(gem)
    fill(made, gem)
    language(made, BASE, "hellaswag", [1, 1, 0, 0, 1], main="acc_norm")
    language(made, BASE, "arc_easy", [1, 0, 1])
    language(made, BASE, "mmlu_law", [1, 0], "mmlu")
    language(made, BASE, "mmlu_art", [1, 1, 0, 0, 0, 1], "mmlu")
    language(made, BASE, "held_out", [4.0, 5.0, 3.0], main="loss", value=4.125)
    return made


def fill(store: ResultStore, gem: ModelEntry) -> None:
    score(store, gem, STSBenchmark=0.72125, STS12=0.6, NFCorpus=0.1, STSBenchmarkDev=0.79)
    language(store, gem, "hellaswag", [1, 0, 0, 0, 1], main="acc_norm")
    language(store, gem, "arc_easy", [1, 0, 1])
    language(store, gem, "mmlu_law", [0, 0], "mmlu")
    language(store, gem, "mmlu_art", [1, 1, 1, 1, 0, 1], "mmlu")
    language(store, gem, "held_out", [4.5, 5.0, 3.1], main="loss", value=4.25)
    store.write("gate", gem, "logits", {"prompts": 200, "identical": 200, "max_difference": 0.0})
    rows = [recovered("a cat", "a cat", 2, 1.0), recovered(EVIL, "a dog", 12, 0.25), recovered("x " * 70, "x", 70, 0.5)]
    store.write("recovery", gem, "special_tokens", {"k": 4, "rows": rows})
    guess = {"text": "a cat", "guess": "a hat", "tokens": 2, "token_f1": 0.5}
    store.write("recovery", gem, "vector", {"rows": [guess], "note": f"by {EVIL}", "chance_token_f1": 0.125})
    store.write("cost", gem, "encode", {"tokens_per_second": 1234.4, "milliseconds_a_query": 21.04, "device": "cpu"})


def line(text: str, start: str) -> list[str]:
    """The cells of the only table row that starts so."""
    rows = [row for row in text.splitlines() if row.startswith(f"| {start} |")]
    assert len(rows) == 1, rows
    return [cell.strip() for cell in rows[0].strip("|").split("|")]


def part(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}")[1].split("\n## ")[0]


def test_language_figures_are_the_hand_computed_ones(store: ResultStore, tmp_path: Path) -> None:
    text = write_report([store.directory], tmp_path / "out")[0].read_text()
    # One of five differs by -1: mean -0.2, sample variance (4 * 0.04 + 0.64) / 4 = 0.2, error sqrt(0.2 / 5) = 0.2.
    assert line(text, "hellaswag") == ["hellaswag", "acc_norm", "5", "60.00", "40.00", "-20.00", "20.00"]
    assert line(text, "arc_easy") == ["arc_easy", "acc", "3", "66.67", "66.67", "0 (identical)", "0.00"]
    # law: gaps -1, 0 (variance 1/2, n 2); art: gaps 0, 0, 1, 1, 0, 0 (variance 4/15, n 6).
    macro = 100 * math.sqrt(0.5 / 2 + (4 / 15) / 6) / 2
    pooled = [-1, 0, 0, 0, 1, 1, 0, 0]
    mean = sum(pooled) / 8
    micro = 100 * math.sqrt(sum((gap - mean) ** 2 for gap in pooled) / 7 / 8)
    both = "MMLU {} (2 subjects)"
    assert line(text, both.format("macro"))[1:] == ["acc", "8", "50.00", "41.67", "-8.33", f"{macro:.2f}"]
    assert line(text, both.format("micro"))[1:] == ["acc", "8", "50.00", "62.50", "+12.50", f"{micro:.2f}"]
    gaps = [0.5, 0.0, 0.1]
    error = math.sqrt(sum((gap - 0.2) ** 2 for gap in gaps) / 2 / 3)
    expected = ["held-out loss", "loss", "3", "4.1250", "4.2500", "+0.1250", f"{error:.4f}"]
    assert line(text, "held-out loss") == expected


def test_equal_loss_is_called_identical_only_sample_by_sample(store: ResultStore) -> None:
    gem = gem_entry()
    language(store, gem, "held_out", [4.0, 5.0, 3.0], main="loss", value=4.125)
    language(store, gem, "hellaswag", [0, 1, 0, 1, 1], main="acc_norm")  # the same mean, other samples
    rows = {row.task: row for row in language_rows(load_models([store.directory])[0])}
    assert rows["held-out loss"].identical
    assert rows["held-out loss"].error == 0.0
    assert not rows["hellaswag"].identical
    assert rows["hellaswag"].difference == 0.0


def test_other_samples_give_no_difference(store: ResultStore, tmp_path: Path) -> None:
    language(store, BASE, "hellaswag", [1, 1], main="acc_norm")
    text = write_report([store.directory], tmp_path / "out")[0].read_text()
    assert line(text, "hellaswag") == ["hellaswag", "acc_norm", "5", "100.00", "40.00", "–", "–"]
    assert "measured on different samples" in text


def test_another_arithmetic_gives_no_difference(store: ResultStore, tmp_path: Path) -> None:
    """Sums that are rounded otherwise change answers of a model that is the same."""
    for entry, threads in ((BASE, 2), (gem_entry(), 1)):
        language(store, entry, "hellaswag", [1, 0], main="acc_norm")
        cell = store.read("language", entry, "hellaswag")
        assert cell is not None
        store.write("language", entry, "hellaswag", {**cell, "arithmetic": f"cpu, {threads} threads"})
    text = write_report([store.directory], tmp_path / "out")[0].read_text()
    assert line(text, "hellaswag") == ["hellaswag", "acc_norm", "2", "50.00", "50.00", "–", "–"]
    assert "or with other numerics" in text


def test_embedding_means_and_published_rows(store: ResultStore, tmp_path: Path) -> None:
    text = part(write_report([store.directory], tmp_path / "out")[0].read_text(), "Embedding")
    means, sts, retrieval, paper = re.split(r"\n\*\*", text)[1:]
    assert "| model | STS (2) | Retrieval (1) | all (3) |" in means
    assert line(means, "GEM gated4") == ["GEM gated4", "66.06", "10.00", "47.38"]  # the development split is in none
    assert "| model | STS12 | STSBenchmark | STSBenchmarkDev (development) |" in sts
    assert line(sts, "GEM gated4")[1:] == ["60.00", "72.12", "79.00"]
    assert line(sts, "all-MiniLM-L6-v2 (published, not measured here)")[1:] == ["–", "82.00", "–"]
    assert line(retrieval, "potion-base-8M (published, not measured here)")[1:] == ["24.30"]
    assert line(paper, "GEM Llama-3.2-1B (published, not measured here)")[1] == "68.42"
    assert "GEM16" not in text
    assert "starter |" not in text  # the base has no embedding score, hence no row


def test_a_suites_mean_needs_all_its_tasks(store: ResultStore) -> None:
    gem = gem_entry()
    for at, task in enumerate(mteb_tasks.GEM16[1:]):
        score(store, gem, **{task.replace("-", "_"): at / 100})
    score(store, gem, ClimateFEVER=0.5)

    def embedding() -> str:
        return write_sections(load_models([store.directory]))["Embedding"]

    def suites() -> dict[str, str]:
        means = embedding().split("**Means (number of tasks)**\n\n")[1].split("\n\n")[0]
        names, _, cells = (row.strip("| ").split(" | ") for row in means.splitlines())
        return {name.split()[0]: cell for name, cell in zip(names, cells, strict=True)}

    assert {"GEM16", "LLM2VEC15", "NINE"}.isdisjoint(suites())  # ArguAna is missing
    score(store, gem, ArguAna=0.75)
    expected = (75 + 50 + sum(range(1, 15))) / 16
    assert suites()["GEM16"] == f"{expected:.2f}"
    assert suites()["LLM2VEC15"] == f"{(75 + sum(range(1, 15))) / 15:.2f}"
    assert suites()["NINE"] == f"{(75 + 1 + 2 + sum(range(9, 15))) / 9:.2f}"
    nine = embedding().split("**Mean of nine")[1].split("\n\n")[1].splitlines()[2:]
    assert nine[::7] == ["| GEM gated4 | 16.33 |", f"| bge-small ({PUBLISHED}) | 69.20 |"]


def test_gate_recovery_cost_and_training(store: ResultStore, tmp_path: Path) -> None:
    text = write_report([store.directory], tmp_path / "out")[0].read_text()
    assert line(part(text, "Logits"), "GEM gated4")[1:] == ["200", "200", "0", "equal bit for bit"]
    stored, _, guessed, _ = re.split(r"\n\*\*", part(text, "Recovery"))[1:]
    assert line(stored, "1-8")[1:] == ["1", "100.0", "1.000", "0.500"]
    assert line(stored, "9-16")[1:] == ["1", "0.0", "0.250", "0.125"]
    assert line(stored, "65+")[1:] == ["1", "0.0", "0.500", "0.250"]
    assert line(stored, "all")[1:] == ["3", "33.3", "0.583", "0.292"]
    assert line(guessed, "all")[1:] == ["1", "–", "0.500", "–"]  # neither exact match nor ROUGE-L was measured
    assert "token F1 by chance 0.125." in text
    assert line(part(text, "Cost"), "GEM gated4")[1:] == ["cpu", "–", "–", "1,234", "–", "–", "–", "21.0", "–"]
    training = line(part(text, "Training"), "GEM gated4")[1:]
    assert training == ["45", "38,259", "218", "–", "11.9%", "–", "–", "0.0648", "–", "–"]


def test_recovery_from_fewer_special_tokens_is_shown_too(store: ResultStore, tmp_path: Path) -> None:
    gem = next(s for s in store.entries() if s.facts["kind"] == "gem")
    rows = [recovered("a cat", "a bat", 2, 0.375)]
    store.write("recovery", gem, "special_tokens_first1", {"k": 1, "rows": rows})
    text = write_report([store.directory], tmp_path / "out")[0].read_text()
    one, four = (text.index(f"from the KV of {k}") for k in ("1 special token", "4 special tokens"))
    assert one < four
    assert "0.375" in text[one:four]


def test_a_store_with_almost_nothing_shows_no_figure(tmp_path: Path) -> None:
    made = ResultStore(tmp_path / "results")
    made.register(ModelEntry("gem/bare", "cc", {"label": "bare"}))
    paths = write_report([made.directory], tmp_path / "out")
    assert [p.name for p in paths] == ["report.md", "report.html"]
    text = paths[0].read_text()
    assert [row for row in text.splitlines() if row.startswith("## ")] == ["## Models"]
    assert line(text, "bare")[1:5] == ["–"] * 4


def test_missing_base_and_unmeasured_cells_are_dashes(store: ResultStore, tmp_path: Path) -> None:
    other = gem_entry("gem/run2", "dd-float32", label="other", base_subject=None, training=None, curve=[])
    store.register(other)
    score(store, other, STS12=0.5)
    language(store, other, "arc_easy", [1, 0, 0])
    text = write_report([store.directory], tmp_path / "out")[0].read_text()
    means = part(text, "Embedding").split("\n**")[1]
    assert "those of every model (1)" in means
    assert line(means, "other") == ["other", "–", "–", "–", "50.00"]
    alone = text.split("**other**")[1].split("**")[0]
    assert line(alone, "arc_easy") == ["arc_easy", "acc", "3", "–", "33.33", "–", "–"]
    assert "other |" not in part(text, "Training")


def test_subset_runs_are_marked_everywhere_and_only_there(store: ResultStore, tmp_path: Path) -> None:
    def written(results: ResultStore, output: Path) -> tuple[str, str, list[str]]:
        markdown, html, *images = write_report([results.directory], output)
        titles = []
        for path in images:
            with Image.open(path) as image:
                titles.append(image.info["Title"])
        return markdown.read_text(), html.read_text(), titles

    for text in written(store, tmp_path / "whole"):
        assert SUBSET not in str(text)
    few = ResultStore(tmp_path / "few")
    entry = gem_entry(revision="bb-float32-limit50", limit=50)
    few.register(entry)
    fill(few, entry)
    markdown, html, titles = written(few, tmp_path / "out")
    assert len(titles) == 3  # no base there, so no trade-off
    assert all(SUBSET in title for title in titles)
    paper = "From the paper"
    tables = re.findall(r"^\*\*(.*)\*\*$", markdown, re.M)
    assert tables
    assert all(SUBSET in title or title.startswith(paper) for title in tables)
    assert all(SUBSET in row for row in markdown.splitlines() if row.startswith("#"))
    assert "limit 50" in markdown
    headings = re.findall(r"<(?:h1 [^>]*|h2 [^>]*|title|p><strong)>(.*?)</", html)
    assert len(headings) > 8
    assert all(SUBSET in title or title.startswith(paper) for title in headings)
    assert SUBSET in card_section(few, entry)
    assert eval_results(few, entry) == []


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_escapes_what_it_shows(store: ResultStore, tmp_path: Path) -> None:
    store.register(gem_entry("gem/evil", "ee", label=f"{EVIL} $x_$ " + "\n# h", curve=[{"step": 1, "loss": 2.0}]))
    markdown, html, *images = (p.read_bytes() for p in write_report([store.directory], tmp_path / "out"))
    page = Page()
    page.feed(html.decode())
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert "link" not in names
    assert b"&lt;script&gt;alert(1)&lt;/script&gt;" in html
    sources = [v for _, attrs in page.tags for k, v in attrs.items() if k in {"src", "href", "srcset", "style"}]
    assert len(sources) > len(images)
    assert all(v is not None and v.startswith(("#", "data:image/png;base64,")) for v in sources)
    assert b"url(" not in html
    assert b"@import" not in html
    inlined = [base64.b64decode(str(v).split(",")[1]) for v in sources if str(v).startswith("data:")]
    assert sorted(inlined) == sorted(images)
    assert b"<script" not in markdown
    assert b"\n# h" not in markdown
    assert html.count(b"<td><strong>") > 0


def test_differing_words_are_marked() -> None:
    text, back = comparison.diff_words("the black cat sat", "the cat sat down")
    assert [word.text for word in text if word.differs] == ["black"]
    assert [word.text for word in back if word.differs] == ["down"]
    cut, _ = comparison.diff_words("x " * 100, "")
    assert len(cut) == 61
    assert cut[-1].text == "…"


def test_examples_are_spread_over_lengths() -> None:
    chosen = comparison.sample_by_length([{"tokens": n} for n in range(100, 0, -1)])
    assert [row["tokens"] for row in chosen] == [1, 10, 19, 28, 37, 46, 55, 64, 73, 82, 91, 100]


def test_directories_are_merged_and_the_first_counts(store: ResultStore, tmp_path: Path) -> None:
    second, gem = ResultStore(tmp_path / "second"), gem_entry(label="renamed")
    second.register(gem)
    score(second, gem, STS12=0.9, STS13=0.4)
    second.write("gate", gem, "logits", {"prompts": 1, "identical": 0, "max_difference": 2.0})
    models = load_models([store.directory, second.directory])
    assert [m.label for m in models] == ["GEM gated4", "starter"]
    assert models[0].scores["STS12"] == pytest.approx(60.0)
    assert models[0].scores["STS13"] == pytest.approx(40.0)
    gate = models[0].cell("gate", "logits")
    assert gate is not None
    assert gate["prompts"] == 200


def test_settings_tell_rows_apart(store: ResultStore) -> None:
    store.register(gem_entry(revision="bb-bfloat16", dtype="bfloat16"))
    store.register(gem_entry(revision="bb-float32-instructions", instructions=True))
    store.register(gem_entry(revision="bb-float32-limit9", limit=9))
    store.register(gem_entry(revision="bb-int4", dtype="bfloat16", quantize="int4"))
    store.register(gem_entry("gem/run9"))
    labels = [m.label for m in load_models([store.directory]) if m.fact("kind") == "gem"]
    assert labels == [
        "GEM gated4 (bfloat16, no instructions)",
        "GEM gated4 (float32, no instructions) [gem/run1 bb-float32]",
        "GEM gated4 (float32, with instructions)",
        "GEM gated4 (float32, no instructions, SUBSET RUN, limit 9)",
        "GEM gated4 (int4, no instructions)",
        "GEM gated4 (float32, no instructions) [gem/run9 bb-float32]",
    ]


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_without_models_is_refused_in_one_line(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no evaluated model" if there else "does not exist") as error:
        write_report([tmp_path / "empty"], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="at least one directory"):
        write_report([], tmp_path / "out")


def test_an_output_that_is_a_file_is_refused(store: ResultStore, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file, give a directory"):
        write_report([store.directory], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_writing_again_gives_the_same_files_and_no_old_plot(store: ResultStore, tmp_path: Path) -> None:
    paths = write_report([store.directory], tmp_path / "out")
    names = ["report-embedding.png", "report-recovery.png", "report-trade-off.png", "report-training.png"]
    assert [p.name for p in paths] == ["report.md", "report.html", *names]
    before = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_report([store.directory], tmp_path / "out")] == before
    (store.directory / "recovery" / gem_entry().folder / "special_tokens.json").unlink()
    write_report([store.directory], tmp_path / "out")
    assert not (tmp_path / "out" / "report-recovery.png").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        {"report.md", "report.html", *names} - {"report-recovery.png"}
    )


def test_the_trade_off_is_against_held_out_loss_else_accuracy(store: ResultStore) -> None:
    figure = plots.trade_off(load_models([store.directory]))
    assert figure is not None
    points = [tuple(float(v[0]) for v in mark.get_data()) for mark in figure.axes[0].lines[1:]]
    assert points == [(pytest.approx(0.125), pytest.approx((72.125 + 60 + 10) / 3))]
    (store.directory / "language" / BASE.folder / "held_out.json").unlink()
    figure = plots.trade_off(load_models([store.directory]))
    assert figure is not None
    assert "accuracy" in figure.axes[0].get_xlabel()
    lost = float(figure.axes[0].lines[1].get_xdata()[0])
    assert lost == pytest.approx((20 + 0 + 25 / 3) / 3)  # hellaswag, arc_easy, MMLU macro; not micro as well
    figure.savefig(io.BytesIO(), format="png")


def test_no_data_no_plot() -> None:
    assert [draw([]) for _, draw in plots.PLOTS.values()] == [None] * len(plots.PLOTS)


def test_card_section_has_the_measured_and_nothing_else(store: ResultStore) -> None:
    text = card_section(store, ModelEntry("gem/run1", "bb-float32"))
    assert text.startswith("## Measured results\n")
    assert "(float32, no instructions, whole tasks)" in text
    assert line(text, "arc_easy")[5] == "0 (identical)"
    assert "against starter" in text
    assert line(text, "STSBenchmark") == ["STSBenchmark", "STS", "72.12"]
    assert "published" not in text
    assert "alert" not in text.replace(escape_markdown(f"by {EVIL}"), "")  # no text of the data
    assert SUBSET not in text
    with pytest.raises(ValueError, match="has no results of gem/none"):
        card_section(store, ModelEntry("gem/none", "bb"))


def test_eval_results_are_arguments_of_the_hubs(store: ResultStore) -> None:
    from huggingface_hub import EvalResult

    rows = eval_results(store, gem_entry())
    found = {row["task_name"]: (row["task_type"], row["metric_value"]) for row in rows}
    assert found["STSBenchmark"] == ("STS", 72.125)
    assert found["NFCorpus"] == ("Retrieval", 10.0)
    assert found["held-out loss"] == ("Language", 4.25)
    assert found["MMLU macro (2 subjects)"] == ("Language", 41.6667)
    assert len([EvalResult(**row) for row in rows]) == 4 + 5


def test_published_figures_are_the_papers() -> None:
    tables = comparison.TABLES
    assert [tables[f"table{n}"].number for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert tables["table1"].value("GEM Llama-3.2-1B", "STS") == 68.42
    assert tables["table1"].value("LLM2Vec (unsup.) Sheared-Llama-1.3B", "MMLU") is None
    assert tables["table1"].value("GritLM-7B (supervised)", "Classification") == 79.5
    assert tables["table2"].rows[4] == comparison.PaperRow("0.8", (48.11, 27.72))
    assert tables["table3"].value("vanilla", "MTEB subset") == 18.29
    assert tables["table4"].value("5", "MMLU") == 29.81
    assert tables["table5"].value("8B", "MMLU, GEM") == 57.24
    assert all(len(row.values) == len(table.columns) for table in tables.values() for row in table.rows)
    with pytest.raises(ValueError, match="table 2 has no"):
        tables["table2"].value("0.8", "STS")


def test_suites_and_types_are_mteb_s() -> None:
    assert len(mteb_tasks.GEM16) == 16
    assert len(mteb_tasks.LLM2VEC15) == 15
    assert set(mteb_tasks.NINE) < set(mteb_tasks.LLM2VEC15) < set(mteb_tasks.GEM16) < set(mteb_tasks.TASK_TYPES)
    assert mteb_tasks.task_type("no such task") == "Other"
    mteb = pytest.importorskip("mteb")
    assert mteb_tasks.task_type("STS15") == "STS"
    for task in mteb_tasks.GEM16:
        assert mteb.get_task(task).metadata.type == mteb_tasks.TASK_TYPES[task]
