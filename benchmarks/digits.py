"""Six methods on handwritten digits beside pyDVL and dattri: 4,810 parameters, 1,000 × 300 rows.

    .venv/bin/python benchmarks/digits.py

Trains a 64-64-10 network on scikit-learn's digits, then lets the libraries compute the same scores
with the same damping, one thread each. The reference is the exact Hessian in float64. Writes
``benchmarks/results/digits.json``. The first call in a process is compared, because some peers need
half a minute for it; where a peer is quick enough to be called again, the warm calls are as well.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tables import (
    PEER_METHODS,
    RESULTS,
    need_peers,
    ratio,
    run,
    show,
    stamp,
    summary,
    versions,
    write,
)

# `tables` has put the folder of peers on the path
from common import Problem, build_model, save_problem  # isort: skip

import upweight as uw

# method: our settings of it
METHODS = {
    "direct": ["direct"],
    "cg": ["cg", "cg-nystroem-50", "cg-nystroem-50-loose"],
    "lissa": ["lissa", "lissa-loose"],
    "arnoldi": ["arnoldi"],
    "nystroem": ["nystroem", "nystroem-15"],
    "ekfac": ["ekfac"],
}
OURS = [*(setting for settings in METHODS.values() for setting in settings), "direct-ggn"]
QUICK = ["direct", "cg-nystroem-50", "ekfac"]
OUR_BUDGET = 120  # seconds; ours always run again
# Errors below these are the round-off of float32, and equal. Near-zero references make the first
# much larger than the second.
ROUND_OFF = {"error_percent": 0.05, "relative_norm": 1e-5}


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


def exact(problem: Problem) -> np.ndarray:
    """Influence by the exact Hessian in float64."""
    influence = uw.Influence(
        build_model(problem).double(),
        F.cross_entropy,
        "direct",
        curvature="hessian",
        damping=problem.damping,
    )
    influence.fit((problem.x_train.double(), problem.y_train))
    return influence.scores((problem.x_test.double(), problem.y_test)).values.numpy()


def no_worse(ours: dict[str, Any], peer: dict[str, Any]) -> bool:
    """Whether both errors of the mean influence are at most the peer's, or round-off."""
    return all(ours[key] <= max(peer[key], floor) for key, floor in ROUND_OFF.items())


def compare(table: dict[str, Any], library: str, method: str) -> dict[str, Any]:
    """A peer's method beside the fastest setting of ours that is at least as exact."""
    theirs = f"{library} {PEER_METHODS[library][method]}"
    settings = [f"upweight {setting}" for setting in METHODS[method]]
    settings = [line for line in settings if "error" not in table[line]]
    if not settings:
        return {"peer": theirs, "faster": False, "note": "ours gave no answer"}
    if "error" in table[theirs]:
        return {"peer": theirs, "note": "the peer gave no answer"}
    good = [line for line in settings if no_worse(table[line], table[theirs])]
    again = table[theirs]["warm_runs"] > 0
    ours = min(good or settings, key=lambda line: table[line]["warm_s" if again else "first_s"])
    over = ratio(table, theirs, ours)
    return {
        "peer": theirs,
        "ours": ours,
        "peer_over_ours": {
            "first_s": over["first_s"],
            "warm_s": over["warm_s"] if again else None,
            "peak_mb": table[theirs]["peak_mb"] / table[ours]["peak_mb"],
        },
        "error_percent": [table[theirs]["error_percent"], table[ours]["error_percent"]],
        "relative_norm": [table[theirs]["relative_norm"], table[ours]["relative_norm"]],
        "relative_norm_all": [table[theirs]["relative_norm_all"], table[ours]["relative_norm_all"]],
        "error_no_worse": bool(good),
        "faster": bool(good) and over["first_s"] > 1,
        "faster_warm": bool(good) and over["warm_s"] > 1 if again else None,
    }


def show_pairs(pairs: list[dict[str, Any]]) -> None:
    """Print peer over ours."""
    print(
        f"\n{'':48}{'peer over ours:':>22}{'error %:':>19}{'norm:':>18}"
        "  faster at equal or better error"
    )
    print(
        f"{'peer':17}{'ours':31}{'first':>7}{'warm':>7}{'memory':>8}{'theirs, ours':>19}"
        f"{'theirs, ours':>18}  {'first':7}{'warm'}"
    )
    answer = {True: "yes", False: "no", None: "-"}
    for pair in pairs:
        if "ours" not in pair:
            print(f"{pair['peer']:17}{pair['note']}")
            continue
        over = pair["peer_over_ours"]
        warm = "-" if over["warm_s"] is None else f"{over['warm_s']:.2f}"
        errors = "{:.4g}  {:.4g}".format(*pair["error_percent"])
        norms = "{:.1e}  {:.1e}".format(*pair["relative_norm"])
        print(
            f"{pair['peer']:17}{pair['ours']:31}{over['first_s']:7.2f}{warm:>7}"
            f"{over['peak_mb']:8.2f}{errors:>19}{norms:>18}  {answer[pair['faster']]:7}"
            f"{answer[pair['faster_warm']]}"
            f"{'' if pair['error_no_worse'] else '  (our error is worse)'}"
        )
    print("-: the peer is too slow to be called again")


def main() -> None:
    """Run all, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=3, help="warm runs, at most")
    parser.add_argument(
        "--peer-budget", type=float, default=5, help="seconds after which a peer is not run again"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"our {', '.join(QUICK)} alone; nothing is written"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "digits.json")
    options = parser.parse_args()
    if options.quick:
        options.repeat = 0
    else:
        need_peers()
    problem = digits_problem(options.damping)
    methods = {"upweight": QUICK if options.quick else OURS}
    if not options.quick:
        methods |= {library: list(of.values()) for library, of in PEER_METHODS.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(path, problem)
        found = {
            name: run(
                name,
                path,
                chosen,
                repeat=options.repeat,
                budget=OUR_BUDGET if name == "upweight" else options.peer_budget,
            )
            for name, chosen in methods.items()
        }
    reference = exact(problem)
    table = {
        f"{name} {method}": summary([found[name]], method, reference)
        for name, chosen in methods.items()
        for method in chosen
    }
    show(table)
    if options.quick:
        return
    pairs = [
        compare(table, library, method)
        for method in METHODS
        for library, of in PEER_METHODS.items()
        if method in of
    ]
    show_pairs(pairs)
    direct = ratio(table, "pydvl direct", "upweight direct")
    memory = table["pydvl direct"]["peak_mb"] / table["upweight direct"]["peak_mb"]
    write(
        options.out,
        stamp()
        | {
            "versions": {name: versions(file) for name, file in found.items()},
            "damping": options.damping,
            "methods": table,
            "pairs": pairs,
            "pydvl_over_upweight": {"first_s": direct["first_s"], "peak_mb": memory},
        },
    )


if __name__ == "__main__":
    main()
