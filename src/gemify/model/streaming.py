"""Streaming: generated text in pieces, as it is made, by transformers' `generate` in a thread of its own.

A stopping criterion reads the tokens, because transformers calls one after every token. Its TextIteratorStreamer gets a
token only after that call, so that a stop string would cost one token more. It also decodes every line by itself, so
that a tokenizer whose words begin with their space loses one at each line break.
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

from gemify.model.chat_template import Message, pop_chat_options
from gemify.model.gem import GemModel
from gemify.model.prefill import Prefill, find_eos_ids

_Queue = SimpleQueue[str | BaseException | None]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete character to."""


class TextStream(Iterator[str]):
    """Pieces of one answer's text. The counts are final at its end."""

    def __init__(self, pieces: Generator[str, None, None], detokenizer: IncrementalDetokenizer) -> None:
        self._pieces, self._detokenizer = pieces, detokenizer

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating after the token that is being computed. Another thread may be waiting for a piece."""
        self._detokenizer.closed.set()
        with contextlib.suppress(ValueError):  # that thread is inside the generator, which then ends by itself
            self._pieces.close()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._detokenizer.prompt_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens generated, an end token and the tokens of a stop string included."""
        return len(self._detokenizer.ids)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """``length``: cut at ``max_new_tokens``. ``stop``: ended by an end token, a stop string or the caller."""
        return self._detokenizer.finish_reason


def stream(
    gem: GemModel,
    prompt: str | Prefill,
    *,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> TextStream:
    """Continue a prompt in pieces that join to the text `GemModel.generate` gives.

    Generation starts with the first piece that is asked for. It ends within one token when the stream is closed or
    dropped. It holds `GemModel.lock` until its last token, whether the pieces are read or not.

    Args:
        gem: The model.
        prompt: A prompt, or a `Prefill` of one.
        max_new_tokens: Most tokens of the continuation.
        stop: The text ends before the first of these strings.
        seed: Draw from this seed. torch's own random state does not change.
        options: Those of transformers' `generate`. torch's per-thread switches (autocast) do not reach it.

    Returns:
        An iterator over pieces of text. Errors of `generate` are raised with the first piece.

    Raises:
        ValueError: Several prompts or answers are asked for, or a stop string is empty.
    """
    if isinstance(prompt, Prefill) and prompt.ids_BT.shape[0] != 1:
        raise ValueError(f"one prompt can be streamed, got a prefill of {prompt.ids_BT.shape[0]}: use generate")
    if not isinstance(prompt, str | Prefill):
        raise ValueError(f"one prompt can be streamed, got a {type(prompt).__name__}: give a string, or use generate")
    for name in ("num_beams", "num_return_sequences"):
        if (options.get(name) or 1) != 1:
            raise ValueError(f"one answer can be streamed, got {name}={options[name]}: use generate")
    queue: _Queue = SimpleQueue()
    detokenizer = IncrementalDetokenizer(gem, sink=queue.put, stop=stop, max_new_tokens=max_new_tokens)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), detokenizer])
    options["max_new_tokens"] = max_new_tokens
    return TextStream(_pieces(gem, prompt, detokenizer, queue, seed, options), detokenizer)


def stream_chat(gem: GemModel, messages: Sequence[Message], **options: Any) -> TextStream:
    """Answer a conversation in pieces, as `GemModel.chat` does.

    Args:
        gem: The model.
        messages: ``role`` and ``content`` of each message, the oldest first.
        options: Those of `GemModel.prefill_chat` and of `stream`.
    """
    with gem.lock:
        prefill = gem.prefill_chat(messages, **pop_chat_options(options))
    return stream(gem, prefill, **options)


def _pieces(
    gem: GemModel,
    prompt: str | Prefill,
    detokenizer: IncrementalDetokenizer,
    queue: _Queue,
    seed: int | None,
    options: dict[str, Any],
) -> Generator[str, None, None]:
    def work() -> None:
        try:
            with gem.lock, _seeded(seed, gem.device):
                if not detokenizer.closed.is_set():
                    prefill = gem.prefill(prompt) if isinstance(prompt, str) else prompt
                    detokenizer.prompt_tokens = prefill.ids_BT.shape[1]
                    text = gem.generate(prefill, **options)
                    detokenizer.finish(text if isinstance(text, str) else text[0])
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    # Not a daemon: torch must not compute while the interpreter shuts down.
    threading.Thread(target=copy_context().run, args=(work,), name="gemify-stream").start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        # Not joined: the thread may be waiting for the lock, which whoever drops this stream may hold.
        detokenizer.closed.set()


class IncrementalDetokenizer(StoppingCriteria):
    """Token ids in, pieces of text out: whole characters, up to a stop string.

    Given to transformers' `generate` as a stopping criterion, it reads the tokens itself; `finish` takes the final
    text.

    Args:
        gem: The model.
        sink: Called with each piece.
        stop: The text ends before the first of these strings.
        max_new_tokens: When generation ends at the latest, for ``finish_reason``.
        min_new_tokens: Stop strings that are complete earlier do not count.
        skip_special_tokens: Leave control tokens out of the text. False: only those that end it.
        prompt_tokens: How many of the criterion's first ids are the prompt's.

    Attributes:
        ids: Tokens generated so far.
        eos_ids: Ids that end a text.
        stop_string: The stop string that ended the text.
        closed: Set it to end generation after the token that is being computed.
    """

    def __init__(
        self,
        gem: GemModel,
        *,
        sink: Callable[[str], None],
        stop: str | Sequence[str] | None = None,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        skip_special_tokens: bool = True,
        prompt_tokens: int = 0,
    ) -> None:
        self._stops = [stop] if isinstance(stop, str) else list(stop or ())
        if odd := [s for s in self._stops if not isinstance(s, str) or not s]:
            raise ValueError(f"a stop string must have at least one character, got {odd[0]!r}: leave it out")
        self.closed = threading.Event()
        self.prompt_tokens = prompt_tokens
        self.ids: list[int] = []
        self._sink, self._max_new_tokens, self._tokenizer = sink, max_new_tokens, gem.tokenizer
        self._min_new_tokens, self._skip_special_tokens = min_new_tokens, skip_special_tokens
        self.eos_ids = find_eos_ids(gem.lm, gem.tokenizer)
        # A token may decode differently at the start of a text: new tokens are decoded after those of the last piece.
        self._from = self._read = 0
        self._text = ""
        self._sent = 0
        self.stop_string: str | None = None

    @property
    def text(self) -> str:
        """The text given to ``sink`` so far."""
        return self._text[: self._sent]

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the text ended: see `TextStream.finish_reason`."""
        full = len(self.ids) >= self._max_new_tokens and self.ids[-1] not in self.eos_ids
        return "length" if full and self.stop_string is None else "stop"

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Read the new tokens, as a stopping criterion: True where generation ends."""
        ended = self.append(input_ids[0, self.prompt_tokens + len(self.ids) :].tolist())
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device)

    def append(self, ids: Sequence[int]) -> bool:
        """Add tokens and give out the text they complete.

        Returns whether a stop string or the reader ends the text here.
        """
        self.ids.extend(ids)
        before, now = self._decode(self._from, self._read), self._decode(self._from, len(self.ids))
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._from, self._read = self._read, len(self.ids)
            self._send(now[len(before) :])
        return self.stop_string is not None or self.closed.is_set()

    def finish(self, text: str | None = None) -> None:
        """Give out the rest of the text (None: it is decoded here)."""
        if self.stop_string is None:
            whole = self._decode(0, len(self.ids)) if text is None else text
            self._send(whole[len(self._text) :], last=True)

    def _decode(self, start: int, end: int) -> str:
        ids = self.ids[start:end]
        if not self._skip_special_tokens:
            ids = [i for i in ids if i not in self.eos_ids]
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens))

    def _send(self, new: str, *, last: bool = False) -> None:
        """Give out everything that cannot be the beginning of a stop string."""
        self._text += new
        stops = self._stops if len(self.ids) >= self._min_new_tokens else []
        found = [(at, s) for s in stops if (at := self._text.find(s, self._sent)) >= 0]
        self.stop_string = min(found)[1] if found else None
        held = 0 if last else max((_partial_stop(s, self._text[self._sent :]) for s in stops), default=0)
        until = min(found)[0] if found else len(self._text) - held
        if until > self._sent:
            self._sink(self._text[self._sent : until])
            self._sent = until


def _partial_stop(stop: str, text: str) -> int:
    """Length of the longest beginning of the stop string that ends the text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
