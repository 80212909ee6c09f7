"""Slides, sheets, OpenDocument, e-books, mail, notebooks and RTF -> sections, by the standard library.

Most of these are ZIP archives of XML. Each section names its place: a slide, a sheet and its rows, a chapter, a cell.
"""

from __future__ import annotations

import codecs
import contextlib
import email
import email.policy
import json
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gemify.retrieval.documents import Section, Skipped, named, sections_of_html

_MAX_PART_BYTES = 1 << 28
"""Of one part of an archive, uncompressed: a small file must not fill the memory."""
_SHEET_ROWS = 25
"""Rows of a sheet in one section, each with its columns' names."""


class _Archive:
    """A ZIP archive of XML."""

    def __init__(self, path: Path, kind: str) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"cannot be read as {kind} ({named(error)}): restore the file") from error
        self.names = set(self._zip.namelist())

    def read(self, name: str) -> bytes:
        info = self._zip.getinfo(name)
        if info.flag_bits & 1:
            raise ValueError("an encrypted file: remove its password")
        if info.file_size > _MAX_PART_BYTES:
            raise ValueError(f"its part {name} has {info.file_size:,} bytes: take a smaller file")
        return self._zip.read(name)

    def xml(self, name: str) -> ElementTree.Element:
        return ElementTree.fromstring(self.read(name))

    def numbered(self, pattern: str) -> list[tuple[int, str]]:
        found = [(int(match[1]), name) for name in self.names if (match := re.fullmatch(pattern, name))]
        return sorted(found)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _attribute(element: ElementTree.Element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def _reader(
    kind: str, read: Callable[[Path, _Archive], Iterator[Section]]
) -> Callable[[Path], Iterator[Section | Skipped]]:
    """A reader of archives whose every failure is one line."""

    def reader(path: Path) -> Iterator[Section | Skipped]:
        try:
            yield from read(path, _Archive(path, kind))
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"cannot be read as {kind} ({named(error)}): restore the file") from error

    return reader


def _title(archive: _Archive, part: str = "docProps/core.xml") -> str:
    with contextlib.suppress(KeyError, ElementTree.ParseError):
        return next((e.text or "" for e in archive.xml(part).iter() if _tag(e) == "title"), "").strip()
    return ""


def _slide_text(root: ElementTree.Element) -> list[str]:
    """The paragraphs of a slide or its notes; a table's row is one line."""
    lines: list[str] = []
    seen: set[ElementTree.Element] = set()

    def text(paragraph: ElementTree.Element) -> str:
        return "".join("\n" if _tag(e) == "br" else (e.text or "") for e in paragraph.iter() if _tag(e) in ("t", "br"))

    for element in root.iter():
        if _tag(element) == "tr":
            seen.update(element.iter())
            cells = [c for c in element if _tag(c) == "tc" and not {"hMerge", "vMerge"} & set(c.attrib)]
            lines.append(" | ".join(" ".join(text(p) for p in c.iter() if _tag(p) == "p") for c in cells))
        elif _tag(element) == "p" and element not in seen and "drawingml" in element.tag:
            lines.append(text(element))
    return [line for line in lines if line.strip()]


def _read_pptx(path: Path, archive: _Archive) -> Iterator[Section]:
    title = _title(archive)
    order = _slide_order(archive)
    for number, name in enumerate(order, start=1):
        lines = _slide_text(archive.xml(name))
        for other in _targets(archive, name):
            if "/notesSlides/" in other and other in archive.names:
                lines += [line for line in _slide_text(archive.xml(other)) if not line.strip().isdigit()]
        if lines:
            yield Section("\n\n".join(lines), title=title, unit="slide", name=str(number))


def _targets(archive: _Archive, part: str) -> list[str]:
    """The parts that a part names."""
    return list(_relations(archive, part).values())


def _relations(archive: _Archive, part: str) -> dict[str, str]:
    folder, name = posixpath.split(part)
    rels = f"{folder}/_rels/{name}.rels"
    if rels not in archive.names:
        return {}
    return {
        _attribute(e, "Id"): posixpath.normpath(
            e.attrib["Target"].lstrip("/")
            if e.attrib["Target"].startswith("/")
            else posixpath.join(folder, e.attrib["Target"])
        )
        for e in archive.xml(rels)
        if e.attrib.get("TargetMode") != "External"
    }


def _slide_order(archive: _Archive) -> list[str]:
    main = "ppt/presentation.xml"
    targets = _relations(archive, main)
    ids = [e.attrib.get(_R + "id", "") for e in archive.xml(main).iter() if _tag(e) == "sldId"]
    named_slides = [targets[i] for i in ids if targets.get(i) in archive.names]
    return named_slides or [name for _, name in archive.numbered(r"ppt/slides/slide(\d+)\.xml")]


_R = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"


def _read_xlsx(path: Path, archive: _Archive) -> Iterator[Section]:
    title, shared = _title(archive), []
    if "xl/sharedStrings.xml" in archive.names:
        for item in archive.xml("xl/sharedStrings.xml"):
            phonetic = {e for p in item.iter() if _tag(p) == "rPh" for e in p.iter()}
            shared.append("".join(e.text or "" for e in item.iter() if _tag(e) == "t" and e not in phonetic))
    targets = _relations(archive, "xl/workbook.xml")
    for sheet in (e for e in archive.xml("xl/workbook.xml").iter() if _tag(e) == "sheet"):
        part = targets.get(sheet.attrib.get(_R + "id", ""))
        if part in archive.names and "/worksheets/" in str(part):
            yield from _sheet(sheet.attrib.get("name", ""), archive.xml(str(part)), shared, title)


def _sheet(name: str, root: ElementTree.Element, shared: list[str], title: str) -> Iterator[Section]:
    rows: list[tuple[int, dict[str, str]]] = []
    for count, row in enumerate((e for e in root.iter() if _tag(e) == "row"), start=1):
        cells: dict[str, str] = {}
        for cell in (e for e in row if _tag(e) == "c"):
            if (value := _cell(cell, shared)).strip():
                cells[re.sub(r"\d", "", cell.attrib.get("r", "")) or str(len(cells))] = " ".join(value.split())
        if cells:
            rows.append((int(row.attrib.get("r", count)), cells))
    if not rows:
        return
    header = rows[0][1] if len(rows) > 1 and len(rows[0][1]) > 1 else {}
    body = rows[1:] if header else rows
    for at in range(0, len(body), _SHEET_ROWS):
        some = body[at : at + _SHEET_ROWS]
        lines = [" | ".join(f"{header[c]}: {v}" if c in header else v for c, v in cells.items()) for _, cells in some]
        first, last = some[0][0], some[-1][0]
        where = f"row {first}" if first == last else f"rows {first}-{last}"
        yield Section("\n".join(lines), title=title, headings=(name,), unit="sheet", name=f'"{name}" {where}')


def _cell(cell: ElementTree.Element, shared: list[str]) -> str:
    kind = cell.attrib.get("t", "")
    if kind == "inlineStr":
        return "".join(e.text or "" for e in cell.iter() if _tag(e) == "t")
    value = next((e.text or "" for e in cell if _tag(e) == "v"), "")
    if kind == "s" and value:
        return shared[int(value)]
    if kind == "b":
        return "TRUE" if value == "1" else "FALSE"
    return value


def _read_odt(path: Path, archive: _Archive) -> Iterator[Section]:
    title = _title(archive, "meta.xml")
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    body = next((e for e in archive.xml("content.xml").iter() if _tag(e) == "body"), None)

    def section() -> Iterator[Section]:
        if lines:
            yield Section("\n\n".join(lines), title=title, headings=tuple(h for _, h in headings))
            lines.clear()

    for element in _odt_blocks(body) if body is not None else ():
        text = _odt_text(element)
        if _tag(element) == "h":
            yield from section()
            level = int(_attribute(element, "outline-level") or 1)
            headings = [*(h for h in headings if h[0] < level), (level, " ".join(text.split()))]
        if text.strip():
            lines.append(text)
    yield from section()


def _odt_blocks(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Paragraphs, headings and table rows in their order, without what was deleted."""
    for child in element:
        if _tag(child) in ("tracked-changes", "sequence-decls", "forms", "annotation"):
            continue
        if _tag(child) in ("p", "h", "table-row"):
            yield child
        else:
            yield from _odt_blocks(child)


def _odt_text(element: ElementTree.Element) -> str:
    if _tag(element) == "table-row":
        cells = [c for c in element if _tag(c) == "table-cell"]
        return " | ".join(" ".join(_odt_text(b) for b in _odt_blocks(c)).strip() for c in cells)
    parts = [element.text or ""]
    for child in element:
        tag = _tag(child)
        if tag == "s":
            parts.append(" " * int(_attribute(child, "c") or 1))
        elif tag in ("tab", "line-break"):
            parts.append("\t" if tag == "tab" else "\n")
        elif tag in ("frame", "text-box"):
            parts.append("\n" + "\n".join(_odt_text(b) for b in _odt_blocks(child)) + "\n")
        elif tag != "annotation":
            parts.append(_odt_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _read_epub(path: Path, archive: _Archive) -> Iterator[Section]:
    package = next(e.attrib["full-path"] for e in archive.xml("META-INF/container.xml").iter() if _tag(e) == "rootfile")
    root, folder = archive.xml(package), posixpath.dirname(package)
    title = next((e.text or "" for e in root.iter() if _tag(e) == "title"), "").strip()
    files = {e.attrib["id"]: e.attrib["href"] for e in root.iter() if _tag(e) == "item" and "href" in e.attrib}
    spine = [e.attrib.get("idref", "") for e in root.iter() if _tag(e) == "itemref"]
    from urllib.parse import unquote

    chapter = 0
    for name in (posixpath.normpath(posixpath.join(folder, unquote(files[i]))) for i in spine if i in files):
        if name not in archive.names:
            continue
        sections = list(sections_of_html(archive.read(name), title=title))
        chapter += bool(sections)
        for section in sections:
            yield Section(section.text, title=title, headings=section.headings, unit="chapter", name=str(chapter))


def read_notebook(path: Path) -> Iterator[Section | Skipped]:
    """A section a cell: Markdown, code and the text that code printed."""
    try:
        book = json.loads(path.read_bytes().decode("utf-8-sig"))
        cells = book["cells"] if "cells" in book else [c for sheet in book["worksheets"] for c in sheet["cells"]]
        for number, cell in enumerate(cells, start=1):
            texts = [_joined(cell.get("source", cell.get("input", "")))]
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                texts.append(_joined(output.get("text", data.get("text/plain", "") if isinstance(data, dict) else "")))
            if text := "\n\n".join(t for t in texts if t.strip()):
                yield Section(text, unit="cell", name=str(number))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot be read as a notebook ({named(error)}): restore the file") from error


def _joined(lines: Any) -> str:
    text = "".join(lines) if isinstance(lines, list) else str(lines or "")
    return text.encode("utf-8", "replace").decode()


def read_mail(path: Path) -> Iterator[Section | Skipped]:
    """One section: who wrote to whom and when, and the text; attachments are named."""
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    try:
        subject = str(message.get("subject", ""))
        lines = [f"{name}: {message[name]}" for name in ("From", "To", "Date", "Subject") if message.get(name)]
        body = message.get_body(("plain", "html"))
        text = str(body.get_content()) if body is not None else ""
        if body is not None and body.get_content_type() == "text/html":
            text = "\n\n".join(section.text for section in sections_of_html(text.encode(), title=""))
        attached = [name for part in message.iter_attachments() if (name := part.get_filename())]
    except Exception as error:
        raise ValueError(f"cannot be read as mail ({named(error)}): restore the file") from error
    if not lines:
        raise ValueError("not mail: it says neither from whom, nor to whom, nor when")
    whole = (
        "\n".join(lines) + "\n\n" + text.replace("\r\n", "\n").strip() + "".join(f"\nAttached: {a}" for a in attached)
    )
    yield Section(whole.strip().encode("utf-8", "replace").decode(), title=subject)


_RTF = re.compile(rb"\\([a-z]+)(-?\d+)? ?|\\'([0-9a-fA-F]{2})|\\(.)|([{}])|[\r\n]+|([^\\{}\r\n]+)", re.DOTALL)
_RTF_UNSEEN = frozenset(
    b"fonttbl colortbl stylesheet info pict object header footer headerl headerr footerl footerr generator themedata"
    b" datastore xmlnstbl listtable listoverridetable rsidtbl mmathPr latentstyles fldinst filetbl revtbl".split()
)
_RTF_TEXT = {b"par": "\n\n", b"line": "\n", b"tab": "\t", b"cell": " | ", b"row": "\n", b"emdash": "—", b"endash": "–"}
_RTF_TEXT |= {b"lquote": "‘", b"rquote": "’", b"ldblquote": "“", b"rdblquote": "”", b"bullet": "•", b"page": "\n\n"}


def _rtf_text(word: bytes, number: bytes, symbol: bytes) -> str:
    """The text that a control word or symbol stands for."""
    if word == b"u" and number:
        return chr(int(number) % 65536)
    if symbol in (b"\\", b"{", b"}"):
        return symbol.decode()
    return "\N{NO-BREAK SPACE}" if symbol == b"~" else _RTF_TEXT.get(word, "")


def read_rtf(path: Path) -> Iterator[Section | Skipped]:
    """One section: the text alone."""
    raw = path.read_bytes()
    if not raw.lstrip().startswith(b"{\\rtf"):
        raise ValueError("not RTF: give the file its own suffix")
    page = re.search(rb"\\ansicpg(\d+)", raw)
    encoding = f"cp{page[1].decode()}" if page else "cp1252"
    try:
        codecs.lookup(encoding)
    except LookupError:
        encoding = "cp1252"
    text: list[str] = []
    stack: list[bool] = []  # of the groups that are open: whether they are unseen
    unseen, skip = False, 0
    for word, number, hexadecimal, symbol, brace, plain in _RTF.findall(raw):
        if hexadecimal or plain:
            piece = bytes.fromhex(hexadecimal.decode()) if hexadecimal else plain
            dropped, skip = piece[skip:], max(0, skip - len(piece))
            text.append("" if unseen else dropped.decode(encoding, "replace"))
        elif brace:
            if brace == b"{":
                stack.append(unseen)
            else:
                unseen = stack.pop() if stack else False
        elif symbol == b"*" or word in _RTF_UNSEEN:
            unseen = True
        elif not unseen:
            text.append(_rtf_text(word, number, symbol))
            skip = 1 if word == b"u" else 0
    joined = "".join(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    yield Section(re.sub(r" \| (?=\n|$)", "", joined).strip() or " ")


READERS: dict[str, Callable[[Path], Iterator[Section | Skipped]]] = {
    ".pptx": _reader("slides", _read_pptx),
    ".xlsx": _reader("a sheet", _read_xlsx),
    ".xlsm": _reader("a sheet", _read_xlsx),
    ".odt": _reader("OpenDocument", _read_odt),
    ".epub": _reader("an e-book", _read_epub),
    ".ipynb": read_notebook,
    ".eml": read_mail,
    ".rtf": read_rtf,
}
"""The reader of each suffix."""
