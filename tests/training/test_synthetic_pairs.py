"""Pairs written by the base: what is kept, that batching changes nothing, resume, and that training takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemify.training import synthetic_pairs
from gemify.training.examples import Example, Source
from gemify.training.synthetic_pairs import TASKS, PairConfig, PairGenerator, passes_filter, write_pairs

TEXT = "The bridge over the river was closed for repairs."


@pytest.mark.parametrize(
    ("written", "ended", "kept"),
    [
        ("Repairs closed the river bridge for a while.", True, True),
        ("Repairs closed the river bridge for a while.", False, False),  # cut off
        (TEXT, True, False),  # the text again
        ("", True, False),
        ("Bridge.", True, False),  # too short for a paraphrase
        (TEXT + " And much more was said about the bridge after that.", True, False),
        ("The bridge was closed\nfor repairs of some kind.", True, False),
        ("What a delightful thing to say, my friend!", True, False),  # about something else
    ],
)
def test_what_is_kept(written: str, ended: bool, kept: bool) -> None:
    assert passes_filter(TASKS["paraphrase"], TEXT, written, ended) is kept


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_shared_request_is_the_whole_request(starter: Any, name: str) -> None:
    """Written with the request's head computed once, in a batch: what transformers writes about each text alone."""
    lm, tokenizer = starter
    writer = PairGenerator(lm, tokenizer, TASKS[name])
    texts = [TEXT, "Copper conducts heat better than iron."]
    wrote = {i: text for i, text, _ in writer(texts)}
    for i, text in enumerate(texts):
        ids = torch.tensor([[*writer.prefix_ids, *tokenizer(writer._lead + text)["input_ids"], *writer.suffix_ids]])
        if writer.by_chat:
            messages = [{"role": "user", "content": f"Paraphrase: {text}"}]
            assert ids[0].tolist() == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        more = writer.task.limit(len(tokenizer(text)["input_ids"])) + 8
        alone = lm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=more,
            do_sample=False,
            eos_token_id=writer.end_ids,
            pad_token_id=tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
        assert tokenizer.decode(alone, skip_special_tokens=True).strip().startswith(wrote[i])
        assert len(wrote[i]) > 3


@pytest.mark.real
def test_a_stopped_run_goes_on_where_it_stopped(starter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_pairs, "_BLOCK", 2)
    monkeypatch.setattr(synthetic_pairs, "load_base", lambda *args, **options: starter)
    lines = [
        TEXT,
        "Copper conducts heat better than iron but worse than silver.",
        "The committee voted to postpone\u2028the decision until spring.",
        "A small observatory was built on the roof of the school.",
        "too short",
    ]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    order = PairConfig("starter", str(tmp_path / "t.txt"), ("keywords",), count=4)
    whole = write_pairs(order, tmp_path / "whole.jsonl", show_progress_bar=False)

    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="holds no text of 8 to 64 tokens"):
        write_pairs(
            PairConfig("starter", str(tmp_path / "short.txt")), tmp_path / "none.jsonl", show_progress_bar=False
        )
    assert not list(tmp_path.glob("none*"))

    append, saves = synthetic_pairs._append, []

    def stop(part: Path, rows: list[Any]) -> None:
        saves.append(rows)
        append(part, rows)
        if len(saves) == 2:  # the order, the first block, then an unfinished row, then nothing more
            with part.open("a") as file:
                file.write('{"anchor": "half a ro')
            raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_pairs, "_append", stop)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(order, tmp_path / "again.jsonl", show_progress_bar=False)
    monkeypatch.setattr(synthetic_pairs, "_append", append)
    assert not (tmp_path / "again.jsonl").exists()
    with pytest.raises(ValueError, match="add --resume"):
        write_pairs(order, tmp_path / "again.jsonl", show_progress_bar=False)
    with pytest.raises(ValueError, match="count was 4, is 3"):
        write_pairs(PairConfig("starter", order.data, ("keywords",), count=3), tmp_path / "again.jsonl", resume=True)
    assert write_pairs(order, tmp_path / "again.jsonl", resume=True, show_progress_bar=False) == whole
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not (tmp_path / "again.jsonl.part").exists()
    with pytest.raises(ValueError, match="exists: choose another name"):
        write_pairs(order, tmp_path / "again.jsonl")

    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().strip().split("\n")]
    assert rows
    assert {r["anchor"] for r in rows} <= set(lines[:4])
    assert list(Source(str(tmp_path / "whole.jsonl"))) == [
        Example(r["anchor"], r["positive"], "positive") for r in rows
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("poem",)}, "unknown task 'poem': choose from paraphrase"),
        ({"tasks": ()}, "no task given"),
        ({"count": 0}, "count must be at least 1"),
        ({"max_length": 3}, "max_length must be at least 8"),
    ],
)
def test_orders_that_cannot_be_met(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairConfig("starter", "t.txt", **change)


def test_the_output_is_jsonl(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        write_pairs(PairConfig("starter", "t.txt"), tmp_path / "pairs.csv")
