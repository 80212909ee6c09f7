"""Generated text in pieces, as it is made: transformers' `generate` in a thread of its own, read through a queue.

The tokens are read by a stopping criterion, which transformers asks after every token. Its TextIteratorStreamer is told
of a token only after that question, so a stop string would cost one token more; and it decodes every line for itself,
so that a tokenizer whose words begin with their space loses one at each line break.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from gemify.model.gem import GemModel, Message
from gemify.model.prefill import Prefill
from gemify.model.recovery import find_eos_ids

_Queue = SimpleQueue[str | BaseException | None]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class TextStream(Iterator[str]):
    """Pieces of one answer. The counts are final when it is exhausted."""

    def __init__(self, pieces: Generator[str, None, None], written: IncrementalDetokenizer) -> None:
        self._pieces, self._written = pieces, written

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating after the token that is being computed."""
        self._pieces.close()

    @property
    def prompt_tokens(self) -> int:
        return self._written.prompt_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens generated, an end token and the tokens of a stop string among them."""
        return len(self._written.ids)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """``length``: cut at ``max_new_tokens``. ``stop``: an end token, a stop string or the caller ended it."""
        return self._written.finish_reason


def stream(
    gem: GemModel,
    prompt: str | Prefill,
    *,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> TextStream:
    """Continue a prompt, or a `Prefill` of one, in pieces that join to the text `GemModel.generate` gives.

    Generation starts with the first piece asked for, and stops within one token when the stream is closed or dropped.
    It holds `GemModel.lock` until its last token, whether the pieces are read or not.

    Args:
        stop: the text ends before the first of these strings.
        seed: draw from this seed; torch's own random numbers stay as they were.
        options: those of transformers' `generate`. torch's per-thread switches (autocast) do not reach it.

    Raises:
        ValueError: several prompts, or an empty stop string. What `generate` raises comes with the first piece.
    """
    if isinstance(prompt, Prefill) and prompt.ids_BT.shape[0] != 1:
        raise ValueError(f"one prompt can be streamed, got a prefill of {prompt.ids_BT.shape[0]}: use generate")
    if not isinstance(prompt, str | Prefill):
        raise ValueError(f"one prompt can be streamed, got a {type(prompt).__name__}: give a string, or use generate")
    for name in ("num_beams", "num_return_sequences"):
        if (options.get(name) or 1) != 1:
            raise ValueError(f"one answer can be streamed, got {name}={options[name]}: use generate")
    queue: _Queue = SimpleQueue()
    written = IncrementalDetokenizer(gem, sink=queue.put, stop=stop, max_new_tokens=max_new_tokens)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), written])
    options["max_new_tokens"] = max_new_tokens
    return TextStream(_pieces(gem, prompt, written, queue, seed, options), written)


def stream_chat(gem: GemModel, messages: Sequence[Message], **options: Any) -> TextStream:
    """`stream` of the answer to a conversation, as `GemModel.chat` gives it."""
    with gem.lock:
        prefill = gem.prefill_chat(messages)
    return stream(gem, prefill, **options)


def _pieces(
    gem: GemModel,
    prompt: str | Prefill,
    written: IncrementalDetokenizer,
    queue: _Queue,
    seed: int | None,
    options: dict[str, Any],
) -> Generator[str, None, None]:
    def work() -> None:
        try:
            with gem.lock, _drawing_from(seed, gem.device):
                if not written.closed.is_set():
                    prefill = gem.prefill(prompt) if isinstance(prompt, str) else prompt
                    written.prompt_tokens = prefill.ids_BT.shape[1]
                    text = gem.generate(prefill, **options)
                    written.finish(text if isinstance(text, str) else text[0])
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    # Not a daemon: torch must not be computing while the interpreter takes itself down.
    threading.Thread(target=copy_context().run, args=(work,), name="gemify-stream").start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        # Not joined: the thread may be waiting for the lock, which whoever drops this stream may hold.
        written.closed.set()


class IncrementalDetokenizer(StoppingCriteria):
    """What is being generated: token ids in, pieces of text out (whole characters, up to a stop string).

    Given to transformers' `generate` as a stopping criterion; `finish` takes the text that `generate` has made.
    """

    def __init__(
        self,
        gem: GemModel,
        *,
        sink: Callable[[str], None],
        stop: str | Sequence[str] | None = None,
        max_new_tokens: int,
        prompt_tokens: int = 0,
    ) -> None:
        self._stops = [stop] if isinstance(stop, str) else list(stop or ())
        if odd := [s for s in self._stops if not isinstance(s, str) or not s]:
            raise ValueError(f"a stop string must have at least one character, got {odd[0]!r}: leave it out")
        self.closed = threading.Event()
        self.prompt_tokens = prompt_tokens
        self.ids: list[int] = []
        self._sink, self._max_new_tokens, self._tokenizer = sink, max_new_tokens, gem.tokenizer
        self.eos_ids = find_eos_ids(gem.lm, gem.tokenizer)
        # A token may decode differently at the start of a text, so new ones are decoded after those of the piece before.
        self._from = self._read = 0
        self._text = ""
        self._sent = 0
        self._stopped = False

    @property
    def text(self) -> str:
        """What has been passed on."""
        return self._text[: self._sent]

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        full = len(self.ids) >= self._max_new_tokens and self.ids[-1] not in self.eos_ids
        return "length" if full and not self._stopped else "stop"

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = self.add(input_ids[0, self.prompt_tokens + len(self.ids) :].tolist())
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device)

    def add(self, ids: Sequence[int]) -> bool:
        """Take new tokens and pass on what they complete; whether a stop string or the reader ends the text here."""
        self.ids.extend(ids)
        before, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._from, self._read = self._read, len(self.ids)
            self._send(now[len(before) :])
        return self._stopped or self.closed.is_set()

    def finish(self, text: str | None = None) -> None:
        """Pass on what was held back of the whole text (None: decoded here)."""
        if not self._stopped:
            whole = self._decode(0, len(self.ids)) if text is None else text
            self._send(whole[len(self._text) :], last=True)

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _send(self, new: str, *, last: bool = False) -> None:
        """Pass on all that cannot be the beginning of a stop string."""
        self._text += new
        found = [at for s in self._stops if (at := self._text.find(s, self._sent)) >= 0]
        self._stopped = bool(found)
        held = 0 if last else max((_begun(s, self._text[self._sent :]) for s in self._stops), default=0)
        until = min(found) if found else len(self._text) - held
        if until > self._sent:
            self._sink(self._text[self._sent : until])
            self._sent = until


def _begun(stop: str, text: str) -> int:
    """How much of the stop string the end of the text may be."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def _drawing_from(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
