"""What stands around every text that is embedded: words that tell the base what is wanted of the text.

The base reads them as it reads any words, so that they help without a weight being trained. ``{text}`` is the text; the
special tokens come after all of it. Next-token rows, prompts and chats have no template.
"""

from __future__ import annotations

TEXT = "{text}"
PLAIN = TEXT
"""No words at all: the paper's way."""
PROMPTEOL = 'This sentence : "{text}" means in one word:"'
"""Of PromptEOL (arXiv 2307.16645)."""


def require_template(template: str, *, k: int) -> None:
    """Refuse what is no template, and one for a model without special tokens: its vector is a mean over the text."""
    if not isinstance(template, str) or template.count(TEXT) != 1:
        raise ValueError(f"template must hold {TEXT} exactly once, got {template!r}")
    if k == 0 and template != PLAIN:
        raise ValueError(f"template {template!r} needs special tokens to read it, there are 0: leave it out")


def around(template: str) -> tuple[str, str]:
    """What stands before the text and what after it."""
    before, after = template.split(TEXT)
    return before, after
