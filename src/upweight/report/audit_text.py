"""Words and numbers for the page of an audit: text from data made visible, counts, shares."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "CELL",
    "a_number",
    "cell_text",
    "counted",
    "cut",
    "cut_middle",
    "estimate_text",
    "listed",
    "name_text",
    "share",
    "visible",
]

UNIT = "\N{NO-BREAK SPACE}%"
CELL = 200  # characters of a cell that are shown

# Format characters that are seen, or that scripts need to be written right.
_HARMLESS = frozenset(
    "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
)
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_NAMES = {"\t": "tab", "\n": "newline", "\r": "return"}


def visible(value: object) -> str:
    r"""Text with every character seen that would be hidden, or would turn the text around it.

    These are control characters, marks of direction and of no width.

    Examples
    --------
    >>> visible("a\tb\u202ec")
    'a⟦tab⟧b⟦U+202E⟧c'
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(c) for c in text)


def _visible(c: str) -> str:
    code, category = ord(c), unicodedata.category(c)
    if category in _HIDDEN and c not in _HARMLESS:
        return f"⟦{_NAMES.get(c) or f'U+{code:04X}'}⟧"
    return c


def name_text(name: object, limit: int = 60) -> str:
    """The name of a column or class: visible, cut, never nothing."""
    text = str(name)
    return cut(visible(text[: limit + 1]), limit) if text.strip() else "(blank)"


def cut(text: str, limit: int = CELL) -> str:
    """Text of at most so many characters, the last one an ellipsis where it was longer."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def cut_middle(text: str, limit: int) -> str:
    """Text of at most so many characters, which keeps its end: it often tells names apart.

    Examples
    --------
    >>> cut_middle("customer-number-0001234", 12)
    'custome…1234'
    """
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def cell_text(value: Any, limit: int = CELL) -> str:
    """A cell as text: visible, cut, and an en dash where it is missing."""
    if value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value))):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return a_number(float(value))
    if isinstance(value, pd.Timestamp) and value == value.normalize():
        return str(value.date())
    text = str(value)
    return cut(visible(text[: limit + 1]), limit) if text.strip() else "(blank)"


def estimate_text(value: Any, limit: int = CELL) -> str:
    """What models say a cell should be: as `cell_text`, and a number with five digits.

    Examples
    --------
    >>> estimate_text("103.27907996"), estimate_text("yes"), estimate_text("007")
    ('103.28', 'yes', '007')
    """
    text = cell_text(value, limit)
    if len(text) <= 6:
        return text
    try:
        return a_number(float(text), 5)
    except ValueError:
        return text


def a_number(value: float, digits: int = 6) -> str:
    """A number as short as it can be written with so many digits.

    Examples
    --------
    >>> a_number(3.0), a_number(0.1 + 0.2), a_number(1234567.0)
    ('3', '0.3', '1234567')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else f"{value}"
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.{digits}g}"


def share(value: float) -> str:
    r"""A share in per cent, with as many digits as tell it from 0 and from 100.

    Examples
    --------
    >>> [share(value).replace("\xa0", " ") for value in (0.07, 0.0071, 0.99996)]
    ['7 %', '0.7 %', 'more than 99.9 %']
    """
    per_cent = 100 * value
    if 0 < per_cent < 0.1:
        return f"less than 0.1{UNIT}"
    if 99.9 < per_cent < 100:
        return f"more than 99.9{UNIT}"
    fine = per_cent < 2 or 98 < per_cent < 100
    text = f"{per_cent:.1f}".removesuffix(".0") if fine else f"{per_cent:.0f}"
    return text + UNIT


def counted(number: int, one: str, more: str = "") -> str:
    """A number with its noun.

    Examples
    --------
    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def listed(words: list[str], most: int = 3) -> str:
    """Words in a sentence: the first ones, and how many more there are.

    Examples
    --------
    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most:,} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
