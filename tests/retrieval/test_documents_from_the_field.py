"""Documents as people have them: no text is lost, none is added, and every passage has its place."""

# ruff: noqa: E501  # XML is easier to read in one piece

from __future__ import annotations

import io
import json
import zipfile
from datetime import date, datetime, time
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import docx
import fpdf
import openpyxl
import pptx
import pypdf
import pytest
from docx.enum.style import WD_STYLE_TYPE
from docx.opc.packuri import PackURI
from docx.opc.part import Part
from docx.oxml import parse_xml
from openpyxl.comments import Comment
from PIL import Image
from pptx.chart.data import CategoryChartData
from pptx.enum.chart import XL_CHART_TYPE

from gemify.retrieval.documents import Section, Skipped
from gemify.retrieval.lance import connect, text_index, text_query
from gemify.retrieval.loaders import Columns, find_files, read_file

M = 'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def read(path: Path) -> list[Section]:
    return [s for s in read_file(path, Columns()) if isinstance(s, Section)]


def text_of(path: Path) -> str:
    return "\n".join(section.text for section in read(path))


def word(path: Path, *elements: str) -> Path:
    document = docx.Document()
    document.add_paragraph("Before.")
    for element in elements:
        document.element.body.insert(-1, parse_xml(element))
    document.save(str(path))
    return path


@pytest.mark.parametrize(
    ("element", "seen", "unseen"),
    [
        (f"<w:sdt {W}><w:sdtContent><w:p><w:r><w:t>A cover.</w:t></w:r></w:p></w:sdtContent></w:sdt>", "A cover.", ""),
        (
            f"<w:p {W}><w:r><w:t>Name: </w:t></w:r><w:sdt><w:sdtContent><w:r><w:t>Ann</w:t></w:r></w:sdtContent></w:sdt>"
            "</w:p>",
            "Name: Ann",
            "",
        ),
        (
            f'<w:p {W}><w:r><w:t xml:space="preserve">The fee is </w:t></w:r><w:ins><w:r><w:t>20</w:t></w:r></w:ins>'
            '<w:del><w:r><w:delText>30</w:delText></w:r></w:del><w:r><w:t xml:space="preserve"> euros.</w:t></w:r></w:p>',
            "The fee is 20 euros.",
            "30",
        ),
        (
            f"<w:p {W}><w:moveFrom><w:r><w:t>old place</w:t></w:r></w:moveFrom><w:moveTo><w:r><w:t>new place</w:t></w:r>"
            "</w:moveTo></w:p>",
            "new place",
            "old place",
        ),
        (
            f"<w:p {W}><w:r><w:t>in sight</w:t></w:r><w:r><w:rPr><w:vanish/></w:rPr><w:t>gone</w:t></w:r></w:p>",
            "in sight",
            "gone",
        ),
        (
            f"<w:p {W} {M}><w:r><w:t>Energy </w:t></w:r><m:oMath><m:r><m:t>E=mc</m:t></m:r></m:oMath></w:p>",
            "Energy E=mc",
            "",
        ),
        (
            f"<w:p {W}><w:r><w:ruby><w:rt><w:r><w:t>かん</w:t></w:r></w:rt><w:rubyBase><w:r><w:t>漢字</w:t></w:r></w:rubyBase>"
            "</w:ruby></w:r></w:p>",
            "漢字",
            "かん",
        ),
        (
            f"<w:tbl {W}><w:tr><w:trPr><w:del/></w:trPr><w:tc><w:p><w:r><w:t>gone</w:t></w:r></w:p></w:tc></w:tr><w:tr><w:tc>"
            "<w:p><w:r><w:t>kept</w:t></w:r></w:p></w:tc></w:tr></w:tbl>",
            "kept",
            "gone",
        ),
        (
            f"<w:tbl {W}><w:tr><w:tc><w:p><w:r><w:t>outer</w:t></w:r></w:p><w:tbl><w:tr><w:tc><w:p><w:r><w:t>inner</w:t>"
            "</w:r></w:p></w:tc></w:tr></w:tbl><w:p/></w:tc><w:tc><w:p><w:r><w:t>right</w:t></w:r></w:p></w:tc></w:tr>"
            "</w:tbl>",
            "outer inner | right",
            "",
        ),
        (
            f"<w:p {W}><w:r><w:pict><v:textbox xmlns:v='urn:schemas-microsoft-com:vml'><w:txbxContent><w:p><w:r>"
            "<w:t>In a box.</w:t></w:r></w:p></w:txbxContent></v:textbox></w:pict></w:r></w:p>",
            "In a box.",
            "",
        ),
    ],
)
def test_word_loses_nothing(tmp_path: Path, element: str, seen: str, unseen: str) -> None:
    text = text_of(word(tmp_path / "a.docx", element))
    assert text.count(seen) == 1
    assert not unseen or unseen not in text


def test_words_headers_come_once_and_merged_cells_too(tmp_path: Path) -> None:
    document = docx.Document()
    table = document.add_table(2, 3)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "wide"
    table.cell(0, 2).merge(table.cell(1, 2)).text = "tall"
    for _ in range(2):
        document.add_section().header.is_linked_to_previous = True
    first = document.sections[0]
    first.different_first_page_header_footer = document.settings.odd_and_even_pages_header_footer = True
    first.header.paragraphs[0].text = "Letterhead"
    first.first_page_footer.paragraphs[0].text, first.even_page_header.paragraphs[0].text = "Imprint", "Even"
    document.styles.add_style("Mine", WD_STYLE_TYPE.PARAGRAPH).base_style = document.styles["Heading 2"]
    document.add_paragraph("A heading", style="Mine")
    document.save(str(tmp_path / "a.docx"))
    text = text_of(tmp_path / "a.docx")
    assert [text.count(word) for word in ("wide", "tall", "Letterhead", "Imprint", "Even")] == [1] * 5
    assert read(tmp_path / "a.docx")[-1].headings == ("A heading",)


def test_html_rows_are_lines_and_hidden_text_is_left_out(tmp_path: Path) -> None:
    rows = "".join(f"<tr><td>a{i}</td><td><b>b{i}</b> x</td><th>c{i}</th></tr>" for i in range(3))
    page = (
        f"<table>{rows}</table><p style='DISPLAY : none'>gone</p><p hidden>gone</p><div style='visibility:hidden'>gone"
        "<p>gone</p></div><p style='color:red'>seen</p><table><tr><td><h2>Layout</h2><p>one</p></td><td>two</td></tr>"
        "</table>"
    )
    (tmp_path / "a.html").write_text(page)
    text = text_of(tmp_path / "a.html")
    assert "a0 | b0 x | c0\na1" in text or "a0 | b0 x | c0\n\na1" in text
    assert "gone" not in text
    assert "seen" in text
    assert [s.headings for s in read(tmp_path / "a.html")] == [(), ("Layout",)]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<table><tr><td>a<td>b<tr><td>c<td>d</table>", "a | b\n\nc | d"),
        ("<p hidden>gone<p>seen", "seen"),
        ("<p style='display:none'>gone<h2>seen</h2>", "seen"),
        ("<li hidden>gone<li>seen", "seen"),
        ("<dl><dt>a<dd>b<dt>c<dd>d</dl>", "a\n\nb\n\nc\n\nd"),
        ("<select><option>a<option>b</select><textarea>c</textarea>d", "a\n\nb\n\nc\n\nd"),
        ("<p>Donau&shy;dampf\u00adschiff", "Donaudampfschiff"),
        ("<dialog>gone</dialog><dialog open>a</dialog>b", "a\n\nb"),
        ("<div>" * 2000 + "a" + "</div>" * 2000 + "<p>b", "a\n\nb"),
    ],
)
def test_html_whose_end_tags_are_left_out(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "a.html").write_text(page)
    assert text_of(tmp_path / "a.html") == text


PAGE = """<html><body><a href="#main" class="skip-link">Skip it</a><header><h1>Owls</h1><nav><ul><li>Home</ul></nav>
</header><div id="cookieBanner">We use cookies. Accept</div><aside>Related birds</aside>{}<div role="contentinfo">Imprint
</div><footer>All rights reserved</footer></body></html>"""


@pytest.mark.parametrize(
    ("page", "left"),
    [
        (
            PAGE.format("<main><nav>On this page</nav><p>They hunt.<aside>A note.</aside></main>"),
            "On this page They hunt. A note.",
        ),
        (PAGE.format("<p>They hunt.</p>"), "Related birds They hunt."),
        (PAGE.format("<table><tr><td>a<td>b</table>"), "Related birds a | b"),
        (
            PAGE.format("<section><p>They hunt.</p><footer>By Ann.</footer></section>"),
            "Related birds They hunt. By Ann.",
        ),
        (PAGE.format("<main><section id='cookies'>Cookies of the oven.</section></main>"), "Cookies of the oven."),
    ],
)
def test_what_stands_around_a_page_is_left_out(tmp_path: Path, page: str, left: str) -> None:
    (tmp_path / "a.html").write_text(page)
    assert " ".join(text_of(tmp_path / "a.html").split()) == f"Owls {left}"


@pytest.mark.parametrize(
    "page", ["<nav>Owls</nav>", "<footer>Owls</footer><nav></nav>", "<div class='cookie-notice'>Owls</div>"]
)
def test_a_page_of_nothing_else_is_read(tmp_path: Path, page: str) -> None:
    (tmp_path / "a.html").write_text(page)
    assert text_of(tmp_path / "a.html") == "Owls"


@pytest.mark.parametrize("end", ["---", "..."])
def test_front_matter_is_no_heading(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.md").write_text(
        f"---\ntitle: Owls\ndate: 2026-01-02\ntags: [birds, night]\n{end}\nThey hunt.\n\n# Food\n\nMice.\n"
    )
    first, second, third = read(tmp_path / "a.md")
    assert {s.title for s in (first, second, third)} == {"Owls"}
    assert first.text == "date: 2026-01-02\ntags: birds, night"
    assert "They hunt." in second.text
    assert "title" not in second.text
    assert (second.headings, third.headings) == ((), ("Food",))
    at = second.text.index("They")
    assert second.location(at, at + 5) == "line 6"


def test_front_matter_in_toml_and_with_nested_keys(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text('+++\ntitle = "Owls"\ntags = ["birds", "night"]\n+++\nThey hunt.\n')
    assert [(s.title, s.text.strip()) for s in read(tmp_path / "a.md")] == [
        ("Owls", "tags: birds, night"),
        ("Owls", "They hunt."),
    ]
    (tmp_path / "b.md").write_text("---\nauthors:\n  - {name: Ann, place: Žilina}\n---\nThey hunt.\n")
    assert read(tmp_path / "b.md")[0].text == "authors: name: Ann, place: Žilina"


@pytest.mark.parametrize("text", ["---\nno: [yaml\n---\nbody\n", "---\njust words\n---\nbody\n", "---\nnever ends\n"])
def test_what_is_no_front_matter_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.md").write_text(text)
    assert text.split()[1] in text_of(tmp_path / "a.md")


def test_slides_have_their_numbers_tables_groups_charts_and_notes(tmp_path: Path) -> None:
    deck = pptx.Presentation()
    deck.core_properties.title = "Owls"
    first = deck.slides.add_slide(deck.slide_layouts[1])
    first.shapes.title.text, first.placeholders[1].text = "Food", "Mice\nBeetles\vand moths"
    first.shapes.add_group_shape().shapes.add_textbox(0, 0, 9, 9).text_frame.text = "in a group"
    table = first.shapes.add_table(2, 3, 0, 0, 9, 9).table
    table.cell(0, 0).merge(table.cell(0, 1))
    for (row, column), text in {(0, 0): "wide", (0, 2): "c", (1, 0): "x", (1, 1): "y", (1, 2): "z"}.items():
        table.cell(row, column).text = text
    first.notes_slide.notes_text_frame.text = "Say it."
    second = deck.slides.add_slide(deck.slide_layouts[6])
    data = CategoryChartData()
    data.categories = ["East", "West"]
    data.add_series("Sales", (1, 2))
    chart = second.shapes.add_chart(XL_CHART_TYPE.PIE, 0, 0, 9, 9, data).chart
    chart.has_title, chart.chart_title.text_frame.text = True, "A chart"
    deck.save(str(tmp_path / "a.pptx"))
    one, two = read(tmp_path / "a.pptx")
    assert one.text.split("\n\n") == [
        "Food",
        "Mice",
        "Beetles\nand moths",
        "in a group",
        "wide | c",
        "x | y | z",
        "Say it.",
    ]
    assert (one.location(0, 1), two.location(0, 1), one.title) == ("slide 1", "slide 2", "Owls")
    assert two.text.split("\n\n") == ["A chart", "Sales", "East | West"]


def test_a_sheets_rows_have_their_columns_names(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "2026"
    sheet.append([])
    sheet.append(["Name", "Count"])
    for number in range(3, 40):
        sheet.append(["owl" if number % 2 == 0 else "lark", number])
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    first, second = read(tmp_path / "a.xlsx")
    assert first.text.splitlines()[:2] == ["Name: lark | Count: 3", "Name: owl | Count: 4"]
    assert first.location(0, 1) == 'sheet "2026" rows 3-27'
    assert second.location(0, 1) == 'sheet "2026" rows 28-39'


def test_formulas_that_nothing_has_calculated_are_named(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["Fee", "Sum"], [20, "=A2*2"], [30, "=A3*2"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    skipped, section = read_file(tmp_path / "a.xlsx", Columns())
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith('sheet "Sheet": 2 formulas have no value')
    assert isinstance(section, Section)


@pytest.mark.parametrize(
    ("name", "table", "lines", "place"),
    [
        ("a.csv", "Name,Count\nlark,3\nowl,4\n", ["Name: lark | Count: 3", "Name: owl | Count: 4"], "rows 1-2"),
        ("b.csv", "Name;Price\nlark;3,50\n", ["Name: lark | Price: 3,50"], "row 1"),
        ("c.tsv", "Name\tCount\nlark\t\n", ["Name: lark"], "row 1"),
        ("d.csv", 'Name,Note\nlark,"two\nlines"\n', ["Name: lark | Note: two lines"], "row 1"),
        (
            "e.csv",
            "Name,Note\nlark,a\nowl,b,c\nwren,d\n",
            ["Name: lark | Note: a", "owl,b,c", "Name: wren | Note: d"],
            "rows 1-3",
        ),
        ("f.csv", "1,2\n3,4\n", ["1,2", "3,4"], "lines 1-2"),
        ("g.csv", "a,a\n3,4\n", ["a,a", "3,4"], "lines 1-2"),
        ("h.csv", "owls\nlarks\n", ["owls", "larks"], "lines 1-2"),
    ],
)
def test_a_tables_rows_have_their_columns_names(
    tmp_path: Path, name: str, table: str, lines: list[str], place: str
) -> None:
    (tmp_path / name).write_text(table)
    (section,) = read(tmp_path / name)
    assert section.text.splitlines() == lines
    assert section.location(0, len(section.text.rstrip())) == place


def test_a_long_table_is_read_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Name,Count\n" + "".join(f"lark,{n}\n" for n in range(1, 61)))
    parts = read(tmp_path / "a.csv")
    assert [part.location(0, len(part.text)) for part in parts] == ["rows 1-25", "rows 26-50", "rows 51-60"]
    assert parts[1].text.startswith("Name: lark | Count: 26\n")


@pytest.mark.parametrize(
    ("name", "raw", "error"),
    [
        ("a.txt", "Käuze".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("a.md", "猫头鹰".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("b.txt", "owls\nKäuze".encode("cp1252"), "line 2 is not UTF-8 text: .* iconv -f cp1252 -t utf-8"),
        ("c.txt", b"a\r\nb\rc\n", ""),
    ],
)
def test_encodings_and_line_ends(tmp_path: Path, name: str, raw: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(raw)
    if error:
        with pytest.raises(ValueError, match=error):
            read(tmp_path / name)
    else:
        assert text_of(tmp_path / name) == "a\nb\nc\n"


def test_what_stands_above_the_columns_names_is_no_name(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet["A1"] = "Owls of 2026"
    sheet.merge_cells("A1:C1")
    sheet.append(["Name", "Count"])
    sheet.append(["lark", 3])
    sheet.append(["A note below."])
    book.save(tmp_path / "a.xlsx")
    assert text_of(tmp_path / "a.xlsx").splitlines() == ["Owls of 2026", "Name: lark | Count: 3", "A note below."]


@pytest.mark.parametrize(
    ("value", "number_format", "text"),
    [
        (datetime(2026, 3, 1), None, "2026-03-01"),
        (date(2026, 3, 1), "d-mmm-yy", "2026-03-01"),
        (datetime(2026, 3, 1, 14, 30), None, "2026-03-01 14:30"),
        (time(9, 5), None, "09:05"),
        (0.125, "0.0%", "12.5%"),
        (0.5, "0%", "50%"),
        (1234.5, '#,##0.00 "EUR"', "1,234.50 EUR"),
        (-1234.5, "[$€-407]#,##0.00;[Red]-#,##0.00", "-€1,234.50"),
        (1234, "00000", "01234"),
        (2.5, "0.###", "2.5"),
        (0.1 + 0.2, None, "0.3"),
        (3.0, None, "3"),
        (1500000, "0.00E+00", "1500000"),
        (True, None, "TRUE"),
        ("two\nlines", None, "two lines"),
    ],
)
def test_cells_read_as_they_are_shown(tmp_path: Path, value: Any, number_format: str | None, text: str) -> None:
    book = openpyxl.Workbook()
    book.active["A1"] = value
    if number_format is not None:
        book.active["A1"].number_format = number_format
    book.save(tmp_path / "a.xlsx")
    assert text_of(tmp_path / "a.xlsx") == text


@pytest.mark.parametrize(
    ("page", "fonts", "word"),
    [
        (932, "", "日本語の表示"),
        (936, "", "猫头鹰"),
        (949, "", "도서관"),
        (950, "", "功許蓋"),
        (1252, r"{\fonttbl{\f0\fcharset128 MS Mincho;}}\f0", "日本語の表示"),
        (1252, r"{\fonttbl{\f0 Arial;}{\f3\fcharset204 Arial;}}\f3 ", "Сова"),
        (1251, "", "Сова"),
        (1252, "", "Käuze"),
    ],
)
@pytest.mark.parametrize("escape", ["all", "high", "as Word does"])
def test_rtf_in_code_pages_of_one_and_two_bytes(tmp_path: Path, page: int, fonts: str, word: str, escape: str) -> None:
    """The second byte of a character may be an ASCII letter, a backslash or a brace."""
    encoding = "cp932" if "128" in fonts else "cp1251" if "204" in fonts else f"cp{page}"
    raw = b""
    for byte in word.encode(encoding):
        if byte >= 0x80 or escape == "all":
            raw += rf"\'{byte:02x}".encode()
        else:
            raw += (b"\\" if byte in b"\\{}" else b"") + bytes([byte])
    if escape == "as Word does":
        units = [int.from_bytes(c.encode("utf-16-le"), "little", signed=True) for c in word]
        shown = [c.encode(encoding) for c in word]
        raw = b"".join(
            rf"\uc{len(s)}\u{u}".encode() + "".join(rf"\'{b:02x}" for b in s).encode()
            for u, s in zip(units, shown, strict=True)
        )
    (tmp_path / "a.rtf").write_bytes(rf"{{\rtf1\ansi\ansicpg{page}{fonts} ".encode() + raw + rb"\par {\b end}}")
    assert text_of(tmp_path / "a.rtf").split() == [word, "end"]


def test_words_cut_at_line_ends_of_a_pdf_are_joined(tmp_path: Path) -> None:
    page = fpdf.FPDF()
    page.add_page()
    page.set_font("helvetica")
    lines = [
        "The exam-",
        "ple is well-known. A well-",
        "known owl. The Smith-",
        "Jones case, and 20-",
        "30 mice.",
    ]
    page.multi_cell(w=0, text="\n".join(lines))
    page.output(str(tmp_path / "a.pdf"))
    words = " ".join(text_of(tmp_path / "a.pdf").split())
    assert words == "The example is well-known. A well-known owl. The Smith- Jones case, and 20- 30 mice."


def test_filled_forms_of_a_pdf_are_text_and_scanned_pages_are_named(tmp_path: Path) -> None:
    made = fpdf.FPDF()
    made.set_font("helvetica")
    made.add_page()
    made.cell(text="A form.")
    for _ in range(2):
        made.add_page()
        made.image(Image.new("RGB", (9, 9)))
    made.add_page()  # a blank page is nothing to name
    made.output(str(tmp_path / "plain.pdf"))
    writer = pypdf.PdfWriter(tmp_path / "plain.pdf")
    text, name = pypdf.generic.TextStringObject, pypdf.generic.NameObject
    fields = [
        {"/Subtype": name("/Widget"), "/FT": name("/Tx"), "/T": text("city"), "/V": text("Žilina")},
        {"/Subtype": name("/Widget"), "/FT": name("/Btn"), "/T": text("agreed"), "/V": name("/Yes")},
        {"/Subtype": name("/Widget"), "/FT": name("/Btn"), "/T": text("declined"), "/V": name("/Off")},
        {"/Subtype": name("/FreeText"), "/Contents": text("typed over it")},
        {"/Subtype": name("/Highlight"), "/Contents": text("is it so?"), "/T": text("Ann")},
        {"/Subtype": name("/Link"), "/Contents": text("no text")},
    ]
    marks = [pypdf.generic.DictionaryObject({name(key): value for key, value in field.items()}) for field in fields]
    writer.pages[0][name("/Annots")] = pypdf.generic.ArrayObject([writer._add_object(mark) for mark in marks])
    writer.write(tmp_path / "a.pdf")
    named, found = sorted(read_file(tmp_path / "a.pdf", Columns()), key=lambda item: isinstance(item, Section))
    assert isinstance(named, Skipped)
    assert isinstance(found, Section)
    filled = ["A form.", "city: Žilina", "agreed: Yes", "typed over it", "Ann: is it so?", ""]
    assert found.text.split("\n")[:6] == filled
    assert found.location(0, 5) == "page 1"
    assert named.reason.startswith("pages 2, 3 hold an image without text (scanned?)")


def test_rtf_rows_are_lines_and_footnotes_are_text(tmp_path: Path) -> None:
    row = rb"\trowd {\pard\intbl a\par}\cell {\pard\intbl b\par}\cell \intbl\row"
    note = rb"{\super\chftn{\*\footnote\chftn\~{\*\bkmkstart x}A note.}}"
    (tmp_path / "a.rtf").write_bytes(rb"{\rtf1 Owls" + note + rb"\par " + row + row + rb"}")
    assert "A note." in text_of(tmp_path / "a.rtf")
    assert text_of(tmp_path / "a.rtf").splitlines()[-2:] == ["a | b", "a | b"]


def test_word_notes_and_comments_are_text(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_paragraph("Owls hunt.")
    notes = "".join(
        f"<w:{k}note w:id='1'><w:p><w:r><w:t>A {k}note.</w:t></w:r></w:p></w:{k}note>" for k in ("foot", "end")
    )
    line = "<w:footnote w:type='separator' w:id='0'><w:p><w:r><w:t>no text</w:t></w:r></w:p></w:footnote>"
    kinds = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/"
    paragraphs = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in ("Is that so?", "Source?"))
    comment = f"<w:comment w:id='3' w:author='Ann'>{paragraphs}</w:comment>"
    for kind, inner in {"footnotes": line + notes, "endnotes": line + notes, "comments": comment}.items():
        blob = f"<w:{kind} {W}>{inner}</w:{kind}>".encode()
        part = Part(PackURI(f"/word/{kind}.xml"), "application/xml", blob, document.part.package)
        document.part.relate_to(part, kinds + kind)
    document.save(str(tmp_path / "a.docx"))
    text = text_of(tmp_path / "a.docx")
    assert "A footnote." in text
    assert "A endnote." in text
    assert text.endswith("Comment by Ann: Is that so?\nSource?")
    assert "no text" not in text


def test_comments_are_text_with_their_place(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "2026"
    for row in (["Name", "Count"], ["lark", 3]):
        sheet.append(row)
    sheet["B2"].comment = Comment("Ann:\ncounted twice", "Ann")
    sheet["D9"].comment = Comment("an empty cell", "Ann")
    book.create_sheet("none").append(["x"])
    book.save(tmp_path / "a.xlsx")
    rows, remarks, _ = read(tmp_path / "a.xlsx")
    assert rows.text == "Name: lark | Count: 3"
    assert remarks.text == "B2: Ann: counted twice (lark | 3)\nD9: an empty cell"
    assert remarks.location(0, 1) == 'sheet "2026" comments'
    body = (
        '<o xmlns:t="urn:t" xmlns:d="urn:d"><body><t:p>Owls<t:annotation><d:creator>Ann</d:creator><t:p>So?</t:p>'
        "</t:annotation> hunt.</t:p></body></o>"
    )
    styles = '<o xmlns:s="urn:s" xmlns:t="urn:t">' + "<s:header><t:p>Letterhead</t:p></s:header>" * 2
    with zipfile.ZipFile(tmp_path / "a.odt", "w") as archive:
        archive.writestr("content.xml", body)
        archive.writestr("styles.xml", styles + "<s:footer><t:p>7</t:p></s:footer></o>")
    assert text_of(tmp_path / "a.odt").split("\n") == ["Owls hunt.", "Comment by Ann: So?", "", "Letterhead"]


def test_hidden_text_in_rtf_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.rtf").write_bytes(rb"{\rtf1 R2\_D2 {\v gone}{\v gone\v0  and} \v gone\plain  on\par}")
    assert text_of(tmp_path / "a.rtf").split() == ["R2-D2", "and", "on"]


def test_an_image_in_rtf_is_no_text(tmp_path: Path) -> None:
    raw = rb"{\rtf1 before {\pict\bin7 }{\'41\\ }after {\*\x gone}{\pict 00ff}\u8364\'80}"
    (tmp_path / "a.rtf").write_bytes(raw)
    assert text_of(tmp_path / "a.rtf") == "before after €"


@pytest.mark.parametrize("suffix", [".xlsx", ".pptx", ".docx", ".odt"])
def test_an_encrypted_office_file_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600))
    with pytest.raises(ValueError, match="encrypted or an old binary"):
        read(tmp_path / f"a{suffix}")


def test_open_document_text(tmp_path: Path) -> None:
    body = (
        '<o xmlns:t="urn:t"><body><t:tracked-changes><t:p>deleted</t:p></t:tracked-changes><t:h t:outline-level="1">Owls</t:h>'
        "<t:p>They<t:s t:c='2'/>hunt<t:span> at</t:span> night.</t:p><t:table><t:table-row><t:table-cell><t:p>a</t:p>"
        "</t:table-cell><t:table-cell><t:p>b</t:p></t:table-cell></t:table-row></t:table><t:list><t:list-item><t:p>item"
        "</t:p></t:list-item></t:list></body></o>"
    )
    with zipfile.ZipFile(tmp_path / "a.odt", "w") as archive:
        archive.writestr("content.xml", body)
    (section,) = read(tmp_path / "a.odt")
    assert section.text == "Owls\n\nThey  hunt at night.\n\na | b\n\nitem"
    assert section.headings == ("Owls",)


@pytest.mark.parametrize(
    ("paragraph", "text"),
    [
        (
            "Owls<t:note><t:note-citation>1</t:note-citation><t:note-body><t:p>So.</t:p></t:note-body></t:note> hunt.",
            "Owls [So.] hunt.",
        ),
        ("Owls<d:custom-shape><t:p>In a shape</t:p></d:custom-shape>hunt.", "Owls\nIn a shape\nhunt."),
        ("<t:ruby><t:ruby-base>漢字</t:ruby-base><t:ruby-text>かんじ</t:ruby-text></t:ruby>だ", "漢字だ"),
    ],
)
def test_what_stands_within_a_paragraph_of_open_document_text(tmp_path: Path, paragraph: str, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.odt", "w") as archive:
        archive.writestr("content.xml", f'<o xmlns:t="urn:t" xmlns:d="urn:d"><body><t:p>{paragraph}</t:p></body></o>')
    assert text_of(tmp_path / "a.odt") == text


def test_an_e_books_chapters_come_in_their_order(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as archive:
        archive.writestr("META-INF/container.xml", '<c><rootfile full-path="OPS/book.opf"/></c>')
        package = (
            '<package><title>Birds</title><item id="b" href="b%20c.xhtml"/><item id="a" href="a.xhtml"/>'
            '<itemref idref="b"/><itemref idref="a"/></package>'
        )
        archive.writestr("OPS/book.opf", package)
        archive.writestr("OPS/a.xhtml", "<html><body><h1>Larks</h1><p>They sing.</p></body></html>")
        archive.writestr("OPS/b c.xhtml", "<html><body><p>Owls hunt.</p></body></html>")
    first, second = read(tmp_path / "a.epub")
    assert (first.text, first.location(0, 1), first.title) == ("Owls hunt.", "chapter 1", "Birds")
    assert (second.headings, second.location(0, 1)) == (("Larks",), "chapter 2")


def test_notebooks_mail_and_rtf(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Owls\n", "hunt"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"text": ["1\n"]}, {"data": {"text/plain": "2"}}]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    first, second = read(tmp_path / "a.ipynb")
    assert (first.text, first.location(0, 1)) == ("# Owls\nhunt", "cell 1")
    assert second.text.split() == ["print(1)", "1", "2"]
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Ann <ann@a.example>", "b@b.example", "Owls für Bob"
    message.set_content("They hunt.\n")
    message.add_alternative("<p>They <b>hunt</b>.</p>", subtype="html")
    message.add_attachment(b"x", maintype="image", subtype="png", filename="owl.png")
    (tmp_path / "a.eml").write_bytes(bytes(message))
    (mail,) = read(tmp_path / "a.eml")
    assert mail.title == "Owls für Bob"
    assert all(part in mail.text for part in ("From: Ann <ann@a.example>", "They hunt.", "Attached: owl.png"))
    raw = rb"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Arial;}}{\*\generator X;}\pard Gr\'fc\'dfe \u8364?20, \{x\}\par Z\b eile\b0\par}"
    (tmp_path / "a.rtf").write_bytes(raw)
    assert text_of(tmp_path / "a.rtf").split() == ["Grüße", "€20,", "{x}", "Zeile"]


HEAD = b"From: ann@a.example\nSubject: x\nMIME-Version: 1.0\nContent-Type: "
PARTS = HEAD + b"multipart/%s; boundary=b\n\n--b\nContent-Type: text/plain\n\n%s\n--b\nContent-Type: %s\n\n%s\n--b--\n"
LATIN = b"<meta http-equiv='Content-Type' content='text/html; charset=windows-1252'>"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (HEAD + b"text/html; charset=utf-8\n\n" + LATIN + "Käuze".encode(), "Käuze"),
        (HEAD + b"text/plain; charset=x-unknown\n\nK\xe4uze", "Käuze"),
        (HEAD + b"text/plain\n\nK\xe4uze", "Käuze"),
        (PARTS % (b"alternative", b" ", b"text/html", b"<p>They hunt."), "They hunt."),
        (PARTS % (b"alternative", b"They hunt.", b"text/html", b"<p>gone"), "They hunt."),
        (
            PARTS % (b"mixed", b"See:", b"message/rfc822", b"From: bob@b.example\n\nThey hunt."),
            "See:\n\nFrom: bob@b.example\n\nThey hunt.",
        ),
        (PARTS % (b"mixed", b"One.", b"text/plain", b"Two."), "One.\n\nTwo."),
        (PARTS % (b"mixed", b"One.", b"text/plain; name=a.txt", b"gone"), "One.\nAttached: a.txt"),
    ],
)
def test_mail_as_programs_write_it(tmp_path: Path, raw: bytes, text: str) -> None:
    (tmp_path / "a.eml").write_bytes(raw)
    assert text_of(tmp_path / "a.eml") == f"From: ann@a.example\nSubject: x\n\n{text}"


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (
            {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero"},
            "ZeroDivisionError: division by zero",
        ),
        ({"data": {"text/html": ["<table><tr><td>a<td>b", "</table>"]}}, "a | b"),
        ({"data": {"text/html": "<b>a", "text/plain": "<IPython.core.display.HTML object>"}}, "a"),
        ({"data": {"text/markdown": "**a**", "text/plain": "<IPython.core.display.Markdown object>"}}, "**a**"),
        ({"data": {"text/html": "<b>gone", "text/plain": "a"}}, "a"),
    ],
)
def test_outputs_of_a_notebooks_cells(tmp_path: Path, output: dict[str, Any], text: str) -> None:
    cells = [{"source": "x", "outputs": [output]}, {"source": None, "outputs": None}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert text_of(tmp_path / "a.ipynb") == f"x\n\n{text}"


@pytest.mark.parametrize("suffix", [".pptx", ".xlsx", ".odt", ".epub", ".ipynb", ".eml", ".rtf", ".docx"])
@pytest.mark.parametrize("raw", [b"", b"PK\3\4", b"\0\1\2" * 50, b"{}", None])
def test_a_broken_file_is_one_line(tmp_path: Path, suffix: str, raw: bytes | None) -> None:
    path = tmp_path / f"a{suffix}"
    if raw is None:  # an archive of something else
        held = io.BytesIO()
        zipfile.ZipFile(held, "w").close()
        raw = held.getvalue()
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        list(read_file(path, Columns()))


def test_what_is_not_read_is_counted_and_may_be_excluded(tmp_path: Path) -> None:
    for name in (
        "a.md",
        "b.odp",
        "c.pages",
        "d.odp",
        "node_modules/x.md",
        "drafts/e.md",
        "build/f.md",
        "g.log",
        "keep/h.log",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / ".gitignore").write_text("# made\nbuild/\n/g.log\n")
    (tmp_path / "link").symlink_to(tmp_path / "drafts", target_is_directory=True)
    found = find_files([tmp_path], exclude=["drafts/*"])
    assert [p.relative_to(tmp_path).as_posix() for p in found.files] == ["a.md", "keep/h.log"]
    assert found.unread == {"excluded": 4, ".odp": 2, ".pages": 1, "linked directories": 1}


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ("*.log\n!keep.log", ["a.txt", "deep/b.txt", "deep/er/keep.log", "keep.log"]),
        ("!keep.log\n*.log", ["a.txt", "deep/b.txt"]),
        ("deep/*.log", ["a.log", "a.txt", "deep/b.txt", "deep/er/keep.log", "keep.log"]),
        ("deep/**/*.log", ["a.log", "a.txt", "deep/b.txt", "keep.log"]),
        ("**/er", ["a.log", "a.txt", "deep/b.log", "deep/b.txt", "keep.log"]),
        ("/*.log", ["a.txt", "deep/b.log", "deep/b.txt", "deep/er/keep.log"]),
        ("[ab].*", ["deep/er/keep.log", "keep.log"]),
        ("deep/er/", ["a.log", "a.txt", "deep/b.log", "deep/b.txt", "keep.log"]),
    ],
)
def test_gitignore_is_read_as_git_reads_it(tmp_path: Path, patterns: str, found: list[str]) -> None:
    for name in ("a.txt", "a.log", "keep.log", "deep/b.txt", "deep/b.log", "deep/er/keep.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / ".gitignore").write_text(patterns)
    assert [p.relative_to(tmp_path).as_posix() for p in find_files([tmp_path]).files] == found


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("昨天我去图书馆借了一本关于猫头鹰的书。", "图书馆"),
        ("昨日、図書館でフクロウの本を借りました。", "図書館"),
        ("เมื่อวานฉันไปห้องสมุดเพื่อยืมหนังสือ", "ห้องสมุด"),
        ("어제 도서관에서 책을 빌렸다.", "도서관에서"),
        ("ذهبت أمس إلى المكتبة", "المكتبة"),
        ("The Who played in Leeds.", "The Who"),
        ("Error E1234-X in version 2.0.1", "E1234"),
        ("commit 9f8e7d6c fixes it", "9f8e7d6c"),
    ],
)
def test_words_of_any_script_are_found(tmp_path: Path, text: str, query: str) -> None:
    table = connect(str(tmp_path)).create_table(
        "t", [{"words": t} for t in (text, "nothing of that", "owls hunt at night")]
    )
    table.create_index("words", config=text_index())
    found = table.search(text_query(query, ["words"]), query_type="fts").limit(1).to_list()
    assert [row["words"] for row in found] == [text]
