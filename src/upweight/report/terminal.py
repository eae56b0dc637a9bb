"""Tables in a terminal, where text from data can neither move the cursor nor hide itself."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

__all__ = [
    "cut",
    "escaped",
    "kinds_of",
    "plain_warnings",
    "printable",
    "table",
    "width",
    "wrapped",
]

SEPARATOR = "  "
LEAST = 6  # cells of the terminal for a column that gives way to others


def printable(text: object) -> str:
    r"""The text in one line, with everything that is no visible character written as an escape.

    That are control characters, and so escape sequences; marks that turn the direction of writing;
    spaces of no width; halves of surrogate pairs; and what has no meaning in Unicode.

    Examples
    --------
    >>> printable("a\x1b[2Jb\tc\u202ed")
    'a\\x1b[2Jb c\\u202ed'
    """
    return escaped(" ".join(str(text).split()))


def escaped(text: str) -> str:
    """The same with blanks as they are, for lines that are already set."""
    text = text.replace("\xa0", " ")
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def width(text: str) -> int:
    """Cells of a terminal that a printable text takes: wide letters two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: object, cells: int) -> str:
    """The text as it is printed, shortened with an ellipsis to so many cells.

    Examples
    --------
    >>> cut("suspicious", 6)
    'suspi…'
    """
    line = printable(str(text)[: 4 * cells + 4])
    if width(line) <= cells and len(str(text)) <= 4 * cells + 4:
        return line
    room, kept = cells - 1, ""
    for character in line:
        room -= _cells(character)
        if room < 0:
            break
        kept += character
    return kept.rstrip() + "…"


def wrapped(text: object, *, indent: int = 0) -> str:
    """The text as it is printed, over several lines, of which all but the first are indented."""
    total = shutil.get_terminal_size((100, 24)).columns
    return textwrap.fill(printable(text), max(total, 40), subsequent_indent=" " * indent)


def table(
    columns: Mapping[str, Sequence[object]],
    *,
    right: Sequence[str] = (),
    last: int | None = None,
) -> str:
    """Columns side by side, in the width of the terminal.

    Parameters
    ----------
    columns
        Cells by heading. The last column is cut to what the others leave; where they leave too
        little, the widest of them is cut first.
    right
        Headings of columns that are set flush right.
    last
        Cells of the whole table; None takes the terminal's.

    Examples
    --------
    >>> print(table({"row": [7, 12], "why": ["its neighbours say no", "alone"]}, last=20))
    row  why
    7    its neighbours…
    12   alone
    """
    total = shutil.get_terminal_size((100, 24)).columns if last is None else last
    names = list(columns)
    widths = {
        name: max([width(printable(name)), *(width(cut(cell, total)) for cell in columns[name])])
        for name in names
    }
    excess = sum(widths.values()) + len(SEPARATOR) * (len(names) - 1) - total
    for name in [names[-1], *sorted(names[:-1], key=lambda n: -widths[n])]:
        given = min(max(excess, 0), max(widths[name] - max(LEAST, width(printable(name))), 0))
        widths[name] -= given
        excess -= given
    lines = [[str(name) for name in names], *zip(*columns.values(), strict=True)]
    return "\n".join(
        SEPARATOR.join(
            _padded(cut(cell, widths[name]), widths[name], right=name in right)
            for name, cell in zip(names, line, strict=True)
        ).rstrip()
        for line in lines
    )


def _padded(text: str, cells: int, *, right: bool) -> str:
    space = " " * (cells - width(text))
    return space + text if right else text + space


def kinds_of(texts: Sequence[str]) -> dict[str, str]:
    """NAME=KIND, where the name may have an equals sign."""
    kinds: dict[str, str] = {}
    for text in texts:
        name, sign, kind = text.rpartition("=")
        if not sign or not name or not kind:
            raise ValueError(f"expected --kind NAME=KIND, such as zip=category; got {text!r}")
        kinds[name] = kind
    return kinds


@contextmanager
def plain_warnings() -> Generator[None]:
    """Warnings in one line, without the place in the code."""
    import warnings

    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"upweight: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
