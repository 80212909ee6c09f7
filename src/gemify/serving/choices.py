"""Answers as OpenAI writes them: whole or in chunks, of chats or of completions."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemify.engine.jobs import Finished, Piece
from gemify.engine.sampling import TokenLogprob

_LEAST = -9999.0  # JSON has no -infinity
Kind = Literal["chat", "completion"]


@dataclass
class Choice:
    """One answer, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    pieces: int = 0
    finished: Finished | None = None

    def take(self, event: Piece | Finished) -> None:
        if isinstance(event, Finished):
            self.finished = event
        else:
            self.texts.append(event.text)
            self.tokens += event.tokens
            self.pieces += 1

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def completion_tokens(self) -> int:
        """Tokens so far; of an unfinished answer, at least nearly."""
        return self.finished.completion_tokens if self.finished else self.pieces


class Form:
    """How one response's answers are written."""

    def __init__(self, kind: Kind, model: str, *, logprobs: bool) -> None:
        self.kind, self.model, self.logprobs = kind, model, logprobs
        self.id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The response with everything in it."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._around(name, [self._choice(i, c) for i, c in enumerate(choices)]) | {"usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """A chat chunk that says who speaks."""
        return self.chunk([self._part(index, {"role": "assistant", "content": "", "refusal": None})])

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        part = self._part(index, {"content": piece.text}) if self.kind == "chat" else self._part(index, piece.text)
        if self.logprobs:
            part["logprobs"] = self._logprobs(piece.tokens, self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + sum(len(t.text) for t in piece.tokens)
        return self.chunk([part])

    def ending(self, index: int, finished: Finished) -> dict[str, Any]:
        return self.chunk([self._part(index, {} if self.kind == "chat" else "", reason=finished.reason)])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._around("chat.completion.chunk" if self.kind == "chat" else "text_completion", choices)

    def _around(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _part(self, index: int, said: dict[str, Any] | str, *, reason: str | None = None) -> dict[str, Any]:
        name = "delta" if self.kind == "chat" else "text"
        return {"index": index, name: said, "logprobs": None, "finish_reason": reason}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"text": choice.text}
        if self.kind == "chat":
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        logprobs = self._logprobs(choice.tokens, 0) if self.logprobs else None
        reason = choice.finished.reason if choice.finished else "length"
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
        if self.kind == "chat":
            content = [_token(t) | {"top_logprobs": [_token(other) for other in t.top]} for t in tokens]
            return {"content": content, "refusal": None}
        listed = list(tokens)
        offsets = [offset]
        for token in listed:
            offsets.append(offsets[-1] + len(token.text))
        return {
            "tokens": [_name(t) for t in listed],
            "token_logprobs": [_finite(t.logprob) for t in listed],
            "top_logprobs": [{_name(other): _finite(other.logprob) for other in t.top} for t in listed],
            "text_offset": offsets[:-1],
        }


def usage(prompt_tokens: int, reused_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reused_tokens},
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _name(token: TokenLogprob) -> str:
    """A token's text; its bytes where it is a part of a character, its id where it is nothing: different ones differ."""
    if not token.data:
        return f"token_id:{token.id}"
    if "\N{REPLACEMENT CHARACTER}" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
