"""How well the wine walk-through finds its flipped labels, over twenty seeds.

    .venv/bin/python benchmarks/wine_seeds.py

Writes ``benchmarks/results/wine_seeds.json``. A seed decides the split, the flipped rows, the
initial weights and the order of training.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from tables import RESULTS, stamp, write

import upweight as uw
from upweight.report.demo import WineSettings, run_wine

QUICK_SEEDS = 2


def main() -> None:
    """Run all seeds with the settings of ``upweight demo wine``, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SEEDS} seeds; nothing is written"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "wine_seeds.json")
    options = parser.parse_args()
    seeds = QUICK_SEEDS if options.quick else options.seeds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", uw.IndefiniteCurvatureWarning)
    lines = []
    for seed in range(seeds):
        walk = run_wine(WineSettings(seed=seed, check=False, compare=False), progress=False)
        lines.append(
            {
                "seed": seed,
                "auc": walk.auc,
                "found_among_lowest_10": int(walk.suspects(10)["flipped"].sum()),
                "f1": walk.f1,
                "mean_corrupted": walk.corrupted_mean,
                "mean_others": walk.other_mean,
            }
        )
        print(lines[-1])
    areas = np.array([line["auc"] for line in lines])
    summary = {
        "mean_auc": areas.mean(),
        "mean_auc_first_5": areas[:5].mean(),
        "lowest": areas.min(),
    }
    print(summary)
    of = {"upweight": uw.__version__, "torch": str(torch.__version__)}
    if not options.quick:
        write(options.out, stamp() | {"versions": of, "summary": summary, "seeds": lines})


if __name__ == "__main__":
    main()
