"""The bytes of a single token, which need not be whole characters."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Text and bytes of tokens, for the two ways that tokenizers spell bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()} if byte_level else {}

    def __call__(self, token: int) -> tuple[str, bytes]:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the table that the tokenizer has no token for
            return "", b""
        if token in self._added:
            return piece, piece.encode()
        if self._bytes and all(char in self._bytes for char in piece):
            data = bytes(self._bytes[char] for char in piece)
            return data.decode(errors="replace"), data
        if match := _BYTE.fullmatch(piece):
            data = bytes([int(match[1], 16)])
            return data.decode(errors="replace"), data
        text = piece.replace("\u2581", " ")
        return text, text.encode()
