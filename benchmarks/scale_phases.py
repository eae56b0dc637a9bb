"""Processor seconds and memory of the parts of a process; the runners of `scale.py` share it.

Needs only torch, so that the runners of the peers can import it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ENVIRONMENT = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TQDM_DISABLE")
}


def one_thread() -> None:
    """Start this program anew unless it already runs with one thread and without bars."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT)
    torch.set_num_threads(1)


def preload() -> None:
    """Load what torch loads when it is first used in some way: no library's seconds."""
    one = torch.ones(1)
    torch.func.jvp(torch.func.grad(lambda x: (x**2).sum()), (one,), (one,))
    torch.linalg.eigh(torch.eye(2))


class Phases:
    """What each part of the work takes, from here on.

    Memory is the highest resident memory of this process, in MiB: raw, and above what it has at
    the beginning, where imports, model and rows are there already.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.base_mb = _resident_mb("VmRSS")
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        """Measure a part; several of one name are added up."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark comes down
        cpu, start = cpu_seconds(), time.perf_counter()
        yield
        found = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - start}
        peak = _resident_mb("VmHWM")
        before = self.parts.get(name, {"cpu_s": 0.0, "wall_s": 0.0, "peak_raw_mb": 0.0})
        self.parts[name] = {key: before[key] + found[key] for key in found} | {
            "peak_raw_mb": max(before["peak_raw_mb"], peak)
        }

    def result(self) -> dict[str, Any]:
        """All parts, and the whole."""
        raw = max(part["peak_raw_mb"] for part in self.parts.values())
        return {
            "cpu_s": sum(part["cpu_s"] for part in self.parts.values()),
            "wall_s": sum(part["wall_s"] for part in self.parts.values()),
            "peak_mb": raw - self.base_mb,
            "peak_raw_mb": raw,
            "parts": self.parts,
        }


def cpu_seconds() -> float:
    """User and system seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def versions(library: str) -> dict[str, str]:
    """Of Python, torch and the library."""
    found = {"python": platform.python_version()}
    return found | {name: version(name) for name in ("torch", "numpy", library)}


def answer(path: Path, library: str, phases: Phases, scores: Any, **facts: Any) -> None:
    """Write what a runner found: scores (queries × rows, or None), and a text of the rest."""
    told = {"versions": versions(library), **phases.result(), **facts}
    arrays: dict[str, Any] = {}
    if scores is not None:
        arrays["scores"] = np.asarray(scores, dtype=np.float32)
    np.savez(path, told=json.dumps(told), **arrays)


def _resident_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)
