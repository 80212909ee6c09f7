"""The GEM attention mask (GEM, Fig. 3) as one predicate, and its dense form for tests and drawings.

    prefix tokens   causal among themselves
    special tokens  see the whole prefix and themselves, not each other
    suffix tokens   see all special tokens and earlier suffix tokens, no prefix token

So all that the suffix knows of the prefix has passed through the special tokens. Drawn (rows look at columns):

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


# Plain numbers: a compiled mask (FlexAttention) takes several members of an enumeration for one and the same.
_TEXT, _HIDDEN, _SPECIAL, _SUFFIX = (int(s) for s in (Segment.TEXT, Segment.HIDDEN, Segment.SPECIAL, Segment.SUFFIX))


def allowed(query_segment: Tensor, key_segment: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What GEM takes away from a causal mask: True where ``query`` may look at ``key`` as far as GEM is concerned.

    Causality, padding, windows and packing are the model's own and are ANDed by the caller. All four arguments
    broadcast against each other; segments are `Segment` codes, the last two are column numbers.
    """
    from_special = query_segment == _SPECIAL
    to_other_special = (key_segment == _SPECIAL) & (query != key)
    to_hidden = key_segment == _HIDDEN
    from_suffix = query_segment == _SUFFIX
    to_prefix = (key_segment == _TEXT) | to_hidden
    return ~((from_special & (to_other_special | to_hidden)) | (from_suffix & to_prefix))


def dense_mask(segments_BT: Tensor) -> Tensor:
    """The whole visibility matrix [B, T, T] of `Segment` codes [B, T], causality and padding included."""
    T = segments_BT.shape[1]
    column = torch.arange(T, device=segments_BT.device)
    q_T1, k_1T = column[:, None], column[None, :]
    seen_BTT = allowed(segments_BT[:, :, None], segments_BT[:, None, :], q_T1, k_1T)
    return seen_BTT & (k_1T <= q_T1) & (segments_BT != Segment.PAD)[:, None, :]


def draw(letters: str) -> str:
    """The table for a row written in letters (p prefix, h hidden, s special, x suffix, _ padding)."""
    letters = letters.replace(" ", "")
    seen_TT = dense_mask(torch.tensor([[int(LETTERS[c]) for c in letters]]))[0]
    lines = ["  " + " ".join(letters)]
    lines += [c + " " + " ".join("#" if v else "." for v in row) for c, row in zip(letters, seen_TT, strict=True)]
    return "\n".join("    " + line for line in lines)
