"""200 files by the programs that people write with, indexed in one run: no sentence of them is lost.

Needs LibreOffice (soffice), pandoc and Chromium. The oracles: the sentences that each file was made of, and what
pandoc or LibreOffice themselves read in it. `make documents` runs it.
"""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import docx
import fpdf
import openpyxl
import pptx
import pytest

from bag_of_words import BagOfWords
from gemify.retrieval.index import GemIndex

PROGRAMS = {name: shutil.which(name) for name in ("soffice", "pandoc", "chromium")}
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not all(PROGRAMS.values()), reason="needs soffice, pandoc and chromium"),
]
WORDS = """
    owl hunts mice river carries sand letter museum opens noon copper heat Käuze jagen nachts naïve façade Ελλάδα Москва
    стоит Žluťoučký kůň fee 20 euros 3.5 percent R2-D2 e-mail don’t “quoted” x² ½ → ≥ 図書館 猫头鹰 도서관
""".split()  # noqa: SIM905
PRINTED = WORDS[:-3]
"""Those that the fonts of a bare machine have."""
EACH = 10


class Writer:
    """Makes sentences that no other file has, and notes to which file each belongs."""

    def __init__(self, seed: int, words: list[str] = WORDS) -> None:
        self.rng, self.count, self.said, self.words = Random(seed), itertools.count(), list[str](), words

    def __call__(self, words: int = 9) -> str:
        made = f"{' '.join(self.rng.choices(self.words, k=words))} number {next(self.count)}"
        self.said.append(made)
        return made[0].upper() + made[1:] + "."

    def markdown(self) -> str:
        """All that Markdown has: headings, lists, a table, a quotation, code, a footnote, a definition."""
        return "\n\n".join(
            [
                f"# {self(4)}",
                f"{self()} {self()} It has a **bold {self(3)}** word.[^1]",
                f"- {self()}\n- {self()}\n    - {self()}\n",
                f"## {self(4)}",
                f"1. {self()}\n2. {self()}\n",
                f"| {self(2)} | {self(2)} |\n|---|---|\n| {self(3)} | {self(3)} |\n| {self(3)} | {self(3)} |\n",
                f"> {self()}",
                f"```\n{self(4)}\n```",
                f"[{self(3)}](https://example.org)",
                f"[^1]: {self()}",
            ]
        )


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


def office(target: str, directory: Path, paths: list[Path], *options: str) -> list[Path]:
    """Files as LibreOffice writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    profile = f"-env:UserInstallation=file://{directory.parent}/profile"
    run(PROGRAMS["soffice"], profile, "--headless", "--convert-to", target, "--outdir", directory, *options, *paths)
    return [directory / f"{path.stem}.{target.partition(':')[0]}" for path in paths]


def by_pandoc(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for at, kind in itertools.product(range(EACH), ("docx", "odt", "epub", "rtf", "html", "pptx", "ipynb")):
        writer, path = Writer(at), root / f"pandoc-{at}.{kind}"
        path.with_suffix(".txt").write_text(writer.markdown())
        run(PROGRAMS["pandoc"], "-f", "markdown", "-s", path.with_suffix(".txt"), "-o", path)
        path.with_suffix(".txt").unlink()
        yield path, writer.said


def by_office(root: Path) -> Iterator[tuple[Path, list[str]]]:
    said, made, tables = {}, [], []
    for at in range(EACH):
        writer, path = Writer(100 + at, PRINTED), root.parent / "drafts" / f"office-{at}.docx"
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".txt").write_text(writer.markdown())
        run(PROGRAMS["pandoc"], "-f", "markdown", path.with_suffix(".txt"), "-o", path)
        made.append(path)
        said[path.stem] = writer.said
        writer = Writer(200 + at)
        rows = [[f"{writer(2)}" for _ in range(4)] for _ in range(12)]
        table = path.with_name(f"table-{at}.csv")
        with table.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        tables.append(table)
        said[table.stem] = writer.said
    for kind in ("odt", "docx:MS Word 2007 XML", "rtf", "pdf"):
        for path in office(kind, root, made):
            yield path, said[path.stem]
    for path in office("xlsx", root, tables, "--infilter=Text - txt - csv (StarCalc):44,34,76"):
        yield path, said[path.stem]


def by_libraries(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for at in range(EACH * 2):
        yield root / f"word-{at}.docx", word(root / f"word-{at}.docx", Writer(300 + at))
        yield root / f"deck-{at}.pptx", deck(root / f"deck-{at}.pptx", Writer(400 + at))
        yield root / f"book-{at}.xlsx", book(root / f"book-{at}.xlsx", Writer(500 + at))
    for at in range(EACH):
        yield root / f"sheet-{at}.pdf", pages(root / f"sheet-{at}.pdf", Writer(600 + at))
        writer, path = Writer(700 + at, PRINTED), root.parent / "drafts" / f"print-{at}.html"
        path.with_suffix(".md").write_text(writer.markdown())
        run(PROGRAMS["pandoc"], "-f", "markdown", "-s", path.with_suffix(".md"), "-o", path)
        target = root / f"print-{at}.pdf"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer")
        run(PROGRAMS["chromium"], *flags, f"--print-to-pdf={target}", path.as_uri())
        yield target, writer.said


def word(path: Path, writer: Writer) -> list[str]:
    document = docx.Document()
    document.add_heading(writer(4), 1)
    document.add_paragraph(writer()).add_run(" " + writer(4)).bold = True
    document.add_paragraph(writer(), style="List Bullet")
    table = document.add_table(3, 3)
    for cell in itertools.chain(*(row.cells for row in table.rows)):
        cell.text = writer(3)
    table.cell(0, 0).add_table(1, 1).cell(0, 0).text = writer(3)
    section = document.sections[0]
    section.header.paragraphs[0].text, section.footer.paragraphs[0].text = writer(4), writer(4)
    document.save(str(path))
    return writer.said


def deck(path: Path, writer: Writer) -> list[str]:
    made = pptx.Presentation()
    for _ in range(3):
        slide = made.slides.add_slide(made.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = writer(4), f"{writer()}\n{writer()}"
        group = slide.shapes.add_group_shape()
        group.shapes.add_textbox(0, 0, 9, 9).text_frame.text = writer()
        table = slide.shapes.add_table(2, 2, 0, 0, 9, 9).table
        for row, column in itertools.product(range(2), range(2)):
            table.cell(row, column).text = writer(3)
        slide.notes_slide.notes_text_frame.text = writer()
    made.save(str(path))
    return writer.said


def book(path: Path, writer: Writer) -> list[str]:
    made = openpyxl.Workbook()
    for name in ("one", "two"):
        sheet = made.create_sheet(name)
        sheet["B2"] = writer(4)
        sheet.merge_cells("B2:D2")
        for _ in range(30):
            sheet.append([writer(2), writer(3), 7, writer(2)])
    made.save(path)
    return writer.said


def pages(path: Path, writer: Writer) -> list[str]:
    made = fpdf.FPDF()
    made.set_font("helvetica")
    for _ in range(3):
        made.add_page()
        for _ in range(12):
            text = writer()
            writer.said[-1] = latin = text[:-1].encode("latin-1", "ignore").decode("latin-1")
            made.multi_cell(w=0, text=latin + ".", new_x="LMARGIN", new_y="NEXT")
    made.output(str(path))
    return writer.said


def letters(text: str) -> str:
    """What is compared: letters and digits alone, as readers differ in spaces, bullets and quotation marks."""
    return "".join(c for c in text.casefold() if c.isalnum())


def without_overlap(before: str, text: str) -> str:
    """A passage without what it repeats of the one before."""
    return next(text[n:] for n in range(min(40, len(text)), -1, -1) if before.endswith(text[:n]))


PLAIN: dict[str, Callable[[Path], str]] = {
    suffix: lambda path: run(PROGRAMS["pandoc"], "-t", "plain", "--wrap=none", "--markdown-headings=atx", path)
    for suffix in (".docx", ".odt", ".epub", ".html", ".ipynb")
}


def read_by_others(files: list[Path], directory: Path) -> Iterator[tuple[Path, str]]:
    """What pandoc reads in texts, and LibreOffice in RTF and sheets."""
    for path in files:
        if path.suffix in PLAIN:
            yield path, PLAIN[path.suffix](path)
    texts = [path for path in files if path.suffix == ".rtf"]
    for path, other in zip(texts, office("txt:Text (encoded):UTF8", directory, texts), strict=True):
        yield path, other.read_text("utf-8-sig")
    sheets = [path for path in files if path.suffix == ".xlsx"]
    every_sheet = "csv:Text - txt - csv (StarCalc):9,34,76,1,,0,false,true,false,false,false,-1"
    office(every_sheet, directory, sheets)
    for path in sheets:
        yield path, "\n".join(p.read_text() for p in directory.glob(f"{path.stem}-*.csv"))


def test_no_sentence_is_lost(tmp_path: Path, bag: BagOfWords) -> None:
    root = tmp_path / "documents"
    root.mkdir()
    written = [*by_pandoc(root), *by_office(root), *by_libraries(root)]
    assert len(written) >= 200
    assert len({path for path, _ in written}) == len(written)
    index = GemIndex.open(tmp_path / "store", bag, tokens=256, overlap=32)
    report = index.add(root)
    assert not report.skipped
    assert len(report.added) == len(written)
    passages: dict[Path, str] = {}
    for passage in sorted(index.passages(), key=lambda p: int(p.id.rpartition("-")[2])):
        whole = passages.get(path := Path(passage.file), "")
        passages[path] = whole + without_overlap(whole, letters(passage.text))
    lost = [(path.name, text) for path, said in written for text in said if letters(text) not in passages[path]]
    for path, text in read_by_others([path for path, _ in written], tmp_path / "csv"):
        pieces = (piece for piece in re.split(r"[\n\t|]|\s{2,}|[.!?](?=\s)|\[\d\]", text) if len(piece.split()) > 2)
        lost += [(path.name, piece) for piece in pieces if letters(piece) not in passages[path]]
    kinds = sorted({(name.split("-")[0], name.rpartition(".")[2]) for name, _ in lost})
    assert not lost, f"{len(lost)} lost, of {kinds}: {lost[:8]}"
