"""How near every method comes to the exact Hessian on wine, over five trained networks.

    .venv/bin/python benchmarks/wine_methods_seeds.py

Prints a line for each seed and method, then the required bounds, and writes
``benchmarks/results/wine_methods_seeds.json``. "training": the rows of ``wine_reference.npz``, and
a seed for the initial weights and the order of training. "split": the seed decides the split and
the flipped rows as well. The methods are those of `upweight.compare`, with their own seeds at the
default, and the exact Gauss-Newton matrix in blocks, one for each layer, which shows what EK-FAC
cannot pass. It ends with an error if a bound fails. Conjugate gradients refuse a damped Hessian
with negative eigenvalues: then there is no figure, and the bound fails as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from tables import RESULTS, at_least, at_most, show_bounds, stamp, write
from wine import wine_problem

import upweight as uw
from upweight.comparison import agreement
from upweight.report.demo import WineSettings, run_wine

DAMPING = 0.1
BOUNDS = (
    at_least("cg+nystroem", "pearson", 0.99999),
    at_most("cg+nystroem", "relative_norm", 1e-4),
    at_least("cg+ekfac", "pearson", 0.99999),
    at_most("cg+ekfac", "relative_norm", 1e-4),
    at_least("lissa", "pearson", 0.9999),
    at_least("arnoldi", "pearson", 0.998),
    at_least("arnoldi(start='test')", "pearson", 0.99999),
    at_least("nystroem", "pearson", 0.999),
)
# On rows where the exact blocks themselves stay above it.
TRAINING_BOUNDS = (*BOUNDS, at_least("ekfac", "pearson", 0.97))


def trained(seed: int) -> tuple[torch.nn.Module, Any, Any]:
    """A network on the fixed rows: the model, and training and test rows."""
    problem = wine_problem()
    model = uw.MLP(problem.sizes, torch.nn.Tanh, seed=seed)
    uw.train(
        model,
        F.cross_entropy,
        problem.train,
        epochs=300,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.005, weight_decay=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300),
        seed=seed,
        progress=False,
    )
    return model, problem.train, problem.test


def walked(seed: int) -> tuple[torch.nn.Module, Any, Any]:
    """A network on rows of its own."""
    walk = run_wine(WineSettings(seed=seed, check=False, compare=False), progress=False)
    label = {name: k for k, name in enumerate(walk.data.class_names)}
    given = torch.tensor([label[name] for name in walk.rows["given"]])  # ten of them flipped
    return walk.model, (walk.data.train[0], given), walk.data.test


def table_of(model: torch.nn.Module, train: Any, test: Any) -> dict[str, dict[str, Any]]:
    """Figures of every method by its name, without times; what has none is left out."""
    found = uw.compare(
        model,
        F.cross_entropy,
        train,
        test,
        damping=DAMPING,
        curvature="hessian",
        progress=False,
    )
    blocks = uw.Influence(model, F.cross_entropy, damping=DAMPING, blocks="layer", certify=0)
    reference = torch.tensor(found.mean[found.reference].to_numpy())
    mean = blocks.fit(train).scores(test).mean().values
    return {"exact blocks": agreement(reference, mean)} | {
        str(line.pop("method")): {
            key: value
            for key, value in line.items()
            if key not in ("seconds", "peak_mib") and not pd.isna(value)
        }
        for line in found.table.to_dict("records")
    }


def main() -> None:
    """Run all seeds, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "wine_methods_seeds.json")
    options = parser.parse_args()
    seeds = 1 if options.quick else options.seeds
    torch.set_num_threads(1)
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    print(f"{'seed':12}{'method':24}{'pearson':>12}{'norm':>11}{'error %':>10}  note")
    kinds = {"training": trained, "split": walked}
    for seed in [f"{kind} {k}" for kind in kinds for k in range(seeds)]:
        kind, k = seed.split()
        tables[seed] = table_of(*kinds[kind](int(k)))
        for name, line in tables[seed].items():
            shown = (
                f"{line['pearson']:12.8f}{line['relative_norm']:11.2e}{line['error_percent']:10.4g}"
                if "pearson" in line
                else f"{'':33}"
            )
            print(f"{seed:<12}{name:24}{shown}  {line.get('note', '')}", flush=True)
    bounds = [
        {"seed": seed} | bound.check(table, f"{seed} ")
        for seed, table in tables.items()
        for bound in (TRAINING_BOUNDS if seed.startswith("training") else BOUNDS)
    ]
    show_bounds(bounds)
    refused = [seed for seed, table in tables.items() if "pearson" not in table["cg+nystroem"]]
    print("seeds where conjugate gradients gave no answer:", refused or "none")
    result = stamp() | {
        "versions": {"upweight": uw.__version__, "torch": str(torch.__version__)},
        "damping": DAMPING,
        "seeds": tables,
        "bounds": bounds,
        "cg_refused": refused,
    }
    if not options.quick:
        write(options.out, result)
    if not all(check["ok"] for check in bounds):
        sys.exit("a bound fails")


if __name__ == "__main__":
    main()
