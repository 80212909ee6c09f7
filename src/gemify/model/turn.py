"""Whose turn it is: one lock for each loaded model, for code that is called from many threads.

The passes themselves keep their state in ContextVars. What threads share is the tokenizer's switches (a text that spells
a special token flips one), torch's random numbers (a seed means nothing if another generation draws too), the meter,
and the cores. So a caller that does not own the model alone takes a turn around each call.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from gemify.model.gem import GemModel

_locks: WeakKeyDictionary[GemModel, Any] = WeakKeyDictionary()
_making = threading.Lock()


def turn(gem: GemModel) -> AbstractContextManager[bool]:
    """``with turn(gem):`` runs alone on this model. A thread that has the turn may take it again."""
    with _making:
        lock: AbstractContextManager[bool] = _locks.setdefault(gem, threading.RLock())
    return lock
