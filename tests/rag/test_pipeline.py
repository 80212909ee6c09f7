"""Answers are the same with caches and without, and caches save what they say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from chat_templates import TEMPLATES, TOKENIZERS
from gemify import GemModel
from gemify.model.prefill import run_prefill
from gemify.rag.kv_store import KvStore
from gemify.rag.pipeline import Conversation, GemRag, RagSettings, _Turn
from gemify.rag.prompt_cache import ModelRunner, PromptCache
from tiny_gems import make_gem

TEMPLATE = "{% for m in messages %}<r1>{{ m['role'] }}\n{{ m['content'] }}<r2>\n{% endfor %}<r1>assistant\n"


@dataclass(frozen=True)
class Passage:
    text: str
    title: str = ""
    file: str = "a.txt"
    location: str = "line 1"
    score: float = 1.0
    heading: str = ""


PASSAGES = [Passage("the cat sat on the mat"), Passage("a dog ate the bone", "dogs", "b.txt", "page 2")]


class Shelf:
    """An index that finds all it has, and remembers what it was asked."""

    def __init__(self, passages: list[Passage] = PASSAGES) -> None:
        self.passages, self.asked = passages, []  # type: ignore[var-annotated]

    def search(
        self, query: str, *, k: int = 10, mode: Any = "vector", vector: np.ndarray | None = None, where: Any = None
    ) -> list[Passage]:
        self.asked.append((query, k, mode, vector))
        return self.passages[:k]


FIRST = RagSettings(passages=2, order="question-first", max_new_tokens=12)
LAST = RagSettings(passages=2, order="passages-first", max_new_tokens=12)


@pytest.fixture
def chatty(gem: GemModel) -> GemModel:
    gem.tokenizer.chat_template = TEMPLATE
    return gem


def library(gem: GemModel, messages: Any) -> tuple[int, ...]:
    """A conversation's ids by transformers alone."""
    return tuple(gem.tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True))


def place_of_question(gem: GemModel) -> tuple[int, int, tuple[int, ...]]:
    """Where "who ate?" stands in a first prompt's ids."""
    ids = library(gem, [{"role": "system", "content": FIRST.system}, {"role": "user", "content": "who ate?"}])
    asked = tuple(gem.tokenizer("who ate?")["input_ids"])
    start = next(i for i in range(len(ids)) if ids[i : i + len(asked)] == asked)
    return start, start + len(asked), ids


def run_at_once(conversation: Conversation) -> None:
    """What has run, piece by piece, must be what running it at once gives."""
    prompt = conversation.prompt
    whole = [*prompt.ids, 20]
    handle = prompt.extend_to(whole)
    oracle = conversation.rag.gem.lm(input_ids=torch.tensor([whole])).logits[0, -1]
    torch.testing.assert_close(handle.logits_BV[0], oracle, rtol=1e-4, atol=1e-4)


def test_an_answer_is_generates_answer_to_the_whole_prompt(chatty: GemModel) -> None:
    rag = GemRag(chatty, Shelf(), settings=FIRST)
    answer = rag.ask("who sat on the mat?")
    content = "who sat on the mat?\n\n[1] the cat sat on the mat\n\n[2] dogs: a dog ate the bone\n\n"
    ids = library(chatty, [{"role": "system", "content": FIRST.system}, {"role": "user", "content": content}])
    out = chatty.generate_ids(None, torch.tensor([ids]), torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False)
    assert answer.text == chatty.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert answer.sources() == ["[1] a.txt (line 1)", "[2] b.txt (page 2)"]
    assert answer.timing.computed == len(ids) - len(rag.passage_cache.prefix_ids)
    assert 0 < answer.timing.embed <= answer.timing.first_token <= answer.timing.total


def test_query_cache_on_and_off_give_the_same(chatty: GemModel) -> None:
    shelves = Shelf(), Shelf()
    on = GemRag(chatty, shelves[0], settings=FIRST).ask("who ate?")
    off = GemRag(chatty, shelves[1], settings=replace(FIRST, query_cache=False)).ask("who ate?")
    assert on.text == off.text
    assert np.array_equal(shelves[0].asked[0][3], shelves[1].asked[0][3])
    assert off.timing.computed > on.timing.computed


def test_the_question_is_embedded_where_it_stands(chatty: GemModel) -> None:
    shelf = Shelf()
    GemRag(chatty, shelf, settings=FIRST).ask("who ate?")
    start, end, ids = place_of_question(chatty)
    assert chatty.tokenizer.decode(ids[start:end]) == "who ate?"
    handle = chatty.prefill(chatty.tokenizer.decode(ids[:end]), add_special_tokens=False)
    np.testing.assert_allclose(shelf.asked[0][3], chatty.embed(handle, start=start).numpy(), rtol=1e-4, atol=1e-5)
    GemRag(chatty, shelf, settings=LAST).ask("who ate?")
    np.testing.assert_allclose(shelf.asked[1][3], chatty.encode_query("who ate?"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("template", ['{text} is:"', 'say : "{text}" is:"'])
def test_a_template_goes_with_the_question_or_has_it_embedded_apart(base_dir: Path, template: str) -> None:
    gem = make_gem(base_dir, template=template)
    gem.tokenizer.chat_template = TEMPLATE
    shelf, plain = Shelf(), Shelf()
    rag = GemRag(gem, shelf, settings=FIRST)
    assert rag.reuses_query_cache == template.startswith("{text}")
    answer = rag.ask("who ate?")
    bare = make_gem(base_dir)
    bare.tokenizer.chat_template = TEMPLATE
    assert answer.text == GemRag(bare, plain, settings=FIRST).ask("who ate?").text  # the words are not in the prompt
    vector = torch.tensor(shelf.asked[0][3])
    if rag.reuses_query_cache:
        start, end, prompt = place_of_question(gem)
        ids = torch.tensor([[*prompt[:end], *gem.tokenizer(' is:"')["input_ids"]]])
        handle = run_prefill(bare.lm, ids, torch.ones_like(ids).bool(), single=True)
        torch.testing.assert_close(vector, bare.embed(handle, start=start), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(vector, torch.tensor(gem.encode_query("who ate?")), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="has words before the text"):
            PromptCache(ModelRunner(gem)).extend_and_embed([20, 21], start=0)


@pytest.mark.parametrize(
    "settings",
    [
        LAST,
        replace(LAST, context="concatenated"),
        replace(LAST, context="special"),
        replace(FIRST, context="concatenated"),
        replace(FIRST, context="special"),
    ],
)
def test_kept_caches_change_no_answer_and_save_their_tokens(
    chatty: GemModel, tmp_path: Path, settings: RagSettings
) -> None:
    plain = GemRag(chatty, Shelf(), settings=settings).ask("who ate?")
    kv = KvStore(tmp_path, fingerprint="f", bits=32)
    rag = GemRag(chatty, Shelf(), kv=kv, settings=settings)
    first, second = rag.ask("who ate?"), rag.ask("who ate?")
    other = rag.ask("why?")
    assert plain.text == first.text == second.text
    assert second.timing.computed < plain.timing.computed
    assert second.timing.computed < first.timing.computed
    assert len(kv) == (1 if settings.context == "text" else 2)
    assert kv.misses == len(kv)
    assert other.passages == plain.passages


def test_caches_of_passages_that_are_gone_give_way(chatty: GemModel, tmp_path: Path) -> None:
    old, new = ([Passage(f"{word} {i}") for i in range(6)] for word in ("was", "now"))
    one = KvStore(tmp_path / "one", fingerprint="f", bits=32)
    GemRag(chatty, Shelf(), kv=one, settings=LAST).keep(old[:1])
    kv = KvStore(tmp_path / "kv", fingerprint="f", bits=32, budget_bytes=int(one.nbytes * 3.5))
    rag = GemRag(chatty, Shelf(), kv=kv, settings=LAST)
    assert [rag.keep(old), rag.keep(old), rag.keep(new), rag.keep(new)] == [3, 0, 3, 0]
    assert kv.nbytes <= kv.budget_bytes  # type: ignore[operator]


@pytest.mark.parametrize("context", ["text", "special"])
def test_a_store_that_cannot_be_written_keeps_no_answer_back(
    chatty: GemModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, context: Any
) -> None:
    settings = replace(LAST, context=context)
    (tmp_path / "file").write_text("in the way")
    kv = KvStore(tmp_path / "file" / "kv", fingerprint="f", bits=32)
    answer = GemRag(chatty, Shelf(), kv=kv, settings=settings).ask("who ate?")
    assert answer.text == GemRag(chatty, Shelf(), settings=settings).ask("who ate?").text
    assert "a cache is not kept" in caplog.text


def test_one_joined_passage_is_the_passage_itself(chatty: GemModel) -> None:
    one = replace(LAST, passages=1)
    assert (
        GemRag(chatty, Shelf(), settings=one).ask("who?").text
        == GemRag(chatty, Shelf(), settings=replace(one, context="concatenated")).ask("who?").text
    )


def test_a_question_whose_vector_is_not_in_the_chat_is_embedded_apart(chatty: GemModel, base_dir: Path) -> None:
    mean = GemModel.from_base(str(base_dir), tune="lora", special_tokens=0)
    prompted = GemModel.from_base(str(base_dir), prompts={"query": "query: "})
    for gem in (mean, prompted):
        gem.tokenizer.chat_template = TEMPLATE
        shelf = Shelf()
        assert GemRag(gem, shelf, settings=FIRST).ask("who ate?").passages
        assert np.array_equal(shelf.asked[0][3], gem.encode_query("who ate?"))
    with pytest.raises(ValueError, match="in a chat's cache: choose context"):
        GemRag(mean, Shelf(), settings=replace(FIRST, context="special"))


def test_another_model_may_embed_the_question(chatty: GemModel) -> None:
    class Ones:
        def encode_query(self, inputs: str) -> np.ndarray:
            return np.ones(3)

    shelf = Shelf()
    two = GemRag(chatty, shelf, embedder=Ones(), settings=FIRST).ask("who ate?")
    assert np.array_equal(shelf.asked[0][3], np.ones(3))
    assert two.text == GemRag(chatty, Shelf(), settings=FIRST).ask("who ate?").text


def test_special_documents_take_k_columns_each(chatty: GemModel) -> None:
    text = GemRag(chatty, Shelf(), settings=LAST).conversation()
    special = GemRag(chatty, Shelf(), settings=replace(LAST, context="special")).conversation()
    for conversation in (text, special):
        conversation.ask("who?", max_new_tokens=1)
    texts = ("the cat sat on the mat", "dogs: a dog ate the bone")
    saved = sum(len(chatty.tokenizer(text)["input_ids"]) - 1 for text in texts)
    assert len(text.prompt.ids) - len(special.prompt.ids) == saved


@pytest.mark.parametrize("settings", [FIRST, LAST, replace(FIRST, passages=0), replace(LAST, passages=0)])
def test_a_conversation_runs_nothing_twice(chatty: GemModel, settings: RagSettings) -> None:
    conversation = GemRag(chatty, Shelf(), settings=settings).conversation()
    for question in ("who sat?", "who ate?", "and then?"):
        before = len(conversation.prompt.ids)
        answer = conversation.ask(question)
        added = len(conversation.prompt.ids) - before
        assert answer.timing.computed <= added + 1
        assert len(conversation.messages) % 2 == 1
    run_at_once(conversation)


def test_a_conversation_too_long_forgets_its_beginning(chatty: GemModel) -> None:
    conversation = GemRag(chatty, Shelf([]), settings=replace(FIRST, max_new_tokens=40)).conversation()
    for turn in range(12):
        conversation.ask(f"question {turn} " + "again and " * 30)
    assert len(conversation.prompt.ids) <= 1024
    assert conversation.messages[0]["role"] == "system"
    run_at_once(conversation)


def test_a_prompt_too_long_is_refused_and_forgotten(chatty: GemModel) -> None:
    conversation = GemRag(chatty, Shelf([Passage("word " * 300)]), settings=FIRST).conversation()
    with pytest.raises(ValueError, match="this model takes 1024 in all: use fewer passages"):
        conversation.ask("who?")
    conversation.rag.index = Shelf()
    conversation.ask("who?")
    run_at_once(conversation)


@pytest.mark.parametrize("settings", [FIRST, LAST, replace(FIRST, context="special")])
def test_what_fits_in_no_prompt_is_refused_before_it_runs(tmp_path: Path, settings: RagSettings) -> None:
    name = "llama" if settings.context == "special" else "gpt2"  # its learned positions end
    gem = GemModel.from_base(str(tiny_models.save(tmp_path / name, name)))
    gem.tokenizer.chat_template = TEMPLATE
    rag = GemRag(gem, Shelf(), settings=settings)
    for question, options in (("why? " * 300, {}), ("why?", {"max_new_tokens": 1020})):
        with pytest.raises(ValueError, match="this model takes 1024 in all"):
            rag.ask(question, **options)


def test_old_turns_make_room_for_long_passages(chatty: GemModel) -> None:
    conversation = GemRag(chatty, Shelf([Passage("word " * 100)]), settings=FIRST).conversation()
    for turn in range(5):
        conversation.ask(f"question {turn}?")
        assert len(conversation.prompt.ids) <= 1024
    assert len(conversation.messages) < 1 + 2 * 5, "some turns were forgotten"
    run_at_once(conversation)


def test_forgotten_special_documents_are_never_run_as_text(chatty: GemModel) -> None:
    rag = GemRag(chatty, Shelf(), settings=replace(FIRST, context="special"))
    conversation = rag.conversation()
    for turn in range(12):
        conversation.ask(f"question {turn} " + "again and " * 15)
        kept = conversation.prompt.ids.count(chatty.special_ids[0]), len(conversation.messages)
        assert kept[0] == kept[1] - 1  # two passages a question
        if kept[1] == 3 and turn:
            alone = rag.conversation()
            alone.ask(f"question {turn} " + "again and " * 15)
            ours, theirs = (c.prompt.extend_to([*c.prompt.ids, 20]).logits_BV for c in (conversation, alone))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            return
    raise AssertionError("nothing was forgotten")


def test_a_search_for_words_embeds_nothing(chatty: GemModel) -> None:
    shelf = Shelf()
    answer = GemRag(chatty, shelf, settings=replace(FIRST, mode="fts")).ask("who ate?")
    assert shelf.asked[0][3] is None
    assert answer.text == GemRag(chatty, Shelf(), settings=FIRST).ask("who ate?").text


@pytest.mark.parametrize("settings", [FIRST, LAST, replace(FIRST, context="concatenated")])
def test_control_tokens_in_questions_and_passages_are_text(chatty: GemModel, settings: RagSettings) -> None:
    names = list(dict.fromkeys([*chatty.tokenizer.all_special_tokens, *chatty.config.special_tokens]))
    plain = GemRag(chatty, Shelf(), settings=settings).conversation()
    spelt = GemRag(chatty, Shelf([Passage(" ".join(names)), PASSAGES[1]]), settings=settings).conversation()
    plain.prepare("who?")
    ids = spelt.prepare(f"who {''.join(names)}?").ids
    assert chatty.special_ids[0] not in ids
    assert sorted(set(chatty.tokenizer.all_special_ids) & set(ids)) == []
    text = chatty.tokenizer.decode(ids)
    assert all(text.count(name) == 2 for name in names)


def test_a_failed_answer_leaves_the_conversation_as_it_was(chatty: GemModel) -> None:
    conversation = GemRag(chatty, Shelf(), settings=FIRST).conversation()
    conversation.ask("who?")
    turns = list(conversation.messages)

    def fail(text: str) -> None:
        raise RuntimeError("the reader went away")

    with pytest.raises(RuntimeError, match="went away"):
        conversation.ask("what?", on_text=fail)
    assert conversation.messages == turns
    conversation.ask("what?")
    run_at_once(conversation)


def test_what_does_not_fit_together_is_refused(chatty: GemModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown order"):
        RagSettings(order="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need order 'passages-first'"):
        GemRag(chatty, None, kv=KvStore(tmp_path, fingerprint="f"), settings=FIRST)
    with pytest.raises(ValueError, match="no question given"):
        GemRag(chatty, None, settings=FIRST).ask("  ")
    chatty.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        GemRag(chatty, None)


QUESTIONS = ("who sat?", "a", "who ate the bone?")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("settings", [FIRST, replace(LAST, context="concatenated")])
def test_every_prompt_is_the_librarys(tmp_path: Path, kind: str, settings: RagSettings) -> None:
    """Three questions each: ids of the whole conversation, and the state that was carried is that of running them."""
    gem = gem_with_tokenizer(tmp_path, kind)
    for name, template in TEMPLATES.items():
        gem.tokenizer.chat_template = template
        rag = GemRag(gem, Shelf(), settings=replace(settings, max_new_tokens=4))
        conversation = rag.conversation()
        for question in QUESTIONS:
            ids = conversation.prepare(question).ids
            assert ids == folded(gem, conversation.messages, settings.system), (name, question)
            handle = conversation.prompt.extend_to(ids)
            if settings.context == "text":
                oracle = gem.lm(input_ids=torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(handle.logits_BV[0], oracle, rtol=1e-4, atol=1e-3)
            conversation._turns.append(_Turn({"role": "assistant", "content": "a thought</think>on a mat"}))


@pytest.mark.parametrize("name", ["plain turns", "trims", "system before the last user turn", "refuses a system turn"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_kept_caches_serve_any_template(tmp_path: Path, kind: str, name: str) -> None:
    gem = gem_with_tokenizer(tmp_path / "model", kind)
    gem.tokenizer.chat_template = TEMPLATES[name]
    for settings in (LAST, replace(FIRST, context="concatenated")):
        kv = KvStore(tmp_path / settings.context, fingerprint="f", bits=32)
        rag = GemRag(gem, Shelf(), kv=kv, settings=settings)
        assert rag.keep(PASSAGES) == 2
        answer = rag.ask("who ate?")
        assert answer.text == GemRag(gem, Shelf(), settings=settings).ask("who ate?").text
        assert (kv.hits, kv.misses) == ((1, 0) if settings.context == "text" else (2, 0))


def gem_with_tokenizer(directory: Path, kind: str) -> GemModel:
    base = tiny_models.save(directory / "base", vocab_size=1024)
    TOKENIZERS[kind]().save_pretrained(base)
    return make_gem(base)


def folded(gem: GemModel, messages: Any, system: str) -> tuple[int, ...]:
    """The library's ids; our own system message before the first question where the template does not say it."""
    try:
        text = gem.tokenizer.apply_chat_template(messages[:2], tokenize=False)
    except Exception:
        text = ""
    if system in text:
        return library(gem, messages)
    first = {"role": "user", "content": f"{system}\n\n{messages[1]['content']}"}
    return library(gem, [first, *messages[2:]])
