"""PDF files -> sections, by pypdf: the text, the words cut at line ends joined, filled forms, the pages' numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemify.retrieval.documents import Section, Skipped, named
from gemify.retrieval.ocr import recognize_page


def read_pdf(path: Path, *, ocr: bool = False) -> Iterator[Section | Skipped]:
    """One section: the pages one after another, so that a sentence may go on overleaf.

    Args:
        path: The file.
        ocr: Whether pages without text are recognized, which needs the extra ``ocr``.
    """
    pages, title = _open(path)
    text, starts, scanned = "", [], []
    for number, page in enumerate(pages, start=1):
        starts.append(len(text))
        try:
            found = _page_text(page)
            if not found.strip() and ocr:
                found = recognize_page(path, number)
            if not found.strip() and _holds_image(page):
                scanned.append(str(number))
            text += found + "\n"
        except Exception as error:
            yield Skipped(str(path), f"page {number} cannot be read ({named(error)}): restore the file")
    if not text.strip():
        advice = "OCR has found none either" if ocr else "index it with --ocr, which reads scanned pages"
        raise ValueError(f"a PDF without text: {advice}")
    if scanned:
        which = f"page {scanned[0]} holds" if len(scanned) == 1 else f"pages {', '.join(scanned)} hold"
        advice = "OCR has found none either" if ocr else "index the file with --ocr"
        yield Skipped(str(path), f"{which} an image without text (scanned?): {advice}")
    yield Section(text, title=title, unit="page", starts=tuple(starts))


def _open(path: Path) -> tuple[list[Any], str]:
    """The pages and the title. Raises ValueError for a file that is damaged or has a password."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity that it mends
    try:
        reader = pypdf.PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else list(reader.pages)
        title = reader.metadata.title if not locked and reader.metadata else None
    except OSError:
        raise
    except pypdf.errors.DependencyError as error:
        raise ValueError("an encrypted PDF: pip install cryptography, or remove the encryption") from error
    except Exception as error:
        raise ValueError(f"cannot be read as PDF ({named(error)}): restore the file") from error
    if locked:
        raise ValueError("an encrypted PDF: remove its password")
    return pages, title if isinstance(title, str) else ""


_REMARKS = ("/FreeText", "/Text", "/Highlight", "/Underline", "/StrikeOut", "/Caret")
"""Annotations that hold what somebody wrote."""
_LINE_END_HYPHEN = re.compile(r"(\w*[^\W\d_])([-\u2010\u00ad]) ?\n([^\W\d_]\w*)")


def _page_text(page: Any) -> str:
    """The text of a page, its words cut at line ends joined, and what was filled into its forms."""
    text = page.extract_text().replace("\0", "").encode("utf-8", "ignore").decode()

    def join(match: re.Match[str]) -> str:
        first, hyphen, rest = match.groups()
        if hyphen == "\u00ad" or (rest[0].islower() and f"{first}-{rest}".casefold() not in text.casefold()):
            return first + rest
        return f"{first}-{rest}" if rest[0].islower() else match[0]

    lines = [_LINE_END_HYPHEN.sub(join, text).replace("\u00ad", "")]
    for reference in page.get("/Annots") or ():
        mark = reference.get_object()
        field = mark["/Parent"].get_object() if "/Parent" in mark and "/T" not in mark else mark
        kind = mark.get("/Subtype")
        value = field.get("/V") if kind == "/Widget" else mark.get("/Contents")
        if kind in ("/Widget", *_REMARKS) and isinstance(value, str) and value not in ("", "/Off"):
            name = str(field.get("/TU") or field.get("/T") or "")
            lines.append(": ".join(filter(None, (name, value.removeprefix("/").replace("\r", "\n")))))
    return "\n".join(lines).encode("utf-8", "ignore").decode()


def _holds_image(page: Any) -> bool:
    resources = page.get("/Resources")
    parts = resources.get_object().get("/XObject") if resources is not None else None
    return parts is not None and any(p.get_object().get("/Subtype") == "/Image" for p in parts.get_object().values())
