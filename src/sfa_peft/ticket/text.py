"""Text that others have chosen, such as the names of modules, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with an escape such as ``\x1b`` in place of each character that is not printable.

    These are control characters, which a terminal obeys, line breaks, marks of the direction of writing, which reorder
    what is read, and surrogates, which UTF-8 cannot encode. Printable text stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
