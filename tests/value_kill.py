"""Values with a cache in a file, by a process that may be killed: python value_kill.py FOLDER RUN.

FOLDER/calls grows by a byte for each utility that is computed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from upweight.valuation import FunctionUtility, UtilityCache, banzhaf, engine, shapley

WORTH = np.random.default_rng(0).standard_normal(14)


def main(folder: Path, run: str) -> None:
    engine.HELD_BACK, engine.CHUNK = 0.02, 8
    with (folder / "calls").open("ab", buffering=0) as calls:

        def utility(rows: np.ndarray) -> float:
            calls.write(b".")
            time.sleep(0.001)
            return float(np.tanh(2 * WORTH[rows].sum()) + 0.01 * len(rows))

        cache = UtilityCache(folder / "utilities.db")
        u = FunctionUtility(utility, 14, fingerprint="fourteen", cache=cache)
        if run == "subsets":
            values = banzhaf(u, until=1_200)
        else:
            values = shapley(u, truncation=0.1 if run == "truncated" else None, until=1_200)
    values.save(folder / "values.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
