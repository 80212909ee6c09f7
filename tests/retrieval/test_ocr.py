"""Scanned pages of PDF files: recognized where the user asks for it, and never lost again by a plain run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import fpdf
import pypdf
import pytest
from PIL import Image, ImageDraw, ImageFont

from bag_of_words import BagOfWords
from gemify.io.extras import describe_missing
from gemify.retrieval.documents import Section, Skipped
from gemify.retrieval.index import GemIndex
from gemify.retrieval.loaders import Columns, read_file

PACKAGES = ("rapidocr", "onnxruntime", "pypdfium2")
needs_ocr = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs the extra ocr (290 MB, not in `make setup`)",
)


def scan(text: str) -> Image.Image:
    image = Image.new("L", (1000, 700), "white")
    ImageDraw.Draw(image).text((80, 80), text, fill="black", font=ImageFont.load_default(36), spacing=20)
    return image


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A page of text, a scan, a blank page, a scan that the page turns round, and a scan of nothing."""
    (tmp_path / "docs").mkdir()
    made = fpdf.FPDF()
    made.set_font("helvetica")
    made.add_page()
    made.cell(text="The first page is text.")
    for image in (
        scan("The fee is 20 euros.\nOwls hunt mice at night."),
        None,
        scan("Tides follow the moon.").rotate(180),
        scan(""),
    ):
        made.add_page()
        if image is not None:
            made.image(image, w=180)
    made.output(str(tmp_path / "plain.pdf"))
    writer = pypdf.PdfWriter(tmp_path / "plain.pdf")
    writer.pages[3].rotate(180)
    writer.write(tmp_path / "docs" / "a.pdf")
    return tmp_path / "docs" / "a.pdf"


@needs_ocr
def test_scanned_pages_are_text_with_their_numbers(mixed: Path) -> None:
    skipped, section = sorted(read_file(mixed, Columns(), ocr=True), key=lambda item: isinstance(item, Section))
    assert isinstance(skipped, Skipped)
    assert isinstance(section, Section)
    assert skipped.reason == "page 5 holds an image without text (scanned?): OCR has found none either"
    for words, place in {"first page": "page 1", "Owls hunt mice": "page 2", "Tides follow": "page 4"}.items():
        at = section.text.index(words)
        assert section.location(at, at + len(words)) == place
    assert "The fee is 20 euros.\nOwls hunt mice at night." in section.text


@needs_ocr
def test_what_was_recognized_stays(mixed: Path, tmp_path: Path, bag: BagOfWords) -> None:
    index = GemIndex.open(tmp_path / "store", bag)
    assert "index the file with --ocr" in index.add(mixed.parent).skipped[0].reason
    assert index.add(mixed.parent, ocr=True).changed == (str(mixed),)
    for again in ({"ocr": True}, {}):
        assert index.add(mixed.parent, **again).unchanged == 1
    mixed.rename(mixed.with_name("b.pdf"))
    assert index.add(mixed.parent).moved == (str(mixed.with_name("b.pdf")),)
    assert index.add(mixed.parent, ocr=True).unchanged == 1
    assert index.search("owls", mode="fts")[0].location == "pages 1-4"


def test_without_the_extra_one_line_names_it(
    mixed: Path, tmp_path: Path, bag: BagOfWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        GemIndex.open(tmp_path / "store", bag).add(mixed, ocr=True)
    assert describe_missing(caught.value) == "onnxruntime is not installed: pip install 'gemify[ocr]'"
