"""How large a table may be once it is unpacked."""

from __future__ import annotations

import os
import re
from pathlib import Path

from upweight.tables.errors import TableError, quoted

__all__ = ["LIMIT_VARIABLE", "check_size", "size_limit", "told_size"]

LIMIT_VARIABLE = "UPWEIGHT_TABLE_LIMIT"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
UNKNOWN_MEMORY = 4 * 2**30


def size_limit(limit: int | None = None) -> int:
    """The most bytes a table may take: as given, as in the environment, or half the free memory.

    The environment variable ``UPWEIGHT_TABLE_LIMIT`` holds bytes, or a size such as ``16GB``.
    """
    if limit is not None:
        return limit
    told = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not told:
        return _free_memory() // 2
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", told.upper())
    if match is None:
        raise TableError(f"{LIMIT_VARIABLE} should be a size such as 16GB; got {quoted(told)}")
    return int(float(match[1]) * UNITS[match[2]])


def check_size(size: int, limit: int, name: str, packed: int) -> None:
    """Refuse what takes more than `limit` bytes in memory; `packed` is its size on disk."""
    if size > limit:
        raise TableError(
            f"{name} has {told_size(packed)} on disk but unpacks to {told_size(size)} or more, "
            f"over the limit of {told_size(limit)}: if you trust it and have the memory, set "
            f"{LIMIT_VARIABLE}={max(1, -(-2 * size // 2**30))}GB, or audit a part of it"
        )


def told_size(size: int) -> str:
    """``1.5 GB``."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if value < 1024 or unit == "TB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def _free_memory() -> int:
    """Bytes that the system, and a container around it, have left."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        names = [n for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if n in os.sysconf_names]
        free = page * os.sysconf(names[0])
    except (AttributeError, IndexError, OSError, ValueError):
        free = UNKNOWN_MEMORY
    try:
        # MemAvailable counts the page cache, which the system gives back when it is asked to.
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            free = min(free, max(0, int(most) - used))
    except (OSError, ValueError):
        pass
    return free
