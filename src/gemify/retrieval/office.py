"""Slides, sheets, OpenDocument, e-books, mail and notebooks -> sections.

Slides are read by python-pptx, sheets by openpyxl, the others by the standard library: most are ZIP archives of XML.
Each section names its place: a slide, a sheet and its rows, a chapter, a cell.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import math
import posixpath
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gemify.retrieval.documents import Section, Skipped, named, refuse_encrypted, sections_of_html
from gemify.retrieval.rtf import read_rtf

_MAX_PART_BYTES = 1 << 28
"""Of one part of an archive, uncompressed: a small file must not fill the memory."""
_SHEET_ROWS = 25
"""Rows of a sheet in one section, each with its columns' names."""


_NO_VALUE = re.compile(rb"<c\b([^>]*)><f\b[^>]*(?:/>|>[^<]*</f>)(?:<v\s*/>|<v></v>)?</c>")
"""A cell of a sheet with a formula that no program has calculated."""


class _Archive:
    """A ZIP archive of XML. ValueError for one that is damaged, encrypted or huge."""

    def __init__(self, path: Path, kind: str) -> None:
        refuse_encrypted(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"cannot be read as {kind} ({named(error)}): restore the file") from error
        self.names = set(self._zip.namelist())
        for info in self._zip.infolist():
            if info.flag_bits & 1:
                raise ValueError("an encrypted file: remove its password")
            if info.file_size > _MAX_PART_BYTES:
                raise ValueError(f"its part {info.filename} has {info.file_size:,} bytes: take a smaller file")

    def read(self, name: str) -> bytes:
        return self._zip.read(name)

    def xml(self, name: str) -> ElementTree.Element:
        return ElementTree.fromstring(self.read(name))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _attribute(element: ElementTree.Element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def _reader(
    kind: str, read: Callable[[Path, _Archive], Iterator[Section | Skipped]]
) -> Callable[[Path], Iterator[Section | Skipped]]:
    """A reader of archives whose every failure is one line."""

    def reader(path: Path) -> Iterator[Section | Skipped]:
        archive = _Archive(path, kind)
        try:
            yield from read(path, archive)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"cannot be read as {kind} ({named(error)}): restore the file") from error

    return reader


def _title(archive: _Archive, part: str) -> str:
    with contextlib.suppress(KeyError, ElementTree.ParseError):
        return next((e.text or "" for e in archive.xml(part).iter() if _tag(e) == "title"), "").strip()
    return ""


def _read_pptx(path: Path, archive: _Archive) -> Iterator[Section]:
    from pptx import Presentation

    deck = Presentation(str(path))
    title = deck.core_properties.title or ""
    for number, slide in enumerate(deck.slides, start=1):
        lines = _slide_text(slide.element)
        for part in (r.target_part for r in slide.part.rels.values() if not r.is_external):
            if part.partname.startswith(("/ppt/charts/chart", "/ppt/diagrams/data")):
                lines += _slide_text(ElementTree.fromstring(part.blob))
            elif part.partname.startswith("/ppt/comments/"):
                said = (e for e in ElementTree.fromstring(part.blob).iter() if _tag(e) in ("t", "text"))
                lines += [f"Comment: {e.text}" for e in said if e.text]
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            lines.append(slide.notes_slide.notes_text_frame.text)
        if text := "\n\n".join(line for line in lines if line.strip()):
            yield Section(text, title=title, unit="slide", name=str(number))


def _slide_text(root: Any) -> list[str]:
    """The paragraphs of a slide, chart or diagram; a table's row is one line, as are a chart's words."""
    lines: list[str] = []
    seen: set[Any] = set()

    def text(paragraph: Any) -> str:
        return "".join("\n" if _tag(e) == "br" else (e.text or "") for e in paragraph.iter() if _tag(e) in ("t", "br"))

    for element in root.iter():
        if element in seen:
            continue
        if _tag(element) == "Fallback":  # a picture of what the Choice beside it says
            seen.update(element.iter())
        elif _tag(element) == "tr":
            seen.update(element.iter())
            cells = [c for c in element if _tag(c) == "tc" and not {"hMerge", "vMerge"} & set(c.attrib)]
            lines.append(" | ".join(" ".join(text(p) for p in c.iter() if _tag(p) == "p") for c in cells))
        elif _tag(element) == "strCache":
            lines.append(" | ".join(e.text or "" for e in element.iter() if _tag(e) == "v"))
        elif _tag(element) == "p" and "drawingml" in element.tag:
            lines.append(text(element))
    return list(dict.fromkeys(lines)) if _tag(root) == "chartSpace" else lines


def _read_xlsx(path: Path, archive: _Archive) -> Iterator[Section | Skipped]:
    from openpyxl import load_workbook

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # openpyxl warns of what it does not keep: colours, validation
        book = load_workbook(path, read_only=True, data_only=True, keep_links=False)
        try:
            parts = {str(sheet.title): sheet._worksheet_path.lstrip("/") for sheet in book.worksheets}
            sheets = [
                (name, _sheet_rows(sheet), list(_sheet_remarks(archive, parts[name])))
                for name, sheet in zip(parts, book.worksheets, strict=True)
            ]
        finally:
            book.close()
    title = book.properties.title or ""
    for name, rows, remarks in sheets:
        if bare := sum(b't="str"' not in cell for cell in _NO_VALUE.findall(archive.read(parts[name]))):
            reason = "formulas have no value: open the file in a spreadsheet program and save it"
            yield Skipped(str(path), f'sheet "{name}": {bare:,} {reason}')
        yield from _sheet_sections(name, rows, title)
        known = {row: " | ".join(cells.values()) for row, cells in rows}
        lines = [f"{where}{text} ({known[row]})" if row in known else where + text for where, row, text in remarks]
        if lines:
            yield Section("\n".join(lines), title=title, headings=(name,), unit="sheet", name=f'"{name}" comments')


def _sheet_remarks(archive: _Archive, part: str) -> Iterator[tuple[str, int, str]]:
    """The comments of a sheet with their cells and rows, and its text boxes (row 0), none of which openpyxl streams."""
    folder, name = posixpath.split(part)
    relations = f"{folder}/_rels/{name}.rels"
    for relation in archive.xml(relations) if relations in archive.names else ():
        kind = relation.attrib.get("Type", "").rpartition("/")[2]
        target = posixpath.normpath(posixpath.join("/", folder, relation.attrib.get("Target", ""))).lstrip("/")
        if kind not in ("comments", "drawing") or target not in archive.names:
            continue
        root = archive.xml(target)
        for text in _slide_text(root) if kind == "drawing" else ():
            if text.strip():
                yield "", 0, text
        for comment in (e for e in root.iter() if _tag(e) == "comment"):
            cell, text = comment.attrib.get("ref", ""), "".join(e.text or "" for e in comment.iter() if _tag(e) == "t")
            yield f"{cell}: ", int(re.sub(r"\D", "", cell) or 0), " ".join(text.split())


def _sheet_rows(sheet: Any) -> list[tuple[int, dict[int, str]]]:
    """The rows that hold anything with their numbers, each with its cells' texts by column."""
    sheet.reset_dimensions()  # what a writer says of a sheet's size may be wrong
    rows = []
    for cells in sheet.iter_rows():
        texts = {cell.column: text for cell in cells if cell.value is not None and (text := _cell_text(cell))}
        if texts:
            rows.append((next(cell.row for cell in cells if cell.value is not None), texts))
    return rows


def _sheet_sections(name: str, rows: list[tuple[int, dict[int, str]]], title: str) -> Iterator[Section]:
    at = next((at for at, (_, cells) in enumerate(rows) if len(cells) > 1), len(rows))
    header = rows[at][1] if at + 1 < len(rows) else {}
    body = rows[:at] + rows[at + 1 :] if header else rows  # what stands above the columns' names is a title or a note
    for begin in range(0, len(body), _SHEET_ROWS):
        some = body[begin : begin + _SHEET_ROWS]
        lines = [
            " | ".join(f"{header[c]}: {v}" if c in header and len(cells) > 1 else v for c, v in cells.items())
            for _, cells in some
        ]
        first, last = some[0][0], some[-1][0]
        where = f"row {first}" if first == last else f"rows {first}-{last}"
        yield Section("\n".join(lines), title=title, headings=(name,), unit="sheet", name=f'"{name}" {where}')


def _cell_text(cell: Any) -> str:
    """A cell as it is shown, dates in ISO 8601."""
    value = cell.value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime):
        midnight = value.time() == datetime.min.time()
        return value.date().isoformat() if midnight else value.isoformat(" ", "auto").removesuffix(":00")
    if isinstance(value, time):
        return value.isoformat("auto").removesuffix(":00")
    if isinstance(value, int | float):
        return _number_text(value, cell.number_format or "General")
    return " ".join(str(value).split())


def _number_text(value: float, number_format: str) -> str:
    """A number as a format such as ``0.00%``, ``#,##0.00 "EUR"`` or ``00000`` shows it."""
    pattern = re.sub(r"\[\$([^\]-]*)[^\]]*\]|\[[^\]]*\]|[_*].|[\"\\]", r"\1", number_format.partition(";")[0])
    digits = re.search(r"[#0?][#0?,]*(\.[0#?]*)?", pattern)
    if digits is None or re.search(r"E[+-]|/", pattern) or not math.isfinite(value):
        return f"{value:.15g}"
    whole, _, decimals = digits[0].partition(".")
    scaled = abs(value) * (100 if "%" in pattern else 1)
    text = f"{scaled:{',' if ',' in whole else ''}.{len(decimals)}f}"
    if decimals.endswith(("#", "?")):
        text = text.rstrip("0").rstrip(".")
    if "," not in whole and (missing := whole.count("0") - len(text.partition(".")[0])) > 0:
        text = "0" * missing + text
    return f"{'-' if value < 0 else ''}{pattern[: digits.start()]}{text}{pattern[digits.end() :]}".strip()


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
    lines += dict.fromkeys(_odt_notes(archive, body) if body is not None else ())
    headings = []
    yield from section()


def _odt_notes(archive: _Archive, body: ElementTree.Element) -> Iterator[str]:
    """The comments, and what every page has above and below its text."""
    for comment in (e for e in body.iter() if _tag(e) == "annotation"):
        writer = next((e.text for e in comment if _tag(e) == "creator"), None) or "unknown"
        yield f"Comment by {writer}: " + "\n".join(_odt_text(e) for e in _odt_blocks(comment))
    for part in archive.xml("styles.xml").iter() if "styles.xml" in archive.names else ():
        text = "\n".join(map(_odt_text, _odt_blocks(part))) if _tag(part).startswith(("header", "footer")) else ""
        if re.search(r"[^\W\d]", text):  # a number alone is the page's
            yield text


def _odt_blocks(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Paragraphs, headings and table rows in their order, without what was deleted."""
    for child in element:
        if _tag(child) in ("tracked-changes", "sequence-decls", "forms", "annotation"):
            continue
        if _tag(child) in ("p", "h", "table-row"):
            yield child
        else:
            yield from _odt_blocks(child)


_ODT_INLINE = ("span", "a", "meta", "ruby", "ruby-base", "annotation")


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
        elif tag == "note":
            notes = [_odt_text(b) for body in child if _tag(body) == "note-body" for b in _odt_blocks(body)]
            parts.append(f" [{' '.join(notes)}]")
        elif tag not in _ODT_INLINE and next(_odt_blocks(child), None) is not None:
            parts.append("\n" + "\n".join(_odt_text(b) for b in _odt_blocks(child)) + "\n")
        elif tag not in ("annotation", "ruby-text"):
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
            texts += map(_output_text, cell.get("outputs") or ())
            if text := "\n\n".join(t for t in texts if t.strip()):
                yield Section(text, unit="cell", name=str(number))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot be read as a notebook ({named(error)}): restore the file") from error


def _output_text(output: Any) -> str:
    """The text that a cell's output shows."""
    if output.get("output_type") in ("error", "pyerr"):
        return f"{output.get('ename')}: {output.get('evalue')}"
    data = output.get("data") or output
    plain = _joined(data.get("text/markdown") or data.get("text/plain") or output.get("text"))
    if "text/html" in data and (not plain.strip() or plain.startswith("<IPython.")):
        return "\n\n".join(section.text for section in sections_of_html(_joined(data["text/html"]).encode()))
    return plain


def _joined(lines: Any) -> str:
    text = "".join(lines) if isinstance(lines, list) else str(lines or "")
    return text.encode("utf-8", "replace").decode()


def read_mail(path: Path) -> Iterator[Section | Skipped]:
    """One section: who wrote to whom and when, and the text; attachments are named."""
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    try:
        subject = str(message.get("subject", ""))
        lines = _mail_head(message)
        text = "\n\n".join(_mail_texts(message))
        attached = [name for part in message.walk() if (name := part.get_filename())]
    except Exception as error:
        raise ValueError(f"cannot be read as mail ({named(error)}): restore the file") from error
    if not lines:
        raise ValueError("not mail: it says neither from whom, nor to whom, nor when")
    whole = (
        "\n".join(lines) + "\n\n" + text.replace("\r\n", "\n").strip() + "".join(f"\nAttached: {a}" for a in attached)
    )
    yield Section(whole.strip().encode("utf-8", "replace").decode(), title=subject)


def _mail_head(message: Any) -> list[str]:
    return [f"{name}: {message[name]}" for name in ("From", "To", "Cc", "Date", "Subject") if message.get(name)]


def _mail_texts(part: Any) -> Iterator[str]:
    """The texts of a message or of one of its parts, forwarded messages with their heads; of alternatives the first."""
    kind = part.get_content_type()
    if kind == "multipart/alternative":
        texts = ("\n\n".join(_mail_texts(inner)) for inner in part.iter_parts())
        yield next((text for text in texts if text.strip()), "")
    elif kind == "message/rfc822":
        yield "\n".join(_mail_head(part.get_content()))
        yield from _mail_texts(part.get_content())
    elif part.is_multipart():
        for inner in part.iter_parts():
            yield from _mail_texts(inner)
    elif kind.startswith("text/") and not part.get_filename():
        text = _mail_text(part)
        html = (
            (section.text for section in sections_of_html(text.encode("utf-8", "replace"), title=""))
            if kind == "text/html"
            else ()
        )
        yield "\n\n".join(html) if kind == "text/html" else text.strip()


def _mail_text(part: Any) -> str:
    """A part's text in the encoding that it names, or what it may be."""
    raw = part.get_payload(decode=True) or b""
    for encoding in (part.get_content_charset("utf-8"), "utf-8"):
        with contextlib.suppress(LookupError, UnicodeDecodeError):
            return str(raw.decode(encoding))
    return str(raw.decode("cp1252", "replace"))


READERS: dict[str, Callable[[Path], Iterator[Section | Skipped]]] = {
    ".pptx": _reader("slides", _read_pptx),
    ".pptm": _reader("slides", _read_pptx),
    ".xlsx": _reader("a sheet", _read_xlsx),
    ".xlsm": _reader("a sheet", _read_xlsx),
    ".odt": _reader("OpenDocument", _read_odt),
    ".epub": _reader("an e-book", _read_epub),
    ".ipynb": read_notebook,
    ".eml": read_mail,
    ".rtf": read_rtf,
}
"""The reader of each suffix."""
