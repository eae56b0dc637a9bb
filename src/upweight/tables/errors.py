"""`TableError`: what is wrong with a table, and what to do, in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

__all__ = ["TableError", "quoted", "told_error", "unknown_column"]

SHOWN = 12


class TableError(ValueError):
    """A table that cannot be used as it is. The message is one line that says what to do."""


def quoted(value: object, length: int = 40) -> str:
    """A value as it may stand in a message: on one line, in quotes, and not too long."""
    text = str(value)
    text = text if len(text) <= length else text[: length - 1] + "…"
    return repr(text)


def told_error(error: OSError) -> str:
    """What the system says, without the path."""
    return str(error) if error.errno is None else os.strerror(error.errno)


def unknown_column(name: str, names: Iterable[str], *, role: str = "column") -> TableError:
    """There is no such column: which one was meant, and which there are."""
    names = list(names)
    lower = {other.casefold(): other for other in reversed(names)}
    near = difflib.get_close_matches(name.strip().casefold(), list(lower), n=1, cutoff=0.6)
    listed = ", ".join(quoted(other) for other in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    meant = f"did you mean {quoted(lower[near[0]])}? The" if near else "the"
    return TableError(f"no {role} {quoted(name)}; {meant} columns are {listed}{more}")
