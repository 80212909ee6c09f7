"""Conversations as rows: their shapes, which tokens are learned, and the rows and pairs cut from them."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from torch.nn.functional import cross_entropy

import tiny_models
from chat_templates import TEMPLATES, TOKENIZERS
from gemify import GemModel
from gemify.model.chat_template import ChatTemplate
from gemify.model.tokenization import TextTokenizer
from gemify.paper.tokens import IGNORED, Row, build_inputs
from gemify.training.batches import Batches
from gemify.training.conversations import ChatTokens, Conversation
from gemify.training.examples import Example, Source
from gemify.training.objective import MicroBatch, Objective, target_count
from gemify.training.recipe import Recipe

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "who is the cat?"},
    {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "on what"},
    {"role": "assistant", "content": "on a mat"},
]
CHATML = (
    "{% for m in messages %}<|a|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|b|>{% endgeneration %}{% else %}{{ m['content'] }}<|b|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|a|>assistant\n{% endif %}"
)
SHAREGPT = {"system": "from", "user": "human", "assistant": "gpt"}


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def template(text: str, kind: str = "byte_level", **options: Any) -> tuple[Any, ChatTemplate]:
    tokenizer = copy.copy(TOKENIZERS[kind]())
    tokenizer.chat_template = text
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer, ChatTemplate(tokenizer)


def turns(mask: tuple[bool, ...]) -> list[list[int]]:
    """Runs of learned positions."""
    runs: list[list[int]] = []
    for at, flag in enumerate(mask):
        if flag:
            runs = [*runs, [at]] if not runs or runs[-1][-1] != at - 1 else [*runs[:-1], [*runs[-1], at]]
    return runs


def test_the_usual_shapes_are_one_conversation(tmp_path: Path) -> None:
    share = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in MESSAGES[1:]]
    shapes = [
        {"messages": MESSAGES},
        {"messages": [{**m, "tool_calls": None} for m in MESSAGES]},  # as `datasets` fills up
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
        {"conversations": MESSAGES},
        {"conversations": share, "system": "Be brief."},
        {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
    ]
    found = [next(iter(write(tmp_path / f"{n}.jsonl", [row]))) for n, row in enumerate(shapes)]
    assert all(e.conversation is not None and list(e.conversation.messages) == MESSAGES for e in found)
    assert [e.conversation.since for e in found if e.conversation] == [0, 0, 0, 0, 0, 4]
    assert {(e.text, e.second, e.kind) for e in found} == {("who is the cat?", "the cat sat", "positive")}
    (plain,) = write(tmp_path / "plain.jsonl", [{"prompt": "who?", "completion": "the cat", "id": 7}])
    assert plain.conversation == Conversation(
        ({"role": "user", "content": "who?"}, {"role": "assistant", "content": "the cat"}), since=1
    )
    assert plain == Example("who?", "the cat", "positive", id="7", conversation=plain.conversation)


def test_what_datasets_fills_up_is_left_out(tmp_path: Path) -> None:
    """A column of messages has one schema: every call has every argument of any call, most of them None."""
    call = {"function": {"name": "f", "arguments": {"city": "Oslo"}}}
    filled = {"function": {"name": "f", "arguments": {"city": "Oslo", "day": None}, "strict": None}}
    rows = [[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [c]}] for c in (call, filled)]
    one, other = write(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    assert one.conversation is not None
    assert one.conversation == other.conversation
    assert one.conversation.messages[-1]["tool_calls"] == [call]


def test_messages_win_over_a_prompt_and_a_text_column_over_both(tmp_path: Path, caplog: Any) -> None:
    row = {"prompt": "who is the cat?", "prompt_id": "x", "messages": MESSAGES}
    (example,) = write(tmp_path / "a.jsonl", [row])
    assert example.conversation is not None
    assert "columns prompt, prompt_id are not used" in caplog.text
    assert list(write(tmp_path / "b.jsonl", [{**row, "text": "t"}])) == [Example("t")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "'messages' must hold a list of messages, got an empty one"),
        ({"messages": "hello"}, "'messages' must hold a list of messages, got hello"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "with a role .* got judge"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "with a role .* got list"),
        ({"messages": ["hello"]}, "with a role .* got hello"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text, got list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "'messages' holds no message of the assistant"),
        ({"prompt": MESSAGES, "completion": MESSAGES[:2]}, "'completion' holds no message of the assistant"),
        ({"messages": MESSAGES, "tools": "{"}, "'tools' must be a list of JSON schemas, got text that is no JSON"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: .*{reason}"):
        list(write(tmp_path / "a.jsonl", [row]))
    source = write(tmp_path / "b.jsonl", [row, {"messages": MESSAGES}])
    source.skip_bad = True
    assert len(list(source)) == 1
    assert source.skipped == 1


def test_a_template_with_marks_gives_the_librarys_own_mask() -> None:
    for kind in TOKENIZERS:
        tokenizer, ours = template(CHATML, kind)
        theirs = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = ours.assistant_mask(MESSAGES)
        assert list(ids) == theirs["input_ids"]
        assert list(map(int, mask)) == theirs["assistant_masks"]
        assert sum(mask) >= 8 - 2


@pytest.mark.parametrize("kind", [k for k in TOKENIZERS if k != "word_piece"])
def test_without_marks_the_same_tokens_are_found(kind: str) -> None:
    """The template with its marks taken out, and with the end of turn as the tokenizer's own end."""
    tokenizer, marked = template(CHATML, kind, eos_token="<|b|>")
    wanted = marked.assistant_mask(MESSAGES)
    bare = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer, ours = template(bare, kind, eos_token="<|b|>")
    assert ours.assistant_mask(MESSAGES) == wanted
    ids, mask = ours.assistant_mask(MESSAGES, since=4)
    assert [tokenizer.decode([ids[i] for i in run]).strip() for run in turns(mask)] == ["on a mat<|b|>"]


FOREIGN = ("only the last question", "all questions in one", "twice", "lower case", "reversed", "counts questions")
"""Templates that leave answers out, or show them twice, changed or in another order."""


@pytest.mark.parametrize("kind", [k for k in TOKENIZERS if k != "word_piece"])
@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in FOREIGN])
def test_every_answer_is_found_whole_and_no_question(name: str, kind: str) -> None:
    """Independent of how: the learned tokens are read back as text."""
    tokenizer, ours = template(TEMPLATES[name], kind)
    messages = [MESSAGES[1], {"role": "assistant", "content": "<think>hm</think>\n\nthe cat sat"}, *MESSAGES[3:]]
    for given in (MESSAGES[1:], messages):
        ids, mask = ours.assistant_mask(given)
        runs = [tokenizer.decode([ids[i] for i in run]) for run in turns(mask)]
        assert len(runs) == 2, runs
        for run, answer in zip(runs, ("the cat sat", "on a mat"), strict=True):
            assert answer in run.replace(tokenizer.unk_token, ""), runs
            assert "who" not in run
            assert "what" not in run
        without = tokenizer.decode([i for i, flag in zip(ids, mask, strict=True) if not flag])
        assert "sat" not in without, without
        assert "who is" in without.lower() or tokenizer.unk_token in without


def test_the_end_of_a_turn_is_learned_and_nothing_behind_it() -> None:
    tokenizer, ours = template(TEMPLATES["a BOS for every user turn"])
    ids, mask = ours.assistant_mask(MESSAGES)
    assert [[ids[i] for i in run][-1] for run in turns(mask)] == [tokenizer.eos_token_id] * 2


def test_a_control_tokens_name_in_an_answer_is_text_and_found() -> None:
    tokenizer, ours = template(CHATML)
    messages = [MESSAGES[1], {"role": "assistant", "content": "write <|b|> at the end"}]
    ids, mask = ours.assistant_mask(messages)
    (run,) = turns(mask)
    assert "write <|b|> at the end" in tokenizer.decode([ids[i] for i in run])
    assert [ids[i] for i in run].count(tokenizer.convert_tokens_to_ids("<|b|>")) == 1


CHAT = ChatTokens((10, 11, 12, 13, 14, 15, 16), (True, False, False, True, True, False, True))


def test_rows_of_a_conversation_learn_the_assistants_tokens() -> None:
    raw = CHAT.raw_row()
    assert build_inputs(raw, [3]).labels == [10, IGNORED, IGNORED, 13, 14, IGNORED, 16]
    assert target_count(raw, frozen_base=False) == 3
    rows = {CHAT.split_row(Random(n)) for n in range(50)}
    assert {len(row.prefix) for row in rows} == {3, 4, 6}  # each learned token, never the first of all
    row = next(row for row in rows if len(row.prefix) == 3)
    assert build_inputs(row, [3]).labels == [10, IGNORED, IGNORED, IGNORED, 13, 14, IGNORED, 16]
    assert (target_count(row, frozen_base=True), target_count(row, frozen_base=False)) == (3, 3)
    again = CHAT.reconstruction_row((20, 21), bos_ids=(1,), end_ids=(2,))
    assert build_inputs(again, [3]).labels == [IGNORED] * 4 + [20, 21, 2]
    assert target_count(again, frozen_base=False) == 3


@pytest.mark.parametrize("tune", ["gated", "full"])
def test_the_loss_is_that_of_the_learned_tokens(base_dir: Path, tune: str) -> None:
    """Against cross-entropy over whole rows, one at a time, by the labels of a plain pass."""
    gem = GemModel.from_base(str(base_dir), tune=tune)  # type: ignore[arg-type]
    objective = Objective(gem.lm, gem.adapter, gem.config)
    ids, learned = tuple(range(20, 40)), tuple(i in (8, 9, 10, 15, 16) for i in range(20))
    rows = [Row("split", ids[:9], ids[9:], learned), Row("split", ids[:4], ids[4:12], learned[:12])]
    if tune == "full":
        rows.append(ChatTokens(ids, learned).raw_row())
    for row in rows:
        every = Row(row.kind, row.prefix, row.suffix)
        count = target_count(row, frozen_base=tune == "gated")
        assert 0 < count < target_count(every, frozen_base=tune == "gated")
        loss = objective(MicroBatch(0.0, [row], step_targets=count)).ntp
        laid = build_inputs(row, gem.special_ids)
        logits = _logits(objective, every)
        labels = torch.tensor(laid.labels)
        if tune == "gated":
            labels[: len(row.prefix)] = IGNORED
        wanted = cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED)
        assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)


def _logits(objective: Objective, row: Row) -> torch.Tensor:
    from gemify.model.forward import MaskedBatch, masked_pass

    laid = build_inputs(row, objective.gem_config.special_ids)
    with torch.no_grad():
        return masked_pass(objective.lm, MaskedBatch.of([laid]))[0]


def batches(path: Path, rows: list[dict[str, Any]], **options: Any) -> Batches:
    write(path, rows)
    entries = {"max_steps": 6, "batch_size": 8, "ntp_steps": 3, "contrastive_batch_size": 4, "min_length": 2, **options}
    recipe = Recipe.from_dict({"data": str(path), **entries})
    tokenizer = tiny_models.tokenizer()
    return Batches(
        recipe, Source(str(path), skip_bad=recipe.skip_bad), TextTokenizer(tokenizer, frozenset([3])), end_id=2
    )


def conversations(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"a number {n}"}]}
        for n in range(count)
    ]


def test_a_batch_mixes_raw_and_special_rows_and_contrasts_questions_with_answers(tmp_path: Path) -> None:
    found = list(batches(tmp_path / "a.jsonl", conversations(), tune="full", mix=0.5, drop_rate=0.0))
    rows = [row for b in found for row in b["batch"].rows]
    assert {row.kind for row in rows} == {"raw", "split", "reconstruction"}
    tokenizer = tiny_models.tokenizer()
    for row in rows:
        laid = build_inputs(row, [3])
        text = tokenizer.decode([i for i in laid.labels if i != IGNORED])
        assert "a number" in text if row.kind == "raw" else text
        if row.kind != "reconstruction":  # the words of a question are learned in no row with the template
            assert "what" not in text
            assert "assistant: " not in text
    (first, second), *_ = (pair for b in found[3:] for pair in b["batch"].views)
    assert tokenizer.decode(first.ids).startswith("what is")
    assert tokenizer.decode(second.ids).startswith("a number")


def test_a_conversation_without_room_for_an_answer_is_left_out(tmp_path: Path) -> None:
    long = {"prompt": "why " * 40, "completion": "because"}
    rows = [r for b in batches(tmp_path / "a.jsonl", [*conversations(), long], tune="full") for r in b["batch"].rows]
    assert all(len(row.prefix) <= 128 for row in rows)
    assert not any("why" in tiny_models.tokenizer().decode(row.prefix) for row in rows if row.kind == "raw")


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "assistant", "content": "hello"}]}
    rows = [*conversations(), bad]
    made = batches(tmp_path / "a.jsonl", rows, skip_bad=True)
    strict = batches(tmp_path / "b.jsonl", rows)
    for some in (made, strict):
        some.tokenize.tokenizer.chat_template = TEMPLATES["refuses a system turn"].replace("bos_token", "'<s>'")
    assert len(list(made)) == 6
    assert made.skipped_rows()["skipped_rows"] == 1
    assert "row 25" in made.skipped_rows()["first_skipped"]
    with pytest.raises(ValueError, match=r"b\.jsonl row 25: the chat template refuses messages of assistant"):
        list(strict)


def test_a_base_without_a_template_is_named(tmp_path: Path) -> None:
    made = batches(tmp_path / "a.jsonl", conversations())
    made.tokenize.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the base model has no chat template"):
        next(iter(made))


def training_templates() -> list[str]:
    spec = importlib.util.find_spec("trl")
    folder = Path(str(spec.origin)).parent / "chat_templates" if spec else Path("none")
    return sorted(p.name.removesuffix("_training.jinja") for p in folder.glob("*_training.jinja"))


@pytest.mark.skipif(not training_templates(), reason="needs trl, whose chat templates come with and without marks")
def test_public_templates_without_marks_against_those_with() -> None:
    """TRL's pairs of a public template and the same with marks: what ours finds is what transformers marks."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    equal = compared = 0
    for name in training_templates():
        bare, marked = ((folder / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
        tokenizer, _ = template(marked)
        try:
            found = tokenizer.apply_chat_template(MESSAGES[1:], return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = template(bare)[1].assistant_mask(MESSAGES[1:])
        except (ValueError, TypeError, TemplateError):
            continue  # for messages with images, or variables of their own
        if name == "gptoss" or list(ids) != found["input_ids"]:
            continue  # it ends its last turn with a token of its own; the marked one keeps thoughts, or says the date
        if "the cat sat" not in tokenizer.decode(ids):
            continue  # it takes lists of parts alone
        wanted = tuple(map(bool, found["assistant_masks"]))
        ours, marks = (
            [tokenizer.decode([ids[i] for i in run]).strip("\n") for run in turns(flags)] for flags in (mask, wanted)
        )
        # Some marks begin at the header, or at an empty thought that the template itself writes.
        assert all(mark.endswith(text) for text, mark in zip(ours, marks, strict=True)), name
        assert all(answer in text for text, answer in zip(ours, ("the cat sat", "on a mat"), strict=True)), name
        equal += ours == marks
        compared += 1
    assert equal >= 12
    assert compared - equal <= 8
