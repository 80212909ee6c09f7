"""Errors as one line of text."""

from __future__ import annotations


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text.

    Args:
        error: An exception, or a message.

    Returns:
        The first line without surrounding white space; the exception's type name if it has no text.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
