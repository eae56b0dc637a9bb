"""Seconds and memory of the command line on tables of many rows; a part of `audit.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tables import HERE

from upweight.evaluate import detection

NUMBERS, CATEGORIES, GROUPS = 20, 10, 3
LEVELS = 8
FLIPPED, MISSING = 0.03, 0.02
CHUNK = 100_000
SMALL, LARGE = 20_000, 1_000_000


def write_table(path: Path, rows: int, seed: int) -> np.ndarray:
    """A CSV of 20 numbers, 10 categories and a class of three; which labels are wrong.

    A row has a class at random. Half of the numbers are normal around means of the class, the
    others sums of them with noise; a category has the shares of the class. 3 % of the labels are
    another class, 2 % of the numbers are missing.
    """
    rng = np.random.default_rng(seed)
    means = rng.normal(0, 1.2, (GROUPS, NUMBERS // 2))
    mixing = rng.normal(0, 0.5, (NUMBERS // 2, NUMBERS // 2))
    shares = rng.dirichlet(np.full(LEVELS, 0.7), (GROUPS, CATEGORIES))
    wrong = []
    for start in range(0, rows, CHUNK):
        n = min(CHUNK, rows - start)
        group = rng.integers(GROUPS, size=n)
        first = means[group] + rng.normal(size=(n, NUMBERS // 2))
        numbers = np.hstack([first, first @ mixing + 0.5 * rng.normal(size=first.shape)])
        numbers = numbers.round(4)
        numbers[rng.random(numbers.shape) < MISSING] = np.nan
        frame = pd.DataFrame(numbers, columns=[f"number_{j}" for j in range(NUMBERS)])
        for j in range(CATEGORIES):
            drawn = (rng.random(n)[:, None] > shares[group, j].cumsum(axis=1)).sum(axis=1)
            levels = np.array([f"level_{v}" for v in range(LEVELS)])
            frame[f"category_{j}"] = levels[np.minimum(drawn, LEVELS - 1)]
        flipped = rng.random(n) < FLIPPED
        shift = np.where(flipped, rng.integers(1, GROUPS, n), 0)
        frame["target"] = np.array(["red", "green", "blue"])[(group + shift) % GROUPS]
        frame.to_csv(path, mode="a" if start else "w", header=not start, index=False)
        wrong.append(flipped)
    return np.concatenate(wrong)


def measure(rows: int, threads: int, seed: int = 1000) -> dict[str, Any]:
    """``upweight audit`` on such a table: seconds by step, highest resident memory, AUC."""
    with tempfile.TemporaryDirectory() as folder:
        path, run, out = (Path(folder) / name for name in ("table.csv", "run", "measured.json"))
        wrong = write_table(path, rows, seed)
        command = [Path(sys.executable).parent / "upweight", "audit", path, "--target", "target"]
        command += ["--out", run, "--quiet"]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        load = os.getloadavg()[0]
        subprocess.run(
            list(map(str, [sys.executable, HERE / "measured.py", out, *command])),
            check=True,
            env=os.environ | dict.fromkeys(names, str(threads)),
            stdout=sys.stderr,
        )
        found = json.loads(out.read_text(encoding="utf-8"))
        if found.pop("exit_code"):
            raise RuntimeError(f"upweight audit failed on {rows:,} rows")
        steps = json.loads((run / "summary.json").read_text(encoding="utf-8"))["seconds"]
        columns = ["row", "suspicion", "label_flag"]
        judged = pd.read_parquet(run / "rows.parquet", columns=columns)
        return {
            "rows": rows,
            "columns": NUMBERS + CATEGORIES,
            "threads": threads,
            "file_mb": path.stat().st_size / 2**20,
            "report_mb": (run / "report.html").stat().st_size / 2**20,
            **found,
            "load": load,
            "steps": steps,
            "auc": detection(judged["suspicion"], wrong, low_is_suspicious=False).auc,
            "flagged": float(judged["label_flag"].mean()),
        }
