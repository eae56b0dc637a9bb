"""The wine walk-through beside pyDVL and dattri: same weights, rows and damping, one run.

    make bench                     # builds .venv-peers and runs this among others
    .venv/bin/python benchmarks/wine.py --rounds 3

Prints all methods, the required bounds and ratios, and writes ``benchmarks/results/wine.json``. It
ends with an error if a bound on an error fails. The libraries take turns, so that a busy machine
slows all; every round has another seed for what is random. Times are the best of all rounds. "Warm"
is a later call in a process, "first" the first one, which is mostly the import of parts of torch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import (
    HERE,
    PEER_METHODS,
    RESULTS,
    at_least,
    at_most,
    need_peers,
    ratio,
    run,
    show,
    show_bounds,
    stamp,
    summary,
    versions,
    write,
)
from torch import nn

sys.path.insert(0, str(HERE.parent / "tests"))

from common import Problem, save_problem

import upweight as uw
from cases import Case
from reference import Reference

DATA = HERE.parent / "tests" / "data" / "wine_reference.npz"
CORRUPTED = 10

OURS = [
    "direct",
    "direct-ggn",
    "cg",
    "cg-ekfac",
    "lissa",
    "arnoldi",
    "arnoldi-test",
    "nystroem",
    "kfac",
    "ekfac",
]
QUICK = ["direct", "cg", "ekfac"]
SIDES = {"upweight": OURS} | {peer: list(of.values()) for peer, of in PEER_METHODS.items()}
BOUNDS = (
    at_most("upweight cg", "error_percent", 0.01),
    at_most("upweight lissa", "error_percent", 1),
    at_most("upweight arnoldi", "error_percent", 9),
    at_most("upweight arnoldi-test", "error_percent", 0.1),
    at_most("upweight nystroem", "error_percent", 12.5),
    at_most("upweight ekfac", "error_percent", 340),
    at_least("upweight ekfac", "pearson", 0.978),
    at_most("upweight cg-ekfac", "error_percent", 0.01),
)
LISSA_RATIO = 5  # times as fast as pyDVL's: printed, never an error


def wine_problem(damping: float = 0.1) -> Problem:
    """Fixed weights and rows; the first ten training labels are flipped."""
    data = np.load(DATA)
    part = {name: torch.from_numpy(data[name]) for name in data.files}
    return Problem(
        x_train=part["x_train"],
        y_train=part["y_train"],
        x_test=part["x_test"],
        y_test=part["y_test"],
        sizes=(13, 16, 16, 3),
        activation="tanh",
        state={k.removeprefix("state/"): v for k, v in part.items() if k.startswith("state/")},
        damping=damping,
    )


def dense_reference(problem: Problem) -> np.ndarray:
    """Influence by the exact Hessian in float64, row by row and by inv."""
    model = uw.MLP(problem.sizes, nn.Tanh)
    model.load_state_dict(problem.state)
    case = Case(model, nn.functional.cross_entropy, problem.train, problem.test)
    return Reference(case).influence("hessian", problem.damping).numpy()


def measure(
    options: argparse.Namespace, sides: dict[str, list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """What the runners give, by library: one file for each round."""
    names = list(sides)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(path, wine_problem())
        for seed in range(options.rounds):
            for name in names:
                found[name].append(
                    run(
                        name,
                        path,
                        sides[name],
                        seed=seed,
                        repeat=options.repeat,
                        budget=options.budget,
                    )
                )
    return found


def corrupted(rounds: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Mean influence of the flipped rows, and of the others."""
    if f"{method}/scores" not in rounds[0]:
        return {}
    mean = np.mean([one[f"{method}/scores"].astype(np.float64).mean(0) for one in rounds], axis=0)
    return {
        "mean_corrupted": float(mean[:CORRUPTED].mean()),
        "mean_others": float(mean[CORRUPTED:].mean()),
    }


def show_ratios(ratios: dict[str, dict[str, float]]) -> None:
    """Print peer over ours, method by method."""
    print(f"\n{'peer / upweight, times':28}{'warm':>9}{'first':>9}")
    for name, line in ratios.items():
        print(f"{name:28}{line['warm_s']:9.2f}{line['first_s']:9.2f}")


def main() -> None:
    """Run the libraries in turns, print the tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="each with the next seed")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs a round and method")
    parser.add_argument("--budget", type=float, default=10, help="seconds of them")
    parser.add_argument(
        "--quick", action="store_true", help=f"our {', '.join(QUICK)} alone; nothing is written"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "wine.json")
    options = parser.parse_args()
    if options.quick:
        options.rounds = options.repeat = 1
    else:
        need_peers()
    torch.set_num_threads(1)
    reference = dense_reference(wine_problem())
    sides = {"upweight": QUICK} if options.quick else SIDES
    found = measure(options, sides)
    table = {
        f"{name} {method}": summary(rounds, method, reference) | corrupted(rounds, method)
        for name, rounds in found.items()
        for method in sides[name]
    }
    show(table)
    bounds = [bound.check(table) for bound in BOUNDS if bound.line in table]
    show_bounds(bounds)
    if not options.quick:
        ratios = {
            f"{peer} {theirs}": ratio(table, f"{peer} {theirs}", f"upweight {ours}")
            for peer, methods in PEER_METHODS.items()
            for ours, theirs in methods.items()
        }
        ratios = {peer: line for peer, line in ratios.items() if line}
        show_ratios(ratios)
        lissa = ratios.get("pydvl lissa", {}).get("warm_s", float("nan"))
        print(f"LiSSA: wanted {LISSA_RATIO} times as fast as pyDVL's, reached {lissa:.2f} times")
        write(
            options.out,
            stamp()
            | {
                "versions": {name: versions(rounds[-1]) for name, rounds in found.items()},
                "seeds": list(range(options.rounds)),
                "methods": table,
                "bounds": bounds,
                "pydvl_over_upweight": ratios["pydvl direct"],
                "peer_over_upweight": ratios,
            },
        )
    if not all(check["ok"] for check in bounds):
        sys.exit("a bound on an error fails")


if __name__ == "__main__":
    main()
