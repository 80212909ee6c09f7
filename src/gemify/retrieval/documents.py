"""Markdown, HTML and Word files -> sections, each through a kept library that is imported when first needed.

A section knows the line, page or row of each character. What these libraries raise on damaged files is open-ended, so
everything they raise is caught and said in one line.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gemify.io.rows import NOT_UTF8
from gemify.retrieval.metadata import Value, to_metadata


@dataclass(frozen=True)
class Section:
    """A run of text under one heading."""

    text: str
    title: str = ""
    """The document's title, if it has one."""
    headings: tuple[str, ...] = ()
    """The headings above the text, the outermost first."""
    unit: Literal["", "line", "page", "row", "slide", "sheet", "chapter", "cell"] = ""
    """The unit of locations in this file. A .docx file has none."""
    first: int = 1
    """The line or page on which the text begins."""
    starts: tuple[int, ...] = ()
    """For pages: the offset at which each begins."""
    name: str = ""
    """Of a row, slide, sheet, chapter or cell: its id or number."""
    meta: Mapping[str, Value] = field(default_factory=dict)
    """What the document or the row says of itself beside its text, by column."""

    def location(self, start: int, end: int) -> str:
        """Return where a run of characters stands, such as ``lines 3-9``, ``page 2`` or ``row q17``.

        Args:
            start: Offset of the first character.
            end: Offset behind the last one.
        """
        if self.name:
            return f"{self.unit} {self.name}"
        if not self.unit:
            return ""
        first, last = self._number(start), self._number(max(start, end - 1))
        return f"{self.unit} {first}" if first == last else f"{self.unit}s {first}-{last}"

    def _number(self, offset: int) -> int:
        if self.unit == "page":
            return self.first + max(0, bisect_right(self.starts, offset) - 1)
        return self.first + self.text.count("\n", 0, offset)


@dataclass(frozen=True)
class Skipped:
    """A file, directory or row that was not read, and why."""

    path: str
    reason: str


_SPACE = re.compile(r"\s+")
_UNSEEN = ("script", "style", "noscript", "template", "svg", "head")
_BLOCK = re.compile(
    "^(address|article|aside|blockquote|body|caption|center|dd|details|dialog|div|dl|dt|fieldset|figcaption|figure"
    "|footer|form|h[1-6]|header|hr|html|legend|li|main|nav|ol|option|p|pre|search|section|summary|table|tbody|td"
    "|textarea|tfoot|th|thead|tr|ul)$"
)
_HEADING = re.compile(r"h([1-6])$")
_HIDDEN = re.compile(r"(^|[;\s])(display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)
_MAIN = ":is(main, article, [role=main])"
_BOILERPLATE = (
    f":is(nav, footer, [role=navigation], [role=contentinfo], [role=search]):not({_MAIN} *, section *, blockquote *)"
    f", :root:has({_MAIN}) aside:not({_MAIN} *, [role^=doc-]), a[href^='#'][class*=skip i]"
)
"""What stands around a page's text, by the words of HTML itself."""
_CONSENT = re.compile(
    r"\b(cookie|consent|gdpr)s?[-_]*(banner|bar|notice|consent|popup|modal|dialog|overlay|wall|message|law)|\bonetrust",
    re.IGNORECASE,
)
"""Ids and classes of what asks about cookies."""
_LAYOUT = ["table", "pre", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6"]
"""In a cell these mean that the table lays out a page."""


def _by_heading(blocks: Iterable[tuple[int, str]], *, title: str) -> Iterator[Section]:
    """Sections of blocks with their heading levels (0: a paragraph); each heading begins one."""
    outline = _Outline()
    parts: list[str] = []
    for level, text in blocks:
        if level and parts:
            yield Section("\n\n".join(parts), title=title, headings=outline.path)
            parts = []
        if level:
            outline.enter(level, text)
        if text.strip():
            parts.append(text)
    if parts:
        yield Section("\n\n".join(parts), title=title, headings=outline.path)


class _Outline:
    """The headings above the text now being read."""

    def __init__(self) -> None:
        self._levels: list[tuple[int, str]] = []

    def enter(self, level: int, heading: str) -> None:
        self._levels = [(above, h) for above, h in self._levels if above < level]
        if heading := _SPACE.sub(" ", heading).strip():
            self._levels.append((level, heading))

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(heading for _, heading in self._levels)


def read_markdown(path: Path) -> Iterator[Section | Skipped]:
    """A section a heading, its text as it is written; front matter is metadata of all."""
    keys, text = _front_matter(decode_utf8(path.read_bytes()))
    meta = to_metadata({name: value for name, value in keys.items() if name != "title"})
    return (replace(section, meta=meta) for section in _sections_of_markdown(keys, text))


def _sections_of_markdown(keys: dict[str, Any], text: str) -> Iterator[Section]:
    from markdown_it import MarkdownIt

    lines = [line for line in re.split(r"(?<=\n)", text) if line]  # the parser's: str.splitlines knows more line ends
    tokens = MarkdownIt("commonmark").parse(text)
    starts: list[tuple[int, int, str]] = []
    for at, token in enumerate(tokens):
        if token.type == "heading_open" and token.level == 0 and token.map is not None:
            starts.append((token.map[0], int(token.tag[1:]), tokens[at + 1].content))
    outline = _Outline()
    title = str(keys.get("title") or "") or next((heading for _, level, heading in starts if level == 1), "")
    if said := "\n".join(f"{name}: {_plain(value)}" for name, value in keys.items() if name != "title" and value):
        yield Section(said, title=title, unit="line", first=2)
    bounds = [0, *(line for line, _, _ in starts), len(lines)]
    for number, (first, last) in enumerate(pairwise(bounds)):
        if number:
            outline.enter(starts[number - 1][1], starts[number - 1][2])
        if first < last:
            body = "".join(lines[first:last])
            yield Section(body, title=title, headings=outline.path, unit="line", first=first + 1)


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    """The keys of front matter in YAML, or TOML between ``+++``, and the text with empty lines in its place."""
    found = re.match(r"(---|\+\+\+)[ \t]*\n(.*?\n)(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", text, re.DOTALL)
    if found is None:
        return {}, text
    import tomllib

    import yaml

    try:
        keys = yaml.safe_load(found[2]) if found[1] == "---" else tomllib.loads(found[2])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, text
    if not isinstance(keys, dict):
        return {}, text
    return {str(name): value for name, value in keys.items()}, "\n" * found[0].count("\n") + text[found.end() :]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def decode_utf8(raw: bytes, first_line: int = 1) -> str:
    """Return UTF-8 text with line ends of one kind. Raises ValueError with the command that converts another."""
    if first_line == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)")
    if b"\0" in raw:
        raise ValueError("a binary file: give text")
    try:
        text = raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ValueError(f"line {line} is {NOT_UTF8}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_html(path: Path) -> Iterator[Section | Skipped]:
    """A section a heading, of what a reader of the page sees, without menus, footers and the like if text is left."""
    raw = path.read_bytes()
    yield from list(sections_of_html(raw, boilerplate=False)) or sections_of_html(raw)


def sections_of_html(raw: bytes, *, title: str | None = None, boilerplate: bool = True) -> Iterator[Section]:
    """A section a heading, of what a reader of the page sees; a table's row is a line.

    Args:
        raw: The page.
        title: None: the page's own.
        boilerplate: Whether what stands around the page's text is read too.
    """
    from bs4 import BeautifulSoup

    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("a binary file: give HTML")
    try:
        raw.decode()
        encoding = "utf-8"  # whatever the page says: other encodings' texts are not UTF-8 by chance
    except UnicodeDecodeError:
        encoding = None
    try:
        soup = BeautifulSoup(raw, "lxml", from_encoding=encoding)
        language = soup.html.get("lang") if soup.html else None
        own = _SPACE.sub(" ", soup.title.get_text()).strip() if soup.title else ""
        for unseen in [*soup(_UNSEEN), *soup("dialog", open=False), *soup(hidden=True), *soup(style=_HIDDEN)]:
            if unseen.name not in ("html", "body"):
                unseen.extract()
        for around in () if boilerplate else [*soup.select(_BOILERPLATE), *soup(_asks_consent)]:
            around.extract()
        for row in soup("tr"):
            _join_cells(row)
        blocks = list(_blocks(soup))
    except (RecursionError, AssertionError, LookupError) as error:
        raise ValueError(f"cannot be read as HTML ({type(error).__name__}): restore the file") from error
    meta = to_metadata({"lang": language})
    yield from (replace(s, meta=meta) for s in _by_heading(blocks, title=own if title is None else title))


def _asks_consent(element: Any) -> bool:
    names = " ".join([element.get("id", ""), *element.get("class", ())])
    return element.name in ("div", "section", "aside", "dialog") and _CONSENT.search(names) is not None


def _join_cells(row: Any) -> None:
    """Make a table's row one line, unless the table lays out a page."""
    cells = row(["td", "th"], recursive=False)
    if len(cells) > 1 and row.find(_LAYOUT) is None:
        texts = [_SPACE.sub(" ", cell.get_text(" ")).strip() for cell in cells]
        row.clear()
        row.append(" | ".join(texts))


def _blocks(soup: Any) -> Iterator[tuple[int, str]]:
    """Paragraphs of a page with the level of the heading that each is, or 0."""
    from bs4.element import Comment, Doctype, NavigableString, ProcessingInstruction

    now: Any = None
    words: list[str] = []
    for node in soup.descendants:
        if node.name == "br" or (node.name and _BLOCK.match(node.name)):
            words.append("\n")
        if not isinstance(node, NavigableString) or isinstance(node, Comment | Doctype | ProcessingInstruction):
            continue
        block = node.find_parent(_BLOCK)
        if block is not now and words:
            yield from _block(now, words)
            words = []
        now = block
        words.append(str(node))
    yield from _block(now, words)


def _block(block: Any, words: list[str]) -> Iterator[tuple[int, str]]:
    text = "".join(words)
    if block is not None and block.name == "pre":
        text = text.replace("\u00ad", "").strip("\n")
    else:
        text = "\n".join(filter(None, (_SPACE.sub(" ", line).replace("\u00ad", "").strip() for line in _lines(words))))
    if text.strip():
        heading = _HEADING.match(block.name) if block is not None else None
        yield (int(heading[1]) if heading else 0), text


def _lines(words: list[str]) -> list[str]:
    """Text between breaks: a line end in the source is a space, a <br> is a line end."""
    lines = [""]
    for word in words:
        if word == "\n":
            lines.append("")
        else:
            lines[-1] += word
    return lines


def read_docx(path: Path) -> Iterator[Section | Skipped]:
    """A section a heading; a table is a line a row. Notes, comments, headers and footers come last."""
    import docx

    refuse_encrypted(path)
    try:
        document = docx.Document(str(path))
        title = document.core_properties.title or ""
        parts = list(_docx_blocks(document.element.body, document))
        kinds = ("header", "footer", "first_page_header", "first_page_footer", "even_page_header", "even_page_footer")
        around = [getattr(section, kind) for section in document.sections for kind in kinds]
        parts += [(0, text) for text in _docx_notes(document)]
        texts = ("\n".join(t for _, t in _docx_blocks(p._element, document) if t.strip()) for p in around)
        parts += [(0, text) for text in dict.fromkeys(texts) if text]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"cannot be read as a Word file ({named(error)}): restore the file") from error
    yield from _by_heading(parts, title=title)


_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_MATH_TEXT = "{http://schemas.openxmlformats.org/officeDocument/2006/math}t"
_NOT_TEXT = (
    f"{_WORD}del",
    f"{_WORD}moveFrom",
    f"{_WORD}rt",
    "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
)
_NOT_RUN_TEXT = (*_NOT_TEXT, f"{_WORD}txbxContent", f"{_WORD}pPr", f"{_WORD}rPr")
_BREAKS = {f"{_WORD}tab": "\t", f"{_WORD}br": "\n", f"{_WORD}cr": "\n", f"{_WORD}noBreakHyphen": "-"}


def _docx_notes(document: Any) -> Iterator[str]:
    """The footnotes, endnotes and comments of a document, with the comments' writers."""
    from docx.oxml import parse_xml

    for relation in document.part.rels.values():
        if relation.reltype.endswith(("/footnotes", "/endnotes", "/comments")) and not relation.is_external:
            for note in parse_xml(relation.target_part.blob):
                if note.get(f"{_WORD}type", "normal") == "normal":  # others are the lines above the notes
                    text = "\n".join(text for _, text in _docx_blocks(note, document) if text.strip())
                    writer = note.get(f"{_WORD}author")
                    yield text if writer is None else f"Comment by {writer}: {text}"


def _docx_blocks(parent: Any, document: Any) -> Iterator[tuple[int, str]]:
    """Paragraphs and tables with heading levels; also those in content controls, insertions and text boxes."""
    from docx.text.paragraph import Paragraph

    for child in parent:
        if child.tag == f"{_WORD}p":
            yield _level(Paragraph(child, document)), _run_text(child)
            for box in child.iter(f"{_WORD}txbxContent"):
                if not any(above.tag in _NOT_TEXT for above in box.iterancestors()):
                    yield from _docx_blocks(box, document)
        elif child.tag == f"{_WORD}tbl":
            yield 0, "\n".join(_table_rows(child, document))
        elif child.tag not in _NOT_TEXT and isinstance(child.tag, str):
            yield from _docx_blocks(child, document)


def _run_text(element: Any) -> str:
    """The text of a paragraph as it reads with all changes accepted, without that of its text boxes."""
    parts = []
    for child in element:
        if child.tag in (f"{_WORD}t", _MATH_TEXT):
            parts.append(child.text or "")
        elif child.tag in _BREAKS:
            parts.append(_BREAKS[child.tag])
        elif child.tag not in _NOT_RUN_TEXT and not _is_hidden(child):
            parts.append(_run_text(child))
    return "".join(parts)


def _is_hidden(run: Any) -> bool:
    mark = run.find(f"{_WORD}rPr/{_WORD}vanish")
    return mark is not None and mark.get(f"{_WORD}val", "1") not in ("0", "false", "off")


def _table_rows(table: Any, document: Any) -> Iterator[str]:
    """A line a row. A cell that goes on from the one above is empty."""
    for row in table.iter(f"{_WORD}tr"):
        if next(row.iterancestors(f"{_WORD}tbl")) is not table:
            continue  # a table in a cell: it stands in that cell
        if row.find(f"{_WORD}trPr/{_WORD}del") is not None:
            continue
        cells = [c for c in row.iter(f"{_WORD}tc") if next(c.iterancestors(f"{_WORD}tr")) is row]
        yield " | ".join(
            " ".join(t.replace("\n", "; ") for _, t in _docx_blocks(c, document) if t).strip() for c in cells
        )


def _level(paragraph: Any) -> int:
    style, seen = paragraph.style, 0
    while style is not None and seen < 20:  # a style of one's own is based on one of Word's
        name = style.name or ""
        if name == "Title":
            return 1
        if name.startswith("Heading ") and name[8:].isdigit():
            return int(name[8:])
        style, seen = style.base_style, seen + 1
    return 0


def refuse_encrypted(path: Path) -> None:
    """Raise ValueError for an encrypted Office file, or one of Office before 2007: both begin alike."""
    with path.open("rb") as file:
        if file.read(8) == bytes.fromhex("d0cf11e0a1b11ae1"):
            raise ValueError("an encrypted or an old binary Office file: save it anew, without a password")


def named(error: Exception) -> str:
    """An error's kind and its first words, without the directories of a path."""
    first = re.sub("/.*/", "", (str(error).strip().splitlines() or [""])[0])[:80]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
