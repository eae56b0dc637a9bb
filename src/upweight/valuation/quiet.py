"""Warnings that are not shown while utilities are computed, in any number of threads."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet"]


class _Shared:
    """What all threads have in common: who is in, and the filters before the first came."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active: Counter[Callable[[], None]] = Counter()
        self.outer = warnings.catch_warnings()
        self.filters: list[Any] = []

    def enter(self, ignore: Callable[[], None]) -> None:
        with self.lock:
            if not self.active:
                self.outer = warnings.catch_warnings()
                self.outer.__enter__()
                self.filters = list(warnings.filters)
            self.active[ignore] += 1
            if self.active[ignore] == 1:
                ignore()

    def leave(self, ignore: Callable[[], None]) -> None:
        with self.lock:
            self.active[ignore] -= 1
            if self.active[ignore]:
                return
            del self.active[ignore]
            if not self.active:
                self.outer.__exit__(None, None, None)
                return
            warnings.resetwarnings()
            warnings.filters.extend(self.filters)  # pyright: ignore
            for other in self.active:
                other()


_shared = _Shared()


@contextmanager
def quiet(ignore: Callable[[], None]) -> Generator[None]:
    """Context under the filters that `ignore` adds; afterwards they are as they were.

    `warnings.catch_warnings` puts back what it found, and in another thread that may be what was
    meant for a while only. So the first to come keeps the filters, and the last to go puts them
    back.

    Parameters
    ----------
    ignore
        A function that calls `warnings.filterwarnings`; the same object each time.
    """
    if getattr(sys.flags, "context_aware_warnings", False):  # every thread has filters of its own
        with warnings.catch_warnings():
            ignore()
            yield
        return
    _shared.enter(ignore)
    try:
        yield
    finally:
        _shared.leave(ignore)
