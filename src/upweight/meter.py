"""Seconds and memory of a piece of work."""

from __future__ import annotations

import ctypes
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["Meter", "release_freed", "return_at_once"]


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Meter:
    """Measures what happens inside a ``with`` block.

    Attributes
    ----------
    seconds
        Wall-clock time.
    peak_mib
        By how many MiB memory grew at most: that of the device for CUDA, else the resident memory
        of the process; NaN where the system does not tell (only Linux does).

    Examples
    --------
    >>> with Meter() as meter:
    ...     _ = torch.ones(1000).sum()
    >>> meter.seconds > 0
    True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds = float("nan")
        self.peak_mib = float("nan")

    def __enter__(self) -> Meter:
        self._before = self._reset()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        self.peak_mib = max(0.0, self._peak() - self._before) / 2**20

    def _reset(self) -> float:
        """Bytes in use, with the high-water mark brought down to them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return float(torch.cuda.memory_allocated(self.device))
        if not sys.platform.startswith("linux"):
            return float("nan")
        # what was freed before would hide what is allocated now
        release_freed()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return float("nan")
        return _status("VmRSS")

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return _status("VmHWM") if sys.platform.startswith("linux") else float("nan")


def release_freed() -> None:
    """Give memory that was freed back to the system, where the allocator keeps it (glibc does).

    Between two steps of a long work, so that the second does not begin beside holes of the first.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_at_once() -> None:
    """Let the allocator of this process give tensors of a MiB or more back as they are freed.

    Otherwise glibc keeps blocks of up to 32 MiB, and the holes between them, at times as
    much as the tensors themselves. It costs time: what is given back has to be cleared when it is
    taken again. Where there is no glibc, nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024.0 * float(line.split()[1])
    return float("nan")
