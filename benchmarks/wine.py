"""The wine walk-through beside pyDVL: same weights, rows and damping, one run, one thread each.

    make bench                     # builds .venv-peers and runs this
    .venv/bin/python benchmarks/wine.py --rounds 5

Prints ratios and writes ``benchmarks/results/wine.json``. The two libraries take turns, so that a
busy machine slows both; of several rounds the best times of each count. "Warm" is a second call in
a process, "first" the first one, which for both is mostly the import of parts of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "peers"), str(HERE.parent / "tests")]

from common import ENVIRONMENT, Problem, save_problem  # noqa: E402
from torch import nn  # noqa: E402

import upweight as uw  # noqa: E402
from cases import Case  # noqa: E402
from reference import Reference  # noqa: E402

DATA = HERE.parent / "tests" / "data" / "wine_reference.npz"
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
CORRUPTED = 10


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


def dense_reference(problem: Problem) -> Tensor:
    """Influence by the exact Hessian in float64, row by row and by inv."""
    model = uw.MLP(problem.sizes, nn.Tanh)
    model.load_state_dict(problem.state)
    case = Case(model, nn.functional.cross_entropy, problem.train, problem.test)
    return Reference(case).influence("hessian", problem.damping)


def run(python: Path, runner: Path, problem: Path, methods: str, repeat: int) -> dict[str, Any]:
    """One runner in a process of its own: its results by key."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [python, runner, problem, out, "--methods", methods, "--repeat", str(repeat)]
        subprocess.run(
            list(map(str, command)), check=True, env=os.environ | ENVIRONMENT, stdout=sys.stderr
        )
        with np.load(out, allow_pickle=False) as data:
            return {key: data[key][()] for key in data.files}


def accuracy(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far the mean influence and the whole matrix are from the reference."""
    mean, wanted = scores.mean(0), reference.mean(0)
    return {
        "error_percent": float(100 * np.mean(np.abs((mean - wanted) / wanted))),
        "pearson": float(np.corrcoef(mean, wanted)[0, 1]),
        "relative_norm": float(np.linalg.norm(scores - reference) / np.linalg.norm(reference)),
        "mean_corrupted": float(mean[:CORRUPTED].mean()),
        "mean_others": float(mean[CORRUPTED:].mean()),
    }


def best(rounds: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Best times over the rounds; fit and scores of one round belong together."""
    warm = min(rounds, key=lambda r: r[f"{method}/fit_s"] + r[f"{method}/scores_s"])
    return {
        "fit_s": float(warm[f"{method}/fit_s"]),
        "scores_s": float(warm[f"{method}/scores_s"]),
        "warm_s": float(warm[f"{method}/fit_s"] + warm[f"{method}/scores_s"]),
        "first_s": min(float(r[f"{method}/first_s"]) for r in rounds),
        "peak_mb": max(float(r[f"{method}/peak_mb"]) for r in rounds),
    }


def main() -> None:
    """Run both libraries in turns, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="our side alone, one round")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "wine.json")
    options = parser.parse_args()
    problem = wine_problem()
    reference = dense_reference(problem).numpy()
    sides = {"upweight": (Path(sys.executable), HERE / "run_upweight.py", "direct,direct-ggn")}
    if not options.quick:
        if not PEERS.exists():
            parser.error(f"no peers at {PEERS.parent.parent.name}: run make bench, or use --quick")
        sides["pydvl"] = (PEERS, HERE / "peers" / "run_pydvl.py", "direct")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(path, problem)
        for _ in range(1 if options.quick else options.rounds):
            for name, (python, runner, methods) in sides.items():
                found[name].append(run(python, runner, path, methods, options.repeat))
    table = {
        f"{name} {method}": best(rounds, method)
        | accuracy(rounds[-1][f"{method}/scores"].astype(np.float64), reference)
        for name, rounds in found.items()
        for method in sides[name][2].split(",")
    }
    report(table, {name: json.loads(str(r[-1]["versions"])) for name, r in found.items()}, options)


def report(table: dict[str, Any], versions: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table and, after a full run, keep it."""
    print(f"{'':22}{'fit ms':>9}{'scores ms':>11}{'first s':>9}{'MiB':>7}{'error %':>10}{'r':>9}")
    for name, line in table.items():
        print(
            f"{name:22}{1e3 * line['fit_s']:9.1f}{1e3 * line['scores_s']:11.1f}"
            f"{line['first_s']:9.2f}{line['peak_mb']:7.1f}{line['error_percent']:10.4f}"
            f"{line['pearson']:9.5f}"
        )
    if options.quick:
        return
    peer, ours = table["pydvl direct"], table["upweight direct"]
    ratios = {key: peer[key] / ours[key] for key in ("fit_s", "scores_s", "warm_s", "first_s")}
    print("pyDVL / upweight, exact Hessian:", {k: round(v, 2) for k, v in ratios.items()})
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process",
        "versions": versions,
        "methods": table,
        "pydvl_over_upweight": ratios,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
