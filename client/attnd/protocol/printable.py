"""Text that others chose, made fit for terminals and text logs."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` on one line, with each character escaped that a terminal would not show as one.

    Control characters begin a line or move the cursor, the marks of Unicode for direction swap what stands around them,
    and others take no room. So `"a\nb"` becomes `a\nb` of four characters, and U+202E becomes `\u202e`. What is shown
    stays as it is, in whatever language; a backslash is shown, and so it stays too.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)
