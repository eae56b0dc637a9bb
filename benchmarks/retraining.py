"""Retraining on many subsets at once, against the same trainings one by one.

    .venv/bin/python benchmarks/retraining.py [--quick]

Writes ``benchmarks/results/retraining.json``. The handwritten digits of scikit-learn, a network
64-64-10, each copy on 500 of 1000 rows from a seed of its own. Three ways in one process on one
thread, in turns, so that a machine that is busy is busy for all of them:

=============  ===================================================================================
``stacked``    ``upweight.stacked.Retraining.many``, from initial weights to margins of test rows
``plain``      a plain torch loop over a module and its optimiser, one model after the other
``train``      ``upweight.train``, which also records the mean loss after every epoch
=============  ===================================================================================

Seconds are those of the processor (``cpu``) and of the clock (``wall``) per training, medians over
the rounds. Of the one-by-one ways a few trainings are timed, as all cost the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tables import RESULTS, at_least, at_most, show_bounds, stamp, write
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import upweight as uw
from upweight.margins import margin
from upweight.stacked import Retraining

OUT = RESULTS / "retraining.json"
N, M, SUBSET, BATCH = 1000, 300, 500, 50
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.005),
}
BOUNDS = [
    at_least("SGD, 100 copies", "plain_over_stacked_cpu", 8.0),
    at_most("SGD, 100 copies", "largest_difference", 0.05),
]


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    optimizer: str
    copies: int
    epochs: int
    alone: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.copies} copies"


@dataclass(frozen=True)
class Digits:
    """Rows to train on and rows to look at."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Digits:
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))[: N + M]
    x = torch.tensor(bunch.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(bunch.target[order])
    return Digits((x[:N], y[:N]), (x[N:], y[N:]))


def make(seed: int) -> nn.Module:
    return uw.MLP([64, 64, 10], seed=seed)


def plain(digits: Digits, rows: np.ndarray, seed: int, setting: Setting) -> Tensor:
    """The tight loop that one would write."""
    x, y = (part[torch.from_numpy(rows)] for part in digits.train)
    model = make(seed)
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters())
    schedule = CosineAnnealingLR(optimizer, setting.epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(setting.epochs):
        order = torch.randperm(len(x), generator=generator)
        for step in order.split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[step]), y[step]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return margin(model(digits.test[0]), digits.test[1])


def by_train(digits: Digits, rows: np.ndarray, seed: int, setting: Setting) -> Tensor:
    model = make(seed)
    x, y = (part[torch.from_numpy(rows)] for part in digits.train)
    uw.train(
        model,
        F.cross_entropy,
        (x, y),
        epochs=setting.epochs,
        optimizer=OPTIMIZERS[setting.optimizer],
        scheduler=lambda o: CosineAnnealingLR(o, setting.epochs),
        batch_size=BATCH,
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        return margin(model(digits.test[0]), digits.test[1])


def timed(work: Callable[[], Any], trainings: int) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return found, {"cpu": cpu / trainings, "wall": wall / trainings}


def measure(digits: Digits, setting: Setting) -> dict[str, Any]:
    masks = np.zeros((setting.copies, N), dtype=bool)
    for s, mask in enumerate(masks):
        mask[np.random.default_rng(s).permutation(N)[:SUBSET]] = True
    seeds = np.arange(setting.copies)
    refit = Retraining(
        make,
        F.cross_entropy,
        digits.train,
        digits.test,
        epochs=setting.epochs,
        optimizer=OPTIMIZERS[setting.optimizer],
        scheduler=lambda o: CosineAnnealingLR(o, setting.epochs),
        batch_size=BATCH,
    )
    alone = [(np.flatnonzero(masks[s]), s) for s in range(setting.alone)]
    together, first = timed(lambda: refit.many(masks, seeds), setting.copies)
    assert refit.stackable, refit.reason
    rounds: list[dict[str, dict[str, float]]] = []
    wanted: list[Tensor] = []
    for _ in range(setting.rounds):
        one: dict[str, dict[str, float]] = {}
        wanted, one["plain"] = timed(
            lambda: [plain(digits, *which, setting) for which in alone], len(alone)
        )
        _, one["stacked"] = timed(lambda: refit.many(masks, seeds), setting.copies)
        _, one["train"] = timed(
            lambda: [by_train(digits, *which, setting) for which in alone], len(alone)
        )
        rounds.append(one)
    line: dict[str, Any] = {
        f"{way}_{clock}_s": float(np.median([one[way][clock] for one in rounds]))
        for way in ("stacked", "plain", "train")
        for clock in ("cpu", "wall")
    }
    ratios: dict[str, list[float]] = {}
    for way in ("plain", "train"):
        for clock in ("cpu", "wall"):
            each = [one[way][clock] / one["stacked"][clock] for one in rounds]
            line[f"{way}_over_stacked_{clock}"] = float(np.median(each))
            ratios[f"{way}_over_stacked_{clock}"] = [min(each), max(each)]
    difference = np.abs(together[: len(wanted)] - torch.stack(wanted).numpy()).max()
    return line | {
        "first_call_cpu_s": first["cpu"],
        "largest_difference": float(difference),
        "ratios_from_to": ratios,
        "settings": asdict(setting),
    }


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one line, few epochs, no file")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    digits = load()
    settings = (
        [Setting("SGD", 100, 5, 4, 2)]
        if quick
        else [
            Setting("SGD", 10, 20, 4, 5),
            Setting("SGD", 30, 20, 4, 5),
            Setting("SGD", 100, 20, 8, 7),
            Setting("SGD", 300, 20, 8, 3),
            Setting("Adam", 100, 20, 8, 5),
        ]
    )
    print(
        f"{'ms of processor time per training':34}{'stacked':>9}{'plain':>9}{'train':>9}"
        f"{'plain/stacked':>15}{'(wall)':>8}{'difference':>12}"
    )
    table: dict[str, dict[str, Any]] = {}
    for setting in settings:
        line = table[setting.name] = measure(digits, setting)
        print(
            f"{setting.name:34}{1e3 * line['stacked_cpu_s']:9.2f}{1e3 * line['plain_cpu_s']:9.2f}"
            f"{1e3 * line['train_cpu_s']:9.2f}{line['plain_over_stacked_cpu']:15.2f}"
            f"{line['plain_over_stacked_wall']:8.2f}{line['largest_difference']:12.1e}"
        )
    if quick:  # the bounds are those of the full settings
        return
    checks = [bound.check(table) for bound in BOUNDS]
    show_bounds(checks)
    of = {"upweight": uw.__version__, "torch": str(torch.__version__)}
    write(OUT, stamp() | {"versions": of, "table": table, "bounds": checks})


if __name__ == "__main__":
    main()
