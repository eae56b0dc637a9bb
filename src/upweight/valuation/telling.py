"""Warnings about values: what is missing in them."""

from __future__ import annotations

import warnings
from typing import Any

from upweight.frames import users_frame

__all__ = ["ValueWarning", "tell", "tell_failed"]


class ValueWarning(UserWarning):
    """Values that did not converge, or of which some utilities are missing."""


def tell(text: str) -> None:
    """Warn, at the line of the user."""
    warnings.warn(text, ValueWarning, stacklevel=users_frame())


def tell_failed(
    failed: int, asked: int, failures: Any, so: str = "count nowhere: values are of the others"
) -> None:
    """Warn of utilities that failed, and what follows; nothing if there are none."""
    if failed:
        first = failures.iloc[0]
        tell(
            f"{failed:,} of {asked:,} utilities could not be computed, and {so}; the first, of "
            f"{first['size']} rows: {first['error']} (see .failures)"
        )
