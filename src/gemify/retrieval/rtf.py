"""RTF files -> their text, in the code page of the file and of each font, two-byte ones included."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemify.retrieval.documents import Section, Skipped

_TOKEN = re.compile(rb"\\([a-z]+)(-?\d+)? ?|\\'([0-9a-fA-F]{2})|\\(.)|([{}])|[\r\n]+|([^\\{}\r\n]+)", re.DOTALL)
_UNSEEN = frozenset(
    b"fonttbl colortbl stylesheet info pict object header footer headerl headerr footerl footerr generator themedata"
    b" datastore xmlnstbl listtable listoverridetable rsidtbl mmathPr latentstyles fldinst filetbl revtbl sn sv"
    b" shprslt".split()
)
_TEXT = {b"par": "\n\n", b"line": "\n", b"tab": "\t", b"cell": " | ", b"row": "\n", b"emdash": "—", b"endash": "–"}
_TEXT |= {b"lquote": "‘", b"rquote": "’", b"ldblquote": "“", b"rdblquote": "”", b"bullet": "•", b"page": "\n\n"}
_STARRED_TEXT = (b"footnote", b"shpinst", b"shptxt")
"""Destinations that hold text, although older readers may leave them out."""
_CHARSETS = {77: "mac_roman", 128: "cp932", 129: "cp949", 134: "cp936", 136: "cp950", 161: "cp1253", 162: "cp1254"}
_CHARSETS |= {
    163: "cp1258",
    177: "cp1255",
    178: "cp1256",
    186: "cp1257",
    204: "cp1251",
    222: "cp874",
    238: "cp1250",
}


@dataclass
class _Group:
    """What holds to the end of a group."""

    unseen: bool = False
    hidden: bool = False
    font: int = -1
    fallback: int = 1
    """Characters after one in Unicode that older readers show in its place."""


class _Text:
    """The text of an RTF file, read token by token. Bytes wait until a word ends them: two may be one character."""

    def __init__(self, encoding: str) -> None:
        self.encoding, self.parts = encoding, list[str]()
        self._fonts: dict[int, str] = {}
        self._bytes, self._skip, self._starred = bytearray(), 0, False
        self._groups = [_Group()]

    @property
    def group(self) -> _Group:
        return self._groups[-1]

    def add_bytes(self, piece: bytes) -> None:
        dropped, self._skip = piece[self._skip :], max(0, self._skip - len(piece))
        if not (self.group.unseen or self.group.hidden):
            self._bytes += dropped

    def flush(self) -> None:
        if self._bytes:
            encoding = self._fonts.get(self.group.font, self.encoding)
            self.parts.append(self._bytes.decode(encoding, "replace"))
            self._bytes.clear()

    def brace(self, brace: bytes) -> None:
        self.flush()
        self._skip = 0
        if brace == b"{":
            self._groups.append(replace(self.group))
        elif len(self._groups) > 1:
            self._groups.pop()

    def word(self, word: bytes, number: int | None) -> None:
        self.flush()
        self._skip = 0
        starred, self._starred = self._starred, False
        if word in _UNSEEN or (starred and word not in _STARRED_TEXT):
            self.group.unseen = True
        elif word == b"f" and number is not None:
            self.group.font = number
        elif word == b"fcharset" and number in _CHARSETS:
            self._fonts[self.group.font] = _CHARSETS[number]
        elif word == b"uc" and number is not None:
            self.group.fallback = number
        elif word in (b"v", b"plain"):
            self.group.hidden = word == b"v" and number != 0
        elif not (self.group.unseen or self.group.hidden):
            if word == b"u" and number is not None:
                self.parts.append(chr(number % 65536))
                self._skip = self.group.fallback
            else:
                self.parts.append(_TEXT.get(word, ""))

    def symbol(self, symbol: bytes) -> None:
        if symbol in (b"\\", b"{", b"}"):
            self.add_bytes(symbol)
            return
        self.flush()
        if symbol == b"*":
            self._starred = True
        elif symbol in (b"~", b"_") and not (self.group.unseen or self.group.hidden):
            self.parts.append("\N{NO-BREAK SPACE}" if symbol == b"~" else "-")


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
    while image := re.search(rb"\\bin(\d{1,9}) ?", raw):
        raw = raw[: image.start()] + raw[image.end() + int(image[1]) :]
    text = _Text(encoding)
    for word, number, hexadecimal, symbol, brace, plain in _TOKEN.findall(raw):
        if hexadecimal or plain:
            text.add_bytes(bytes.fromhex(hexadecimal.decode()) if hexadecimal else plain)
        elif brace:
            text.brace(brace)
        elif symbol:
            text.symbol(symbol)
        elif word:
            text.word(word, int(number[:11]) if number else None)
    text.flush()
    joined = "".join(text.parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    rows = re.sub(r"\s*\n \| ", " | ", joined)  # a paragraph's end before that of its cell
    yield Section(re.sub(r" \| (?=\n|$)", "", rows).strip() or " ")
