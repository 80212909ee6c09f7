"""Answers with thoughts and calls, and the chats that the browser keeps; the server's answers are handed in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import CONTRAST, browsing, open_page_files

STATS = {"has_chat": True, "has_index": False, "model": "tiny", "num_running_seqs": 0, "num_waiting_seqs": 0}
KEPT = "Object.keys(localStorage).filter((key) => key.startsWith('gemify-chat-'))"


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def say(page: Any, question: str, *events: dict[str, Any]) -> dict[str, Any]:
    """Ask a question that is answered with these events; return what the server was asked."""
    answered = page.locator(".exchange").count()
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events or (delta(content=f"**{question}**, yes."),))
    page.context.unroute("**/v1/chat/completions")
    page.context.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body + "data: [DONE]\n\n", content_type="text/event-stream"),
    )
    page.fill("#message", question)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.press("#message", "Control+Enter")
    page.locator(".exchange").nth(answered).locator(".facts", has_not_text="writing").wait_for()
    page.locator("#stop").wait_for(state="hidden")
    found: dict[str, Any] = asked.value.post_data_json
    return found


def titles(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".chat-title").all_text_contents()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as opened:
        yield opened


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with open_page_files(browser) as opened:
        context = opened.context
        context.route("**/v1/stats", lambda route: route.fulfill(json=STATS))
        context.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "tiny"}]}))
        opened.reload()
        yield opened


def open_other_tab(page: Any) -> Any:
    other = page.context.new_page()
    other.goto(page.url)
    return other


def test_thoughts_are_folded_when_the_answer_begins(page: Any) -> None:
    thoughts = ["I <b>must</b>", " **think**."]
    first = say(page, "why?", *(delta(reasoning_content=thought) for thought in thoughts))
    assert page.locator(".thoughts").get_attribute("open") is None  # at the end it is folded too
    assert page.locator(".thought").text_content() == "I <b>must</b> **think**."
    second = say(page, "and?", *(delta(reasoning_content=t) for t in thoughts), delta(content="So."))
    fold = page.locator(".thoughts").last
    assert fold.get_attribute("open") is None
    assert page.locator(".answer .said").last.text_content() == "So."
    assert "Thought for" in (fold.locator("summary").text_content() or "")
    fold.locator("summary").click()
    assert fold.locator(".thought").is_visible()
    third = say(page, "on?")
    assert [len(sent["messages"]) for sent in (first, second, third)] == [1, 1, 3]  # no answer: not in the conversation
    assert "must" not in json.dumps(third["messages"])
    assert page.locator(".thoughts").count() == 3
    assert page.locator(".thoughts").last.is_hidden()


def test_calls_of_tools_are_shown_and_carried_over(page: Any) -> None:
    """Whole, as this server gives them, or in pieces."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    page.click("summary:text('Settings')")
    page.fill("#tools", "[{")
    page.fill("#message", "sum")
    page.press("#message", "Control+Enter")
    page.locator("#chat-error", has_text="the tools are not JSON").wait_for()
    page.fill("#tools", json.dumps(tools))
    calls = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": "<i>1'}},
        {"index": 0, "function": {"arguments": '</i>"}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "stop", "arguments": "not JSON"}},
    ]
    done = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    sent = say(page, "sum", *(delta(tool_calls=[call]) for call in calls), done)
    assert sent["tools"] == tools
    assert page.locator(".call figcaption").all_text_contents() == ["Calls add", "Calls stop"]
    assert page.locator(".call pre").all_text_contents() == ['{\n  "x": "<i>1</i>"\n}', "not JSON"]
    assert "asks for a tool" in (page.locator(".facts").text_content() or "")
    messages = say(page, "go on")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"x": "<i>1</i>"}'}
    assert [messages[i]["tool_call_id"] for i in (2, 3)] == ["a", "b"]


def test_code_can_be_copied(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "code?", delta(content="So:\n```py\nx = '<b>'\n"), delta(content="y = 2\n```\nDone."))
    page.evaluate("navigator.clipboard ??= { writeText: (text) => ((window.copied = text), Promise.resolve()) }")
    page.click(".copy")
    page.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("window.copied ?? navigator.clipboard.readText()") == "x = '<b>'\ny = 2"
    assert page.locator(".answer .said p").all_text_contents() == ["So:", "Done."]


def test_chats_are_kept_renamed_and_deleted(page: Any) -> None:
    source = {
        "id": "1",
        "text": "Owls hunt.",
        "file": "birds.md",
        "place": "",
        "title": "Birds",
        "heading": "",
        "score": 1.0,
    }
    with_source = {"gemify": {"sources": [source]}, **delta(reasoning_content="hm", content="Owls [1] **hunt**")}
    say(page, "what  do\nowls do?", with_source)
    whole = page.locator("#transcript").evaluate("node => node.textContent")
    page.reload()
    page.locator(".exchange").wait_for()
    shown = page.locator("#transcript").evaluate("node => node.textContent")
    assert shown.replace("Thoughts", "") == whole.replace("Thought for 0.0 s", "")
    page.click(".citation")
    assert "Owls hunt." in page.evaluate("document.activeElement.textContent")
    assert [m["role"] for m in say(page, "more?")["messages"]] == ["user", "assistant", "user"]

    page.click("#new-chat")
    assert page.locator(".exchange").count() == 0
    assert page.evaluate("document.activeElement.id") == "message"
    assert len(say(page, "another")["messages"]) == 1
    assert titles(page) == ["another", "what do owls do?"]

    page.click(".chat-title:text('owls')")
    assert page.locator(".exchange").count() == 2
    page.click("#chats button:text('Rename')")
    page.keyboard.type("Owls <i>")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Owls <i>"
    page.click("#chats button:text('Rename')")
    page.keyboard.type("no")
    page.keyboard.press("Escape")
    assert sorted(titles(page)) == ["Owls <i>", "another"]
    say(page, "even more?")
    assert titles(page) == ["Owls <i>", "another"]  # the last one first; its name stays

    page.click("#chats button:text('Delete')")
    assert len(titles(page)) == 2
    page.click("#chats button:text('Really delete?')")
    assert titles(page) == ["another"]
    assert page.locator(".exchange").count() == 0
    assert page.evaluate(CONTRAST) == []


def test_tabs_do_not_lose_each_others_chats(page: Any) -> None:
    say(page, "one")
    other = open_other_tab(page)
    assert titles(other) == ["one"]
    say(other, "two")
    page.locator(".chat-title", has_text="two").wait_for()  # this tab hears of it
    other.click(".chat-title:text('one')")
    say(other, "one more")
    page.locator(".exchange").nth(1).wait_for()  # the same chat, idle here: it goes on here too
    say(page, "mine")
    stale = page.evaluate(  # a tab that has not heard of the other's turn
        """async () => {
          const { listChats, readChat, saveChat } = await import("/page/chats.js");
          const known = readChat(listChats().find((chat) => chat.title === "one").id);
          saveChat({ ...known, turns: [...known.turns, { ...known.turns[0], question: "theirs" }] });
          const kept = saveChat({ ...known, turns: [...known.turns, { ...known.turns[0], question: "ours" }] });
          const asked = listChats().map(({ id }) => readChat(id).turns.map((turn) => turn.question));
          return [known.id !== kept.id, kept.title, asked];
        }"""
    )
    assert stale[:2] == [True, "one (copy)"]
    assert sorted(stale[2]) == sorted(
        [["two"], ["one", "one more", "mine", "theirs"], ["one", "one more", "mine", "ours"]]
    )


def test_what_is_no_chat_is_passed_over(page: Any) -> None:
    say(page, "good")
    turn = {"question": "q", "answer": "a", "thoughts": "", "facts": "", "calls": [], "sources": None}
    chat = {"title": "t", "updated": 1, "revision": 1, "turns": [turn]}
    broken: list[Any] = [
        None,
        [],
        {},
        3,
        "text",
        {**chat, "turns": {}},
        {**chat, "title": 1},
        {**chat, "updated": 1e300},
        {**chat, "turns": [None]},
        {**chat, "turns": [{**turn, "answer": None}]},
        {**chat, "turns": [{**turn, "calls": [{}]}]},
        {**chat, "turns": [{**turn, "sources": [1]}]},
    ]
    for i, value in enumerate(broken):
        page.evaluate("([i, v]) => localStorage.setItem(`gemify-chat-x${i}`, JSON.stringify(v))", [i, value])
    page.evaluate("localStorage.setItem('gemify-chat-half', '{\"title\": \"t')")
    page.reload()
    page.locator(".exchange").wait_for()
    assert titles(page) == ["good"]
    say(page, "goes on")
    assert page.locator("#chats-note").text_content() == "Kept in this browser only."


def test_what_is_kept_is_bounded(page: Any) -> None:
    """The oldest go; a chat too long to keep is said to be."""
    fill = """async ([count, length]) => {
      const { saveChat, listChats } = await import("/page/chats.js");
      const turn = { question: "q", answer: "x".repeat(length), thoughts: "", facts: "", calls: [], sources: null };
      const kept = [];
      for (let i = 0; i < count; i++) kept.push(saveChat({ id: null, title: `t${i}`, revision: 0, turns: [turn] }));
      const size = Object.values(localStorage).reduce((sum, text) => sum + text.length, 0);
      return [kept.map(Boolean), listChats().length, size];
    }"""
    kept, count, size = page.evaluate(fill, [12, 900_000])
    assert all(kept)
    assert (count, size < 4_000_000) == (4, True)
    assert page.evaluate(fill, [1, 2_000_000])[0] == [False]
    assert page.evaluate(fill, [210, 10])[1] == 200
    full = """async () => {
      const { saveChat, listChats } = await import("/page/chats.js");
      const turn = { question: "q", answer: "a", thoughts: "", facts: "", calls: [], sources: null };
      const set = Storage.prototype.setItem;
      const others = new Set(Object.keys(localStorage));
      Storage.prototype.setItem = function (key, text) {
        if (!others.has(key)) throw new DOMException("full", "QuotaExceededError");
        set.call(this, key, text);
      };
      const kept = saveChat({ id: null, title: "t", revision: 0, turns: [turn] });
      Storage.prototype.setItem = set;
      return [kept, listChats().length];
    }"""
    assert page.evaluate(full) == [None, 200], "another page fills the storage: no chat of ours is given up in vain"
    page.evaluate("localStorage.clear()")
    say(page, "long", delta(content="word " * 300_000))
    page.locator("#chats-note", has_text="is not kept").wait_for(state="attached")
    assert page.locator(".exchange").count() == 1
    page.evaluate("Object.defineProperty(window, 'localStorage', { get() { throw new Error('forbidden'); } })")
    page.click("#new-chat")
    say(page, "works without storage")
    assert page.locator(".exchange").count() == 1
