"""The page, clicked through in a real browser over a real server: what it shows is what the library computes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from browser import Visit, browsing

from gemify.model.prefill import common_subsequence_length
from gemify.retrieval.index import GemIndex
from running_server import Served, indexed, serving

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
CORPUS = {
    "birds.md": f"# Birds\n\nOwls hunt at night. {HOSTILE}\n\n# Bees\n\nBees dance.\n",
    "sea.txt": "Tides follow the moon. " * 30,
    "stone.txt": "Granite is old and hard.\n",
}
PLAIN = "async (source) => (await import('/page/markdown.js')).plainText(source)"
Visiting = Callable[..., Visit]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> GemIndex:
    return indexed(tmp_path_factory.mktemp("page"), CORPUS, tokens=400)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as opened:
        yield opened


@pytest.fixture(scope="module")
def served(browser: Any, index: GemIndex) -> Iterator[Served]:
    with serving(index.model, index=index) as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Visiting]:
    opened: list[Visit] = []

    def visiting(url: str | None = None, **options: Any) -> Visit:
        opened.append(Visit(browser, url or f"{served.url}/", **options))
        return opened[-1]

    yield visiting
    for each in opened:
        each.context.close()


def ask(seen: Visit, question: str, *, tokens: int = 12) -> None:
    """Send a question by the keyboard and wait for the end of its answer."""
    before = seen.page.locator(".exchange").count()
    seen.page.locator("#max-tokens").evaluate("(field, value) => (field.value = value)", str(tokens))
    seen.page.locator("#temperature").evaluate("field => (field.value = 0)")
    seen.page.fill("#message", question)
    seen.page.press("#message", "Control+Enter")
    seen.page.locator(".exchange").nth(before).locator(".facts", has_not_text="writing").wait_for()
    seen.page.locator("#stop").wait_for(state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_part(visit: Visiting, served: Served, width: int, scheme: str) -> None:
    """Each part by mouse, on a phone and a desk, in both colours."""
    seen = visit(width=width, scheme=scheme)
    page = seen.page
    page.locator("#grounded").wait_for()
    assert seen.text("#model") == "tiny"
    page.click("summary:text('Settings')")
    page.fill("#max-tokens", "10")
    page.fill("#temperature", "0")
    page.fill("#sources", "2")
    page.fill("#message", "When do owls hunt?")
    page.click("button:text('Send')")
    page.locator(".facts", has_text="10 tokens").wait_for()
    assert page.locator(".sources .passage").count() == 2
    assert page.locator(".sources .passage").first.is_visible() == (width == 1280)  # on a phone: folded, below
    if width == 360:
        page.click("summary:text('Sources (2)')")
    seen.check()
    page.uncheck("#grounded")
    page.fill("#message", "And bees?")
    page.click("button:text('Send')")
    page.locator(".exchange").nth(1).locator(".facts", has_text="10 tokens").wait_for()
    assert page.locator(".exchange").nth(1).locator(".passage").count() == 0
    page.locator("#new-chat:enabled").click()
    assert page.locator(".exchange").count() == 0

    page.click("#tab-search")
    for mode, query in {"the words": "granite", "the meaning": "old stone", "both": "tides"}.items():
        page.fill("#query", query)
        page.check(f"label:text('{mode}') input")
        page.click("#search-form button")
        page.locator("#search-status", has_text="ms").wait_for()
        page.locator("#found", has_text={"granite": "Granite", "tides": "Tides"}.get(query, "")).wait_for()
    more = page.locator("#found button", has_text="Show all").first
    more.click()
    assert page.locator("#found button", has_text="Show less").get_attribute("aria-expanded") == "true"
    seen.check()

    page.click("#tab-similarity")
    page.click("button:text('Compare')")
    page.locator("#heat td.heat").first.wait_for()
    assert page.locator("#map text").count() == 7
    seen.check()

    page.click("#tab-recovery")
    page.click("button:text('What is remembered?')")
    page.locator("#recovery-status", has_text="back").wait_for()
    seen.check()

    page.locator("#load-writing", has_not_text="–").wait_for()
    page.click("#load-pause")
    assert page.locator("#load-pause").get_attribute("aria-pressed") == "true"
    page.click("#load-pause")
    assert page.locator("#spark-embedding polyline").count() == 1
    seen.check()


def test_by_keyboard_alone(visit: Visiting) -> None:
    """Skip link, tabs by arrows, fields in order, sending and stopping: no mouse."""
    seen = visit()
    press, focused = seen.page.keyboard.press, lambda: seen.page.evaluate("document.activeElement.id")
    seen.page.locator("#grounded").wait_for()
    press("Tab")
    assert seen.page.evaluate("document.activeElement.className") == "skip"
    assert seen.page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
    press("Tab")
    assert focused() == "load-pause"
    press("Tab")
    assert focused() == "tab-chat"
    assert seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, tab in [
        ("ArrowLeft", "recovery"),
        ("ArrowRight", "chat"),
        ("End", "recovery"),
        ("Home", "chat"),
        ("ArrowRight", "search"),
    ]:
        press(key)
        assert focused() == f"tab-{tab}"
        shown = seen.page.locator("[role=tabpanel]:visible")
        assert [shown.count(), shown.get_attribute("id")] == [1, f"panel-{tab}"]
    press("Tab")
    assert focused() == "query"
    seen.page.keyboard.type("owls")
    press("Enter")
    seen.page.locator("#found .passage").first.wait_for()
    assert focused() == "query"
    seen.page.reload()
    assert seen.page.locator("#query").is_visible()  # the address remembers the tab
    seen.check()


def test_turns_are_the_servers_and_carried_over(visit: Visiting, served: Served) -> None:
    seen = visit()
    seen.page.locator("#grounded").uncheck()
    messages: list[Any] = []
    for question in ("What is <b>this</b>?", "And &amp; that?"):
        ask(seen, question)
        messages.append({"role": "user", "content": question})
        reply = served.client().chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
        answer = reply.choices[0].message.content
        assert seen.text(".answer .said") == seen.page.evaluate(PLAIN, answer)
        assert seen.text(".question .said") == question
        assert answer
        assert "".join(seen.page.locator("#announcer").inner_text().split()) == "".join(answer.split())
        messages.append({"role": "assistant", "content": answer})
    seen.check()


def test_stop_frees_the_row(visit: Visiting, served: Served) -> None:
    """Escape and the button both end an answer that would be long; what was written stays."""
    before = served.engine.stats().cancelled_requests
    for count, stop in enumerate((lambda p: p.press("#message", "Escape"), lambda p: p.click("#stop")), start=1):
        seen = visit()
        seen.page.locator("#grounded").uncheck()
        seen.page.locator("#max-tokens").evaluate("field => (field.value = 900)")
        seen.page.locator("#temperature").evaluate("field => (field.value = 0)")
        seen.page.fill("#message", "count")
        seen.page.press("#message", "Control+Enter")
        seen.page.locator(".answer .said", has_text=re.compile(".")).wait_for()
        stop(seen.page)
        seen.page.locator(".facts", has_text="stopped").wait_for()
        served.wait_until(lambda expected=before + count: served.engine.stats().cancelled_requests == expected)
        assert served.engine.stats().num_running_seqs == 0
        seen.check()


def test_similarity_is_the_librarys(visit: Visiting, served: Served) -> None:
    """The table holds the cosines, the map the first two principal components."""
    texts = ["a cat", "a dog", HOSTILE, "granite", "日本語の文", "a cat!"]
    seen = visit()
    seen.page.click("#tab-similarity")
    seen.page.fill("#texts", "\n\n".join(texts))
    seen.page.press("#texts", "Control+Enter")
    seen.page.locator("#map text").nth(5).wait_for()
    vectors_ND = served.gem.encode(texts, normalize_embeddings=True).astype(np.float64)
    cosine_NN = vectors_ND @ vectors_ND.T
    rows = seen.page.locator("#heat tbody tr")
    for i in range(len(texts)):
        assert rows.nth(i).locator("th").get_attribute("title") == texts[i]
        got = [float(c) for j, c in enumerate(rows.nth(i).locator("td").all_inner_texts()) if j != i]
        assert got == pytest.approx(np.delete(cosine_NN[i], i).tolist(), abs=0.0051)
    circles = seen.page.locator("#map circle").evaluate_all(
        "all => all.map((c) => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
    )
    u, s, _ = np.linalg.svd(vectors_ND - vectors_ND.mean(0), full_matrices=False)
    gaps = [np.linalg.norm(np.array(p)[:, None] - np.array(p)[None], axis=-1) for p in (circles, u[:, :2] * s[:2])]
    assert np.allclose(gaps[0] / gaps[0].max(), gaps[1] / gaps[1].max(), atol=0.02)
    assert f"{round(100 * (s[:2] ** 2).sum() / (s**2).sum())} %" in seen.text("#map-note")
    seen.check()


def test_memory_marks_what_differs(visit: Visiting, served: Served) -> None:
    text = f"Owls hunt, {HOSTILE} at night."
    seen = visit()
    seen.page.click("#tab-recovery")
    seen.page.fill("#original", text)
    with seen.page.expect_request("**/v1/recover") as asked:
        seen.page.press("#original", "Control+Enter")
    seen.page.locator("#recovered").wait_for()
    output = served.post("/v1/recover", asked.value.post_data_json).json()["output"]
    plain = """p => {
        const copy = p.cloneNode(true);
        copy.querySelectorAll('.hidden').forEach((s) => s.remove());
        return copy.textContent;
    }"""
    assert seen.page.locator("#given").evaluate(plain) == text
    assert "".join(seen.page.locator("#remembered").evaluate(plain).split()) == "".join(output.split())
    assert (
        seen.page.locator("#given del").first.evaluate("e => getComputedStyle(e).textDecorationLine") == "line-through"
    )
    seen.check()


def test_words_are_compared_by_their_longest_common_subsequence(visit: Visiting) -> None:
    seen = visit()
    compare = "async ([a, b]) => (await import('/page/words.js')).compare(a, b)"
    got = seen.page.evaluate(compare, ["The old cat sat.", "The cat, sat down."])
    assert [w["word"] for w in got["before"] if not w.get("shared")] == ["old"]
    assert [w["word"] for w in got["after"] if not w.get("shared")] == [",", "down"]
    draw = random.Random(0)
    for _ in range(20):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(12))] for _ in range(2))
        got = seen.page.evaluate(compare, [" ".join(a), " ".join(b)])
        kept = [[w["word"] for w in got[side] if w.get("shared")] for side in ("before", "after")]
        assert kept[0] == kept[1]
        assert len(kept[0]) == got["shared"] == common_subsequence_length(a, b)


def test_what_others_wrote_stays_text(visit: Visiting) -> None:
    """Markup in passages, questions and answers; no model here writes it, so that answer alone is handed in."""
    seen = visit()
    seen.page.locator("#grounded").wait_for()
    events = [
        {"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in (HOSTILE[:9], HOSTILE[9:], " [1] [7]")
    ]
    events[0]["gemify"] = {
        "sources": [{"id": "1", "text": HOSTILE, "title": HOSTILE, "file": HOSTILE, "place": HOSTILE}]
    }  # type: ignore[assignment]
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(seen, HOSTILE)
    assert seen.text(".answer .said") == f"{HOSTILE} [1] [7]"
    seen.page.click(".citation")
    assert seen.page.evaluate("document.activeElement.textContent").count(HOSTILE) == 4
    assert seen.page.locator(".citation").count() == 1
    seen.page.click("#tab-search")
    seen.page.fill("#query", "owls")
    seen.page.press("#query", "Enter")
    seen.page.locator("#found", has_text=HOSTILE).wait_for()
    assert seen.page.locator("main img, main script").count() == 0
    seen.check()


def test_errors_are_one_line(visit: Visiting) -> None:
    seen = visit()
    seen.page.locator("#grounded").wait_for()
    seen.page.locator("#max-tokens").evaluate("field => (field.value = 99999)")
    seen.page.fill("#message", "too much")
    seen.page.press("#message", "Control+Enter")
    seen.page.locator("#chat-error", has_text="99").wait_for()
    assert "\n" not in seen.text("#chat-error")
    assert seen.page.locator("#message").input_value() == "too much"
    seen.page.route(
        "**/v1/chat/completions",
        lambda r: r.fulfill(body='data: {"choices": []}\n\n', content_type="text/event-stream"),
    )
    ask(seen, "cut off")
    assert "broke off" in seen.text("#chat-error")
    failed = 'data: {"error": {"message": "the model\\nfailed"}}\n\n'
    seen.page.route("**/v1/chat/completions", lambda r: r.fulfill(body=failed, content_type="text/event-stream"))
    ask(seen, "failing")
    assert seen.text("#chat-error") == "the model failed"
    seen.page.click("#tab-similarity")
    for texts, line in {"alone": "two texts are needed", "\n".join("a" * 61): "at most 60"}.items():
        seen.page.fill("#texts", texts)
        seen.page.press("#texts", "Control+Enter")
        seen.page.locator("#similarity-error", has_text=line).wait_for()
    seen.page.click("#tab-recovery")
    seen.page.route("**/v1/recover", lambda route: route.abort())
    seen.page.press("#original", "Control+Enter")
    seen.page.locator("#recovery-error", has_text="does not answer").wait_for()
    assert [t for t in seen.troubles if "Failed to load resource" not in t] == []


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, visit: Visiting, index: GemIndex) -> None:
    """A server with keys and without an index."""
    with serving(index.model, keys={"ann": "secret-of-ann"}) as locked:  # type: ignore[arg-type]
        seen = visit(f"{locked.url}/", width=360)
        form = seen.page.locator("#key-form")
        for key in ("wrong", "secret-of-ann"):
            form.wait_for()
            seen.page.fill("#key", key)
            with seen.page.expect_response("**/v1/stats") as answered:
                seen.page.press("#key", "Enter")
            assert answered.value.status == (401 if key == "wrong" else 200)
        form.wait_for(state="hidden")
        assert seen.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        seen.page.reload()
        seen.page.locator("#model", has_text="tiny").wait_for()
        assert form.is_hidden()
        assert seen.page.locator("#grounded").is_hidden()
        ask(seen, "hello")
        seen.page.click("#tab-search")
        assert seen.page.locator("#search-none").is_visible()
        assert [t for t in seen.troubles if "401" not in t] == []
        seen.troubles.clear()
        seen.check()
        seen.page.goto("about:blank")
