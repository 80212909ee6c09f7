"""Thoughts of a model are in no answer, no later prompt and no vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_pipeline import FIRST, LAST, Shelf, library
from transformers import LogitsProcessor, LogitsProcessorList

from gemify import GemModel
from gemify.rag.pipeline import Conversation, GemRag, RagSettings

MARKED = "{% for m in messages %}<r1>{{ m.role }}\n{{ m.content }}<r2>\n{% endfor %}<r1>assistant\n{# <think> #}"
OPENED = MARKED + "<think>\n"


class Forced(LogitsProcessor):
    """Has a text written, and then the end."""

    def __init__(self, gem: GemModel, text: str) -> None:
        ids = gem.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._ids = [*ids, gem.tokenizer.eos_token_id]
        self._start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._start is None:
            self._start = input_ids.shape[1]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._ids[input_ids.shape[1] - self._start]] = 0.0
        return forced


def ask(conversation: Conversation, question: str, written: str, **options: Any) -> Any:
    forced = LogitsProcessorList([Forced(conversation.rag.gem, written)])
    return conversation.ask(question, logits_processor=forced, max_new_tokens=60, **options)


@pytest.mark.parametrize("settings", [FIRST, LAST], ids=["question first", "passages first"])
@pytest.mark.parametrize(
    ("template", "written"), [(MARKED, "<think>\nhm, so\n</think>\n\nYes."), (OPENED, "hm, so\n</think>\n\nYes.")],
    ids=["marked", "opened by the prompt"],
)  # fmt: skip
def test_thoughts_are_kept_out(gem: GemModel, settings: RagSettings, template: str, written: str) -> None:
    gem.tokenizer.chat_template = template
    conversation = GemRag(gem, Shelf(), settings=settings).conversation()
    pieces: list[str] = []
    answer = ask(conversation, "who?", written, on_text=pieces.append)
    assert (answer.text, answer.thoughts.strip()) == ("Yes.", "hm, so")
    assert "".join(pieces) == "Yes."
    assert conversation.messages[-1] == {"role": "assistant", "content": "Yes."}
    alone = GemRag(gem, Shelf(), settings=settings).conversation(conversation.messages)
    np.testing.assert_allclose(conversation.embed_question("why?"), alone.embed_question("why?"), atol=1e-5)
    again = ask(conversation, "why?", written)
    assert again.text == "Yes."
    prompt = library(gem, conversation.messages[:-1])
    assert conversation.prompt.ids[: len(prompt)] == prompt


def test_an_answer_that_is_nothing_but_thoughts_is_empty(gem: GemModel) -> None:
    gem.tokenizer.chat_template = OPENED
    answer = ask(GemRag(gem, Shelf(), settings=FIRST).conversation(), "who?", "hm, so")
    assert (answer.text, answer.thoughts) == ("", "hm, so")


def test_thoughts_between_control_tokens(gem: GemModel) -> None:
    """They are in the tokenizer's own words, and its end token is none of the answer's."""
    gem.tokenizer.chat_template = MARKED.replace("{# <think> #}", "")
    opening, close = "<|reserved_2|>", "<|reserved_3|>"
    assert {opening, close} <= {t.content for t in gem.tokenizer.added_tokens_decoder.values() if t.special}
    thoughts = {"open": opening, "close": close, "content": "text"}
    gem.tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<r1>assistant\n",
        "fields": {"thinking": thoughts, "content": {"content": "text"}},
    }
    answer = ask(GemRag(gem, Shelf(), settings=FIRST).conversation(), "who?", f"{opening}hm{close}Yes.")
    assert (answer.text, answer.thoughts) == ("Yes.", "hm")


def test_a_model_without_thoughts_has_none(gem: GemModel) -> None:
    gem.tokenizer.chat_template = MARKED.replace("{# <think> #}", "")
    answer = ask(GemRag(gem, Shelf(), settings=FIRST).conversation(), "who?", "<think>hm</think>Yes.")
    assert (answer.text, answer.thoughts) == ("<think>hm</think>Yes.", "")
