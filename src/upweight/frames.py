"""Whose line a warning points to."""

from __future__ import annotations

import inspect

__all__ = ["users_frame"]


def users_frame() -> int:
    """The stack level of the call that came from outside the package, for `warnings.warn`."""
    # Python 3.12 has skip_file_prefixes for this.
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("upweight."):
        level, frame = level + 1, frame.f_back
    return level
