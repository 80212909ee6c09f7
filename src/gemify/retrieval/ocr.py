"""Text recognition (OCR) on pages of PDF files: pypdfium2 renders them, RapidOCR reads them, on this machine alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

_DPI = 200
_MAX_SIDE_PIXELS = 4_000
"""Of a rendered page: a poster must not fill the memory."""


def require_ocr() -> None:
    """Raise ModuleNotFoundError if the extra ``ocr`` is not installed."""
    import onnxruntime  # noqa: F401
    import pypdfium2  # noqa: F401
    import rapidocr  # noqa: F401


@functools.cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "error"})


def recognize_page(path: Path, number: int) -> str:
    """Return the text that a page shows, a line of the page a line; "" if it shows none.

    Args:
        path: A PDF file.
        number: The page, from 1.
    """
    import pypdfium2

    with pypdfium2.PdfDocument(path) as document:
        page = document[number - 1]
        scale = min(_DPI / 72, _MAX_SIDE_PIXELS / max(page.get_size()))
        image_HWC = page.render(scale=scale).to_numpy()
    if image_HWC.min() == image_HWC.max():
        return ""
    found = _engine()(image_HWC)
    lines = found.to_markdown().splitlines() if found.txts else []
    return "\n".join(" ".join(line.split()) for line in lines).strip()
