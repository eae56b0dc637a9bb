"""Exact influence on handwritten digits beside pyDVL: 4,810 parameters, 1,000 × 300 rows.

    .venv/bin/python benchmarks/digits.py

Trains a 64-64-10 network on scikit-learn's digits, then lets both libraries compute the same scores
with the same damping, one thread each. Writes ``benchmarks/results/digits.json``. pyDVL needs half
a minute, so its only run is its first; ours is measured the same way, and warm as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from wine import HERE, PEERS, Problem, best, run, save_problem

import upweight as uw


def digits_problem(damping: float) -> Problem:
    """A trained network with its rows; the same every time."""
    torch.set_num_threads(1)
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))[:1300]
    x = torch.from_numpy(bunch.data[order] / 16).float()
    y = torch.from_numpy(bunch.target[order])
    sizes = (64, 64, 10)
    model = uw.MLP(sizes, torch.nn.ReLU, seed=0)
    uw.train(
        model,
        F.cross_entropy,
        (x[:1000], y[:1000]),
        epochs=50,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.003, weight_decay=1e-3),
    )
    return Problem(
        x_train=x[:1000],
        y_train=y[:1000],
        x_test=x[1000:],
        y_test=y[1000:],
        sizes=sizes,
        activation="relu",
        state=dict(model.state_dict()),
        damping=damping,
    )


def main() -> None:
    """Run both, print and keep the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "digits.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(path, digits_problem(options.damping))
        ours = run(Path(sys.executable), HERE / "run_upweight.py", path, "direct,direct-ggn", 3)
        peer = run(PEERS, HERE / "peers" / "run_pydvl.py", path, "direct", 0)
    wanted = peer["direct/scores"].astype(np.float64)
    difference = np.linalg.norm(ours["direct/scores"] - wanted) / np.linalg.norm(wanted)
    table = {
        "upweight direct": best([ours], "direct"),
        "upweight direct-ggn": best([ours], "direct-ggn"),
        "pydvl direct": best([peer], "direct"),
    }
    for name, line in table.items():
        print(f"{name:20}", {key: round(value, 3) for key, value in line.items()})
    ratios = {
        "first_s": table["pydvl direct"]["first_s"] / table["upweight direct"]["first_s"],
        "peak_mb": table["pydvl direct"]["peak_mb"] / table["upweight direct"]["peak_mb"],
    }
    print("relative difference of the scores:", difference)
    print("pyDVL / upweight, exact Hessian:", {k: round(v, 2) for k, v in ratios.items()})
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process",
        "versions": {
            "upweight": json.loads(str(ours["versions"])),
            "pydvl": json.loads(str(peer["versions"])),
        },
        "damping": options.damping,
        "methods": table,
        "relative_difference": float(difference),
        "pydvl_over_upweight": ratios,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
