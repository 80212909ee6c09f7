"""Every format, whole and broken."""

from __future__ import annotations

import gzip
import json
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

import docx
import pyarrow as pa
import pyarrow.parquet as pq
import pypdf
import pytest
from fpdf import FPDF

from children import read_as_nobody
from gemify.retrieval.documents import Section, Skipped
from gemify.retrieval.loaders import Columns, content_hash, find_files, read_file
from rows_of_words import write_parquet, write_rows


def sections(path: Path, columns: Columns | None = None) -> list[Section]:
    return [s for s in read_file(path, columns or Columns()) if isinstance(s, Section)]


def write_pdf(path: Path, pages: list[str], title: str = "") -> Path:
    pdf = FPDF()
    pdf.set_title(title)
    pdf.set_font("helvetica", size=12)
    for page in pages:
        pdf.add_page()
        pdf.multi_cell(0, 8, page)
    pdf.output(str(path))
    return path


def write_docx(path: Path) -> Path:
    document = docx.Document()
    document.core_properties.title = "Birds"
    document.add_heading("Owls", 1)
    document.add_paragraph("They hunt at night.")
    document.add_heading("Food", 2)
    document.add_paragraph("Mice, mostly.")
    table = document.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "weight", "2 kg"
    document.add_heading("Larks", 1)
    document.add_paragraph("They sing.")
    document.save(str(path))
    return path


def test_text_keeps_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\ntwo\r\nthree é\n".encode())
    (section,) = sections(tmp_path / "a.txt")
    assert section.text.startswith("one")
    assert section.location(0, 3) == "line 1"
    assert section.location(4, len(section.text)) == "lines 2-3"


def test_a_large_text_comes_in_pieces_that_know_their_lines(tmp_path: Path) -> None:
    lines = [f"line number {i}\n" for i in range(1, 120_001)]
    (tmp_path / "a.log").write_text("".join(lines))
    got = sections(tmp_path / "a.log")
    assert len(got) > 1
    assert "".join(s.text for s in got) == "".join(lines)
    for section in got:
        assert section.text.startswith(f"line number {section.first}\n")


def test_a_line_of_any_length_comes_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("x" + "é" * 3_000_000 + "\nend\n", encoding="utf-8")
    got = sections(path)
    assert "".join(s.text for s in got) == path.read_text(encoding="utf-8")
    assert max(len(s.text.encode()) for s in got) < 2_200_000
    assert [s.first for s in got] == [1] * (len(got) - 1) + [2]


def test_markdown_headings_are_a_path_and_code_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("intro\n\n# Top\n\n```\n# no heading\n```\n\nSub\n---\n\ntext\n\n# Next\nend\n")
    got = sections(path)
    assert [s.headings for s in got] == [(), ("Top",), ("Top", "Sub"), ("Next",)]
    assert {s.title for s in got} == {"Top"}
    assert "# no heading" in got[1].text
    assert got[2].location(0, len(got[2].text.rstrip())) == "lines 9-12"
    assert "".join(s.text for s in got) == path.read_text()


def test_markdown_lines_are_the_parsers(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("a\u2028b\x0cc\n\n# One\rone\r\n\n# Two\n\ntwo\n".encode())
    assert [(s.headings, s.text.strip(), s.first) for s in sections(path)] == [
        ((), "a\u2028b\x0cc", 1),
        (("One",), "# One\none", 3),
        (("Two",), "# Two\n\ntwo", 6),
    ]


def test_html_is_what_a_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        "<html><head><title>The  page</title><style>p {}</style></head><body><script>var x</script><!-- no -->"
        "<p>Before.</p><h1>One <em>two</em></h1><p>Some\n  <b>bold</b> text.<br>Next line</p>"
        "<ul><li>a</li><li>b</li></ul>"
        "<h2>Code</h2><pre>if x:\n    y</pre></body></html>"
    )
    got = sections(path)
    assert [(s.title, s.headings) for s in got] == [
        ("The page", ()),
        ("The page", ("One two",)),
        ("The page", ("One two", "Code")),
    ]
    assert got[0].text == "Before."
    assert got[1].text == "One two\n\nSome bold text.\nNext line\n\na\n\nb"
    assert "if x:\n    y" in got[2].text


def test_pdf_pages_are_places(tmp_path: Path) -> None:
    (section,) = sections(write_pdf(tmp_path / "a.pdf", ["First page text.", "Second page text."], "A title"))
    assert section.title == "A title"
    at = section.text.index("Second")
    assert section.location(at, at + 6) == "page 2"
    assert section.location(0, at + 6) == "pages 1-2"


def test_word_headings_and_tables(tmp_path: Path) -> None:
    got = sections(write_docx(tmp_path / "a.docx"))
    assert [s.headings for s in got] == [("Owls",), ("Owls", "Food"), ("Larks",)]
    assert {s.title for s in got} == {"Birds"}
    assert "weight | 2 kg" in got[1].text


def test_rows_have_ids_titles_and_their_own_columns(tmp_path: Path) -> None:
    rows = [{"_id": "q1", "text": "a", "title": "T"}, {"id": 7, "text": "b"}, {"text": "c\u2028d"}]
    plain = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        got = sections(tmp_path / name)
        assert [(s.text, s.title, s.location(0, 1)) for s in got] == [
            ("a", "T", "row q1"),
            ("b", "", "row 7"),
            ("c\u2028d", "", "row 3"),
        ]
    (tmp_path / "b.jsonl").write_text('{"body": "x", "name": "N"}\n')
    (section,) = sections(tmp_path / "b.jsonl", Columns("body", "name"))
    assert (section.text, section.title) == ("x", "N")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv", "a.json", "a.jsonl.zst"])
def test_tables_and_arrays_with_the_text_column_are_rows(tmp_path: Path, name: str) -> None:
    rows = [{"_id": "q1", "body": "a", "title": "T"}, {"_id": "q2", "body": 'b "c"', "title": ""}]
    path = write_rows(tmp_path / name, rows)
    got = sections(path, Columns("body"))
    assert [(s.text, s.title, s.location(0, 1)) for s in got] == [("a", "T", "row q1"), ('b "c"', "", "row q2")]
    if ".jsonl" not in name:
        (whole,) = sections(path)  # without the text column it is a table, or a text
        assert whole.unit == ("line" if name == "a.json" else "row")
        assert '"body' in whole.text or whole.text.splitlines()[0].split(" | ")[:2] == ["_id: q1", "body: a"]
    assert content_hash(path, Columns()) != content_hash(path, Columns("body"))


def test_parquet_files_are_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"_id": n, "text": f"text {n}"} for n in range(40)])
    got = sections(tmp_path / "a.parquet")
    assert [(s.text, s.name) for s in got] == [(f"text {n}", str(n)) for n in range(40)]
    assert find_files([tmp_path]).files == (tmp_path / "a.parquet",)


def test_broken_rows_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = ["{", '["x"]', '{"t": 1}', '{"text": 3}']
    path.write_bytes("\n".join(['{"text": "good"}', *bad, '{"text": "end"}']).encode() + b"\n\xff\xfe\n")
    got = list(read_file(path, Columns()))
    assert [s.text for s in got if isinstance(s, Section)] == ["good", "end"]
    reasons = [s.reason for s in got if isinstance(s, Skipped)]
    assert len(reasons) == 5
    for number, words in zip((2, 3, 4, 5, 7), ("not JSON", "list", "no column", "int", "UTF-8"), strict=True):
        assert any(r.startswith(f"row {number}: ") and words in r for r in reasons)


def test_many_broken_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 50)
    got = list(read_file(tmp_path / "a.jsonl", Columns()))
    assert len(got) == 11
    assert "40 more rows" in got[-1].reason  # type: ignore[union-attr]


def _encrypted(path: Path, algorithm: str) -> None:
    writer = pypdf.PdfWriter(write_pdf(path.with_suffix(".plain"), ["secret"]))
    writer.encrypt("password", algorithm=algorithm)
    writer.write(path)


def _truncated(path: Path, whole: Path, keep: float) -> None:
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * keep)])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encrypted.pdf", "encrypted PDF"),
        ("truncated.pdf", "cannot be read as PDF|without text"),
        ("empty.pdf", "cannot be read as PDF"),
        ("scanned.pdf", "without text"),
        ("truncated.docx", "cannot be read as a Word file"),
        ("empty.docx", "cannot be read as a Word file"),
        ("binary.txt", "binary"),
        ("binary.md", "binary"),
        ("latin.txt", "line 2 is not UTF-8"),
        ("latin.md", "line 2 is not UTF-8"),
        ("truncated.jsonl.gz", r"damaged \.gz"),
        ("dangling.txt", "cannot be read"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / name
    if name == "encrypted.pdf":
        _encrypted(path, "RC4-128")
    elif name == "truncated.pdf":
        _truncated(path, write_pdf(tmp_path / "whole", ["text " * 200] * 3), 0.4)
    elif name == "scanned.pdf":
        write_pdf(path, [""])
    elif name == "truncated.docx":
        _truncated(path, write_docx(tmp_path / "whole"), 0.7)
    elif name.startswith("binary"):
        path.write_bytes(b"abc\0\x01\x02")
    elif name.startswith("latin"):
        path.write_bytes("one\ncafé\n".encode("latin-1"))
    elif name == "truncated.jsonl.gz":
        path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    elif name == "dangling.txt":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=words) as caught:
        list(read_file(path, Columns()))
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


def test_directories_are_searched_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.py",
        "sub/c.MD",
        "README",
        ".hidden.txt",
        ".git/d.txt",
        "e.png",
        "sub/.f.md",
        "g.jsonl.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path, tmp_path / "b.txt"])
    assert [str(p.relative_to(tmp_path)) for p in found.files] == ["README", "a.py", "b.txt", "g.jsonl.gz", "sub/c.MD"]
    assert found.is_gone(tmp_path / "sub" / "was.txt")
    assert not found.is_gone(tmp_path / "b.txt")
    assert not found.is_gone(tmp_path.parent / "elsewhere.txt")
    assert find_files([tmp_path / "e.png"]).files == (tmp_path / "e.png",)
    with pytest.raises(ValueError, match="no such file or directory"):
        find_files([tmp_path / "no"])
    with pytest.raises(ValueError, match="no path given"):
        find_files([])


def test_a_hash_knows_content_and_how_it_is_read(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.txt"
    a.write_text("{}"), b.write_text("{}")
    assert content_hash(a, Columns()) != content_hash(a, Columns("body"))
    assert content_hash(b, Columns()) == content_hash(b, Columns("body"))
    before = content_hash(b, Columns())
    b.write_text("{ }")
    assert content_hash(b, Columns()) != before


def test_without_permission(server: ForkServerContext) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "locked").mkdir()
        for file in ("open.txt", "closed.txt", "locked/inside.txt"):
            (root / file).write_text(file)
        root.chmod(0o755), (root / "closed.txt").chmod(0), (root / "locked").chmod(0)
        ours, theirs = server.Pipe()
        child = server.Process(target=read_as_nobody, args=(name, theirs))
        child.start()
        theirs.close()
        read, skipped, gone = ours.recv()
        child.join()
        (root / "locked").chmod(0o755)
    assert read["open.txt"] == "open.txt"
    assert "Permission denied" in read["closed.txt"]
    assert [path for path, _ in skipped] == [str(root / "locked")]
    assert "Permission denied" in skipped[0][1]
    assert gone == (False, True)


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.parquet"])
def test_nested_columns_of_rows(tmp_path: Path, name: str) -> None:
    rows = [{"doc": {"body": f"Owls hunt {n}.", "head": "Owls"}, "id": str(n)} for n in range(2)]
    if name == "c.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(rows) if name == "b.json" else "\n".join(map(json.dumps, rows)))
    found = list(read_file(tmp_path / name, Columns("doc.body", "doc.head")))
    assert [(s.text, s.title, s.location(0, 1)) for s in found if isinstance(s, Section)] == [
        ("Owls hunt 0.", "Owls", "row 0"),
        ("Owls hunt 1.", "Owls", "row 1"),
    ]
