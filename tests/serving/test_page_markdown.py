"""The page's Markdown in a real browser: what is read, what is inert, and how a growing text ends."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from browser import browsing, open_page_files

RENDER = """async ([source, cite]) => {
  const { renderMarkdown } = await import("/page/markdown.js");
  const root = document.createElement("div");
  root.append(...renderMarkdown(source, cite ? (n) => document.createElement("button") : null));
  return root.innerHTML;
}"""
PLAIN = "async (source) => (await import('/page/markdown.js')).plainText(source)"
GROW = """async (pieces) => {
  const { MarkdownView, renderMarkdown } = await import("/page/markdown.js");
  const [root, whole] = [document.createElement("div"), document.createElement("div")];
  const view = new MarkdownView(root);
  for (const piece of pieces) {
    view.append(piece);
    view.draw(true);
  }
  view.finish();
  whole.append(...renderMarkdown(pieces.join("")));
  return [root.innerHTML, whole.innerHTML];
}"""
HEIGHT = """async ([unit, length]) => {
  const { renderMarkdown } = await import("/page/markdown.js");
  const root = document.createElement("div");
  root.append(...renderMarkdown(unit.repeat(length / unit.length)));
  document.body.append(root);
  root.getBoundingClientRect(); // it can be laid out
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_ELEMENT);
  let [highest, height] = [0, 0];
  for (let node = root; node; ) {
    highest = Math.max(highest, height);
    if (walker.firstChild()) height++;
    else while (!walker.nextSibling() && walker.parentNode() && height-- > 0);
    node = height > 0 ? walker.currentNode : null;
  }
  root.remove();
  return highest;
}"""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browsing() as browser, open_page_files(browser) as opened:
        yield opened


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("plain text\nand a line", "<p>plain text\nand a line</p>"),
        ("# One\n### Three ##\ntext", "<h4>One</h4><h6>Three</h6><p>text</p>"),
        ("a **b** *c* ***d*** ~~e~~ `f*` __g__", "<p>a <strong>b</strong> <em>c</em> <em><strong>d</strong></em>"),
        ("snake_case_name 2 * 3 * 4 \\*not\\*", "<p>snake_case_name 2 * 3 * 4 *not*</p>"),
        ("- a\n  - b\n- c", "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("1. a\n  - b\n\n2. c", '<ol class="loose"><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>'),
        ("- a\n\t- b", "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li></ul>"),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("| a | b |\n|---|:-:|\n| 1 | `x\\|y` |", '<th scope="col">a</th><th scope="col" class="center">b</th>'),
        ("Here:\n| a |\n|---|\n| 1 |", "<p>Here:</p><div"),
        ('[a](https://x.y/z_(1) "t").', '<a href="https://x.y/z_(1)"'),
        ("see https://x.y/a_b_c.", ">https://x.y/a_b_c</a>.</p>"),
        ("<https://x.y> ![alt](https://x.y/p.png)", ">alt</a></p>"),
        ("```py\nprint(1)\n\n# no heading\n```\nafter", "(1)\n\n# no heading</code></pre></div><p>after</p>"),
        ("1. do\n   ```\n   x = 1\n   ```\n2. go", "<code>x = 1</code></pre></div></li><li><p>go</p></li></ol>"),
    ],
)
def test_each_form(page: Any, source: str, html: str) -> None:
    assert html in page.evaluate(RENDER, [source, False])


def test_citations_are_elements(page: Any) -> None:
    got = page.evaluate(RENDER, ["as **said [1]**, [2](https://x.y) and `[3]`", True])
    assert got.count("<button>") == 1
    assert "<strong>said <button></button></strong>" in got
    assert "<code>[3]</code>" in got


@pytest.mark.parametrize(
    "source",
    [
        "<img src=x onerror=alert(1)> <script>alert(2)</script>",
        "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) <javascript:alert(1)>",
        "[a](java\tscript:alert(1)) [b](vbscript:x) [c](//x.y) [d](/v1/stats) [e](file:///x) [f](\x01javascript:x)",
        "![x](javascript:alert(1)) [`x`](blob:https://x.y/1) [x](&#106;avascript:alert(1))",
        '[x](https://x.y/"onmouseover="alert(1)) <https://x.y/" onclick="alert(1)>',
        "```<img onerror=alert(1)>\n<script>alert(1)</script>\n```\n| <b> |\n|---|\n| <svg onload=alert(1)> |",
    ],
)
def test_what_is_hostile_is_text(page: Any, source: str) -> None:
    got = page.evaluate(
        """async (source) => {
          const { renderMarkdown } = await import("/page/markdown.js");
          const root = document.createElement("div");
          root.append(...renderMarkdown(source));
          document.body.append(root);
          const all = [...root.querySelectorAll("*")];
          const names = all.flatMap((node) => [...node.attributes].map((a) => a.name));
          const odd = names.filter((name) => /^on|style|src/.test(name));
          const found = [all.map((node) => node.localName), all.map((node) => node.protocol).filter(Boolean), odd];
          root.remove();
          return found;
        }""",
        source,
    )
    assert not {"img", "script", "svg", "b", "iframe"} & set(got[0])
    assert set(got[1]) <= {"https:"}
    assert got[2] == []


LEAVES = [
    "plain words",
    "a `c*d` e",
    "**bold text**",
    "*soft*",
    "x ~~gone~~ y",
    "[label](https://x.y/z)",
    "2 < 3 & 4 > 1",
]
READ = ["plain words", "a c*d e", "bold text", "soft", "x gone y", "label", "2 < 3 & 4 > 1"]


def make_text(draw: random.Random, depth: int = 0) -> tuple[list[str], list[str]]:
    """Lines of Markdown, and the lines that are read of them."""
    lines: list[str] = []
    read: list[str] = []
    for _ in range(draw.randrange(1, 5)):
        pick = draw.randrange(len(LEAVES))
        leaf, said = LEAVES[pick], READ[pick]
        kind = draw.choice(["paragraph", "heading", "code", "table", "rule", *(["list", "quote"] if depth < 3 else [])])
        if kind == "paragraph":
            lines, read = [*lines, leaf, "and " + leaf], [*read, said, "and " + said]
        elif kind == "heading":
            lines, read = [*lines, "## " + leaf], [*read, said]
        elif kind == "code":
            lines, read = [*lines, "~~~js", leaf, "", "  <b>", "~~~"], [*read, leaf, "", "  <b>"]
        elif kind == "table":
            lines, read = [*lines, f"| a | {leaf} |", "|:--|--:|", f"| {leaf} | b |"], [*read, "a" + said + said + "b"]
        elif kind == "rule":
            lines, read = [*lines, "***"], read
        else:
            inner, said_inner = make_text(draw, depth + 1)
            marker = draw.choice(["- ", "1. ", "+ "]) if kind == "list" else "> "
            space = "> " if kind == "quote" else " " * len(marker)
            lines = [*lines, *((marker if i == 0 else space) + line for i, line in enumerate(inner))]
            read = [*read, *said_inner]
        lines.append("")
    return lines[:-1], read


def test_what_is_read_is_the_text_without_its_marks(page: Any) -> None:
    draw = random.Random(0)
    for _ in range(60):
        lines, read = make_text(draw)
        got = page.evaluate(PLAIN, "\n".join(lines))
        assert "".join(got.split()) == "".join("".join(read).split()), "\n".join(lines)


MARKS = ["https://x.y", "```", "- ", "| - |", "](", "javascript:", "**", "\r\n"]
HOSTILE = [*"*_~`[]()!<>|#-+.:\\\n\n  \tab1", *MARKS]


def test_a_growing_text_ends_like_a_whole_one(page: Any) -> None:
    """Cut anywhere, be it well-made or nonsense; each piece is drawn at once."""
    draw = random.Random(1)
    for round_ in range(120):
        if round_ % 2:
            text = "\n".join(make_text(draw)[0])
        else:
            text = "".join(draw.choices(HOSTILE, k=draw.randrange(5, 120)))
        cuts = sorted(draw.sample(range(len(text) + 1), min(len(text), draw.randrange(1, 40))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        grown, whole = page.evaluate(GROW, pieces)
        assert grown == whole, repr(text)


def test_half_a_mark_is_not_shown(page: Any) -> None:
    half = """async (source) => {
      const { MarkdownView } = await import("/page/markdown.js");
      const root = document.createElement("div");
      const view = new MarkdownView(root);
      view.append(source);
      view.draw(true);
      return root.innerHTML;
    }"""
    assert page.evaluate(half, "so **bol") == "<p>so <strong>bol</strong></p>"
    assert page.evaluate(half, "so **bold*") == "<p>so <strong>bold</strong></p>"
    assert page.evaluate(half, "run `ls -") == "<p>run <code>ls -</code></p>"
    assert "<code>x = 1</code>" in page.evaluate(half, "```py\nx = 1")
    assert page.evaluate(half, "a * b") == "<p>a * b</p>"


def test_elements_stay_while_a_text_grows(page: Any) -> None:
    """A selection and the keyboard's place are not lost with every token."""
    kept = page.evaluate(
        """async () => {
          const { MarkdownView } = await import("/page/markdown.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          const pieces = "# a\\n\\n- one **two**\\n- three\\n\\n```\\ncode\\n".split(/(?=[ \\n])/);
          const seen = new Set();
          for (const piece of pieces) {
            view.append(piece);
            view.draw(true);
            root.querySelectorAll("*").forEach((node) => seen.add(node));
          }
          view.finish();
          return [seen.size, root.querySelectorAll("*").length];
        }"""
    )
    assert kept[0] - kept[1] <= 3  # a list begins as a paragraph


@pytest.mark.parametrize(
    "unit",
    [
        "> ",
        "- ",
        "*a **b ",
        "[",
        "[a](",
        "](",
        "`a",
        "``` `",
        "<",
        "<https://",
        "https://[",
        "\\`",
        "*" * 50 + " a",
        "_a_",
        "[a](https://x.y)",
        "|-",
        "| a ",
        "\n- a",
        "\n> ",
        "\n\na",
        "~~a",
        "![[",
        "a\n",
        "1. ",
        "[1]",
        "*a_ _b* ",
    ],
)
def test_cost_is_linear_and_depth_bounded(page: Any, unit: str) -> None:
    """Minutes if it were quadratic: the test ends in its browser's limit. The browser can lay it out."""
    assert 1 <= page.evaluate(HEIGHT, [unit, 60_000]) < 60
