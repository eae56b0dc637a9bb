"""Files of lines that are whole or do not count, whenever the process ends."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upweight.shards.disk import append, sync

__all__ = ["append_log", "log_name", "logs", "read_log"]


def log_name(writer: int) -> str:
    """The log of one of several writers, who each have their own."""
    return "done.log" if writer == 0 else f"done.{writer}.log"


def logs(folder: Path) -> list[Path]:
    """All that are there."""
    return sorted(folder.glob("done*.log"))


def append_log(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, with its checksum in front."""
    text = json.dumps(entry)
    append(path, f"{_checksum(text)} {text}\n".encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """All entries up to the first that is not whole, which is cut off with what follows."""
    if not path.exists():
        return []
    content = path.read_bytes()
    entries: list[dict[str, Any]] = []
    good = 0
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.decode("utf-8", "replace").partition(" ")
        if not text.endswith("\n") or _checksum(text[:-1]) != checksum:
            break
        good += len(line)
        entries.append(json.loads(text))
    if good < len(content):
        os.truncate(path, good)
        sync(path)
    return entries


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
