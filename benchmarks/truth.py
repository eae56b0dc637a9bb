"""How true are the scores? Every method of every library against 100 retrained models.

    .venv/bin/python benchmarks/truth.py

Two networks on handwritten digits, whose test margins after retraining on random half subsets of
the rows are known (files in the folder UPWEIGHT_DATA, by default ``data`` beside this file).
Every method scores the same weights and rows over the same dampings, one thread each; its linear
datamodeling score, its seconds and its memory go to ``benchmarks/results/truth.json``. A method
that is too slow to try all dampings in ``--grid-budget`` seconds has tried fewer: the runs are in
the file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import Entry, group, measure, show, summary
from tables import HERE, RESULTS, need_peers, stamp, write

# `tables` has put the folder of peers on the path
from problems import Problem, State  # isort: skip

from upweight.evaluate import linear_datamodeling_score, prediction_score

DATA = "UPWEIGHT_DATA"
# In this order a slow method tries first what is likely to suit it.
DAMPINGS = ("0.005", "0.002", "0.01", "0.001", "0.0005", "0.1", "0.0001")
CONVERGED = 1e9  # steps of a training that was solved to machine precision
ENSEMBLE = 10  # a convex problem has one solution: its models are copies


@dataclass(frozen=True)
class Truth:
    """Half subsets of the training rows, and the margins of the test rows without the others."""

    title: str
    problem: Problem
    masks: np.ndarray
    margins: np.ndarray


def folder() -> Path:
    """Where the ground truth lies."""
    return Path(os.environ.get(DATA, HERE / "data"))


def _state(data: Mapping[str, np.ndarray], prefix: str, row: int | None = None) -> State:
    """The weights whose names begin so; of the files with several, those of one."""
    names = {key: key.removeprefix(prefix) for key in data if key.startswith(prefix)}
    arrays = {short: data[key] if row is None else data[key][row] for key, short in names.items()}
    return {short: torch.from_numpy(np.float32(array)) for short, array in arrays.items()}


def _states(data: Mapping[str, np.ndarray], prefix: str) -> tuple[State, ...]:
    count = len(data[f"{prefix}0.weight"])
    return tuple(_state(data, prefix, row) for row in range(count))


def load(name: str, title: str) -> Truth:
    """A truth file and the problem it belongs to."""
    path = folder() / f"digits_{name}_truth.npz"
    if not path.exists():
        sys.exit(f"no ground truth at {path}: set {DATA} to the folder that has {path.name}")
    with np.load(path, allow_pickle=False) as file:
        data = {key: file[key] for key in file.files}
    base = _state(data, "base/")
    weights = [value for key, value in base.items() if key.endswith("weight")]
    several = "full/0.weight" in data
    problem = Problem(
        x_train=torch.from_numpy(data["X"]),
        y_train=torch.from_numpy(data["y"]),
        x_test=torch.from_numpy(data["Xt"]),
        y_test=torch.from_numpy(data["yt"]),
        sizes=(weights[0].shape[1], *(weight.shape[0] for weight in weights)),
        activation="relu",
        state=base,
        damping=float(DAMPINGS[0]),
        models=_states(data, "full/") if several else (base,) * ENSEMBLE,
        checkpoints=_states(data, "ckpt/") if several else (),
        rates=tuple(map(float, data["ckpt_lr"])) if several else (),
        record=_record(data),
        masks=torch.from_numpy(data["masks"].astype(bool)),
    )
    return Truth(title, problem, data["masks"].astype(np.float64), data["margin"])


def _record(data: Mapping[str, np.ndarray]) -> tuple[float, ...]:
    """Steps, mean learning rate, weight decay, momentum; without an end where it converged."""
    if "lrs" not in data:
        return CONVERGED, 1.0, float(data["wd"]), 0.0
    momentum = float(data["momentum"])
    return len(data["lrs"]), float(data["lrs"].mean()), float(data["wd"]), momentum


PROBLEMS = {
    "logistic": "Logistic regression 64-10",
    "mlp": "Network 64-64-10",
}


def quality(truth: Truth, scores: np.ndarray, bootstrap: int) -> dict[str, Any]:
    """The linear datamodeling score, with its interval if there is a bootstrap."""
    predictions = scores.shape[1] == len(truth.masks)  # of every subset, instead of scores of rows
    try:
        found = (
            prediction_score(scores.T, truth.margins, bootstrap=bootstrap)
            if predictions
            else linear_datamodeling_score(scores, truth.masks, truth.margins, bootstrap=bootstrap)
        )
    except ValueError as error:
        return {"error": str(error)}
    interval = {"interval": list(found.interval)} if bootstrap else {}
    return {"lds": found.value, **interval}


def judge(truth: Truth, entries: list[Entry], bootstrap: int) -> dict[str, Any]:
    """The line of a method."""
    lines = []
    for entry in entries:
        line = entry.line()
        lines.append(line if entry.error else line | quality(truth, entry.found["scores"], 0))
    result = summary(lines, "lds")
    for chosen in ("best", "default"):
        if chosen in result:
            scores = entries[lines.index(result[chosen])].found["scores"]
            result[chosen] = result[chosen] | quality(truth, scores, bootstrap)
    return result


def main() -> None:
    """Measure, judge, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--problems", help="joined by commas; all, or with --quick the first")
    parser.add_argument("--dampings", default=",".join(DAMPINGS))
    parser.add_argument("--repeat", type=int, default=2, help="warm runs, at most")
    parser.add_argument("--budget", type=float, default=5, help="seconds of them")
    parser.add_argument("--grid-budget", type=float, default=25, help="seconds of a method")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of a run")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples")
    parser.add_argument("--quick", action="store_true", help="our side alone; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "truth.json")
    options = parser.parse_args()
    if not options.quick:
        need_peers()
    torch.set_num_threads(1)
    dampings = options.dampings.split(",")[: 1 if options.quick else None]
    result: dict[str, Any] = {**stamp(), "dampings": dampings, "problems": {}}
    chosen = options.problems.split(",") if options.problems else list(PROBLEMS)
    for name in chosen[: 1 if options.quick and not options.problems else None]:
        truth = load(name, PROBLEMS[name])
        found, result["versions"] = measure(
            truth.problem,
            dampings,
            options.quick,
            repeat=0 if options.quick else options.repeat,
            budget=options.budget,
            grid_budget=options.grid_budget,
            timeout=options.timeout,
        )
        table = [
            {"library": library, "method": method, **judge(truth, entries, options.bootstrap)}
            for (library, method), entries in group(found).items()
        ]
        show(truth.title, table, "lds", "interval")
        problem = truth.problem
        result["problems"][name] = {
            "title": truth.title,
            "train_rows": len(problem.y_train),
            "test_rows": len(problem.y_test),
            "subsets": len(truth.masks),
            "models": len({id(state) for state in problem.models}),
            "parameters": sum(weight.numel() for weight in problem.state.values()),
            "methods": table,
        }
    names = ("repeat", "budget", "grid_budget", "timeout", "bootstrap")
    result["settings"] = {key: getattr(options, key) for key in names}
    if not options.quick:
        write(options.out, result)


if __name__ == "__main__":
    main()
