"""Inputs that nobody meant: readers, chunking and prompts answer with text, or with one line that says what is wrong.

`make test` tries some cases of each kind, `make fuzz` 20,000 and more (GEMIFY_FUZZ_CASES is the number of each kind).
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from random import Random
from typing import Any

import docx
import fpdf
import openpyxl
import pptx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_models
from chat_templates import TEMPLATES, TOKENIZERS
from gemify.io.rows import load_rows, read_rows
from gemify.model.chat_template import ChatTemplate
from gemify.model.tokenization import TextTokenizer
from gemify.retrieval.chunking import ChunkSettings, split_section
from gemify.retrieval.documents import Section
from gemify.retrieval.loaders import Columns, read_file
from gemify.training.examples import Source

CASES = int(os.environ.get("GEMIFY_FUZZ_CASES", "12"))
fuzzed = settings(
    max_examples=CASES,
    database=None,
    derandomize=CASES < 100,
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
SCRAPS = [
    *(b"", b"\0", b"\r\n", b"\n\n", b'"', b"'", b"\\", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\x80"),
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"[", b"]", b"{", b"}", b",", b";", b"\t", b"<", b">", b"&", b"&#0;"),
    *(b"<x", b"</", b"<!--", b"]]>", b"<p>", b"</table>", b"hidden", b"---\n", b"# ", b"```", b"\xf0\x9f\xa6\x89"),
    *(b"\\u", b"\\ud83d", b"\\'8", b"\\bin9 ", b"\\uc-3", b"\\f99999999999", b"endobj", b"stream", b"%%EOF", b"9" * 40),
    *("\u202e\u200b\u0301".encode(), b"A" * 3000, b"(" * 300, b"<a>" * 300, b"[" * 3000, b'{"a":' * 2000),
]


@contextmanager
def one_line_at_most() -> Iterator[None]:
    """An error is a ValueError of one line."""
    caught: ValueError | None = None
    try:
        yield
    except ValueError as error:
        caught = error
    if caught is not None:
        assert type(caught) is ValueError, repr(caught)
        assert len(str(caught).splitlines()) == 1, str(caught)


def text_part(name: str) -> bool:
    return name.endswith((".xml", ".rels", ".xhtml", ".opf"))


@st.composite
def damage(draw: st.DrawFn, seed: bytes) -> bytes:
    """A file with some of its bytes replaced, taken out, repeated or moved; of an archive, within one of its parts."""
    rng = Random(draw(st.integers(0, 2**32)))
    if not zipfile.is_zipfile(io.BytesIO(seed)) or rng.random() < 0.15:
        return edited(seed, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        chosen = rng.choice([name for name in names if text_part(name)] or names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = edited(content, rng)
                if rng.random() < 0.05:
                    continue
            new.writestr(name, content)
    return made.getvalue()


def edited(content: bytes, rng: Random) -> bytes:
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(content) + 1), rng.choice((0, 1, 2, 5, 20, 200))
        kind = rng.randrange(5)
        scrap = rng.choice(SCRAPS)
        if kind == 0:
            content = content[:at] + scrap + content[at:]
        elif kind == 1:
            content = content[:at] + scrap + content[at + length :]
        elif kind == 2:
            content = content[:at] + content[at + length :]
        elif kind == 3:
            content = content[:at] + content[at : at + length] * 2 + content[at + length :]
        else:
            content = content[:at]
    return content


ROWS = [
    {"text": "owls hunt", "title": "Owls", "id": 1, "anchor": "a", "positive": "p", "negative": "n", "x": {"y": ["z"]}},
    {"text": 'larks\nsing, "loudly"', "title": None, "id": 2, "anchor": "b", "positive": ["q", "r"], "x": {"y": []}},
]


@functools.cache
def row_files() -> dict[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = b'text,title,id\n"owls, hunt",Owls,1\r\n"larks\nsing ""loudly""",,2\n'
    held = io.BytesIO()
    same = [{**row, "positive": "p"} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(same), held)
    return {
        "a.jsonl": lines,
        "b.json": json.dumps(ROWS, indent=1).encode(),
        "c.csv": table,
        "d.tsv": table.replace(b",", b"\t"),
        "e.parquet": held.getvalue(),
        "f.txt": "owls\nläuse\r\n\n🦉".encode(),
        "g.jsonl.gz": gzip.compress(lines),
        "h.csv.zst": pa.compress(table, "zstd", asbytes=True),
    }


@pytest.mark.parametrize("name", sorted(row_files()))
def test_files_of_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    @fuzzed
    @given(damage(row_files()[name]))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with one_line_at_most():
            for row in read_rows(path):
                with one_line_at_most():
                    assert isinstance(row.parse(), dict)
        for column in ("text", "x.y", "none"):
            with one_line_at_most():
                source = Source(str(path), column, skip_bad=True)
                assert all(isinstance(example.text, str) for example in source)
            with one_line_at_most():
                list(Source(str(path), column))
        with one_line_at_most():
            load_rows(path, {"id": int, "text": str})
        with one_line_at_most():
            list(read_file(path, Columns()))

    check()


@functools.cache
def documents() -> dict[str, bytes]:
    made = {name: io.BytesIO() for name in (".docx", ".pptx", ".xlsx", ".odt", ".epub")}
    word = docx.Document()
    word.add_heading("Owls", 1)
    word.add_paragraph("They hunt at night.")
    word.add_table(2, 2).cell(0, 0).text = "cell"
    word.sections[0].header.paragraphs[0].text = "Letterhead"
    word.save(made[".docx"])
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text = "Owls"
    slide.notes_slide.notes_text_frame.text = "Say it."
    slide.shapes.add_table(2, 2, 0, 0, 9, 9)
    deck.save(made[".pptx"])
    book = openpyxl.Workbook()
    for row in (["Name", "Day"], ["owl", 3.5], ["lark", True]):
        book.active.append(row)
    book.active["B2"].number_format = '[$€-407]#,##0.00;"-"0'
    book.save(made[".xlsx"])
    with zipfile.ZipFile(made[".odt"], "w") as archive:
        body = "<t:h t:outline-level='1'>Owls</t:h><t:p>They<t:s t:c='2'/>hunt.</t:p>"
        archive.writestr("content.xml", f"<o xmlns:t='urn:t'><body>{body}</body></o>")
        archive.writestr("meta.xml", "<o><title>Owls</title></o>")
    with zipfile.ZipFile(made[".epub"], "w") as archive:
        archive.writestr("META-INF/container.xml", '<c><rootfile full-path="OPS/b.opf"/></c>')
        parts = '<title>B</title><item id="a" href="a.xhtml"/><itemref idref="a"/>'
        archive.writestr("OPS/b.opf", f"<package>{parts}</package>")
        archive.writestr("OPS/a.xhtml", "<html><body><h1>Larks</h1><p>They sing.</p></body></html>")
    page = fpdf.FPDF()
    page.add_page()
    page.set_font("helvetica")
    page.cell(text="Owls hunt at night.")
    mail = EmailMessage()
    mail["From"], mail["Subject"], mail["To"] = "ann@a.example", "Käuze", "b@b.example"
    mail.set_content("They hunt.\n")
    mail.add_alternative("<p>They <b>hunt</b>.</p>", subtype="html")
    mail.add_attachment(b"x", maintype="image", subtype="png", filename="owl.png")
    cells = [{"cell_type": "code", "source": ["a\n", "b"], "outputs": [{"text": "1"}, {"data": {"text/plain": ["2"]}}]}]
    return {name: file.getvalue() for name, file in made.items()} | {
        ".pdf": bytes(page.output()),
        ".eml": bytes(mail),
        ".ipynb": json.dumps({"cells": cells, "nbformat": 4}).encode(),
        ".rtf": rb"{\rtf1\ansi\ansicpg932{\fonttbl{\f0\fcharset128 M;}}\f0\'93\'fa\u8364? {\*\x y}{\pict\bin2 {}}z}",
        ".md": b"---\ntitle: Owls\ntags: [a, b]\n---\n# Food\n\nMice.\n\n| a |\n|---|\n| 1 |\n\n```\ncode\n```",
        ".html": b"<title>Owls</title><body><h1>Food</h1><p hidden>x</p><table><tr><td>a<td>b</table><pre>c</pre>",
        ".txt": "Käuze jagen.\n\nNachts.\r\n🦉".encode(),
        ".py": b"def owl():\n    return 'hunts'\n",
    }


@pytest.mark.parametrize("suffix", sorted(documents()))
def test_documents(tmp_path: Path, suffix: str) -> None:
    path, tokenizer = tmp_path / f"a{suffix}", tiny_models.tokenizer()
    made = ChunkSettings(16, 4)

    @fuzzed
    @given(damage(documents()[suffix]))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with one_line_at_most():
            for section in read_file(path, Columns()):
                if isinstance(section, Section):
                    section.text.encode()
                    for chunk in split_section(section, tokenizer, made):
                        assert chunk.text.strip() == chunk.text
                        assert "\n" not in chunk.location
                else:
                    assert "\n" not in section.reason

    check()


PIECES = ["owl", " ", "\n", "\n\n", ". ", "猫头鹰", "é", "e\u0301", "🦉", "\u200b", "<|reserved_0|>", "\r", "\0"]
TEXTS = st.text(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=120).map("".join)


@fuzzed
@given(TEXTS, st.integers(16, 40), st.booleans(), st.lists(TEXTS, max_size=2))
def test_chunks(text: str, tokens: int, context: bool, headings: list[str]) -> None:
    """No word is lost, and no chunk is longer than asked for."""
    text = text.encode("utf-8", "ignore").decode()
    section = Section(text, title="Owls", headings=tuple(h.encode("utf-8", "ignore").decode() for h in headings))
    chunks = list(split_section(section, tiny_models.tokenizer(), ChunkSettings(tokens, tokens // 4, context)))
    assert all(0 < chunk.tokens <= tokens for chunk in chunks)
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    end = 0
    for chunk in chunks:  # what stands between two chunks, and behind the last, is white space
        starts = [at for at in range(len(text)) if text.startswith(chunk.text, at)]
        start = max((at for at in starts if not text[end:at].strip()), default=None)
        assert start is not None
        end = max(end, start + len(chunk.text))
    assert not text[end:].strip()


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", ""]) | VALUES, "content": TEXTS | VALUES},
    optional={"tool_calls": VALUES, "reasoning_content": VALUES, "name": VALUES},
) | st.dictionaries(st.sampled_from(["role", "content", "type"]), VALUES, max_size=3)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_prompts(kind: str) -> None:
    made = {}

    @fuzzed
    @given(st.sampled_from(sorted(TEMPLATES)), st.lists(MESSAGES, max_size=4), st.booleans(), st.booleans())
    def check(name: str, messages: list[Any], continued: bool, generation: bool) -> None:
        if name not in made:
            tokenizer = TOKENIZERS[kind]()
            tokenizer.chat_template = TEMPLATES[name]
            made[name] = ChatTemplate(tokenizer, own_system="Answer shortly.")
        with one_line_at_most():
            options = {"continue_final_message": continued, "add_generation_prompt": generation}
            assert all(isinstance(i, int) for i in made[name].apply(messages, **options))

    check()


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_texts_to_embed(kind: str) -> None:
    tokenize = TextTokenizer(TOKENIZERS[kind](), frozenset(), 'say : "{text}"')

    @fuzzed
    @given(st.lists(TEXTS | st.text(st.characters(), max_size=40), min_size=1, max_size=4), st.integers(12, 60))
    def check(texts: list[str], limit: int) -> None:
        rows = tokenize(texts, max_tokens=limit)
        assert len(rows) == len(texts)
        assert all(len(row) <= limit for row in rows)

    check()
