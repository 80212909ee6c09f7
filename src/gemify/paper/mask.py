"""The GEM attention mask (GEM, Fig. 3) as one predicate, and its dense form for tests and drawings.

    prefix tokens   causal among themselves
    special tokens  see the whole prefix and themselves, not each other
    suffix tokens   see all special tokens and earlier suffix tokens, no prefix token

So all that the suffix knows of the prefix has passed through the special tokens. Rows are queries, ``#`` marks the keys
that they see:

>>> print(draw("ppp ss xx"))
      p p p s s x x
    p # . . . . . .
    p # # . . . . .
    p # # # . . . .
    s # # # # . . .
    s # # # . # . .
    x . . . # # # .
    x . . . # # # #

A row without special tokens is plain causal; a hidden prefix token (``h``) is unseen by the special tokens only:

>>> print(draw("php s"))
      p h p s
    p # . . .
    h # # . .
    p # # # .
    s # . # #
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemify.paper.tokens import Segment

LETTERS: dict[str, Segment] = {
    "_": Segment.PAD,
    "p": Segment.TEXT,
    "h": Segment.HIDDEN,
    "s": Segment.SPECIAL,
    "x": Segment.SUFFIX,
}


# Plain numbers: a compiled mask (FlexAttention) confuses members of an enumeration.
_TEXT, _HIDDEN, _SPECIAL, _SUFFIX = (int(s) for s in (Segment.TEXT, Segment.HIDDEN, Segment.SPECIAL, Segment.SUFFIX))


def may_attend(query_segment: Tensor, key_segment: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The GEM rule: whether a query may look at a key. Causality, padding and windows are the model's own.

    Args:
        query_segment: `Segment` codes of the queries.
        key_segment: `Segment` codes of the keys.
        query: Positions of the queries.
        key: Positions of the keys. All four broadcast against each other.

    Returns:
        True where GEM does not forbid it.
    """
    from_special = query_segment == _SPECIAL
    to_other_special = (key_segment == _SPECIAL) & (query != key)
    to_hidden = key_segment == _HIDDEN
    from_suffix = query_segment == _SUFFIX
    to_prefix = (key_segment == _TEXT) | to_hidden
    return ~((from_special & (to_other_special | to_hidden)) | (from_suffix & to_prefix))


def dense_mask(segments_BT: Tensor) -> Tensor:
    """Return the visibility matrix [B, T, T] of `Segment` codes [B, T], causality and padding included."""
    T = segments_BT.shape[1]
    position = torch.arange(T, device=segments_BT.device)
    q_T1, k_1T = position[:, None], position[None, :]
    seen_BTT = may_attend(segments_BT[:, :, None], segments_BT[:, None, :], q_T1, k_1T)
    return seen_BTT & (k_1T <= q_T1) & (segments_BT != Segment.PAD)[:, None, :]


def draw(letters: str) -> str:
    """Draw the visibility of a row written in letters: p prefix, h hidden, s special, x suffix, _ padding."""
    letters = letters.replace(" ", "")
    seen_TT = dense_mask(torch.tensor([[int(LETTERS[c]) for c in letters]]))[0]
    lines = ["  " + " ".join(letters)]
    lines += [c + " " + " ".join("#" if v else "." for v in row) for c, row in zip(letters, seen_TT, strict=True)]
    return "\n".join("    " + line for line in lines)
