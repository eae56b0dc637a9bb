"""What an audit will do to each column, and what it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upweight.auditing.settings import AuditSettings
from upweight.tables import Column, Features, Target, Task

__all__ = ["AuditPlan", "plan_of"]

# From the steps of 20,000 rows on one core (benchmarks/results/audit.json); other tables may take
# half or twice of it.
DISTANCE = 1.2e-10  # seconds per pair of rows and feature
SORTED = 1.0e-8  # per pair of rows
TREE = 3e-8  # per row, tree and doubling of the rows
MULTIPLIED = 8e-11  # per product of a network
EFFECT = 4e-8  # per row, fold and weight
LOOKED = 2.5e-9  # the same, of the rows that details are searched in
COPIES = 3  # of what is kept, at the peak
BLOCK, SAMPLED, SEARCHED, DRAWN = 50_000, 20_000, 5_000, 50_000


@dataclass(frozen=True)
class AuditPlan:
    """What `upweight audit --plan` prints.

    Attributes
    ----------
    columns
        What was made of each column.
    task, classes, rows, judged, features
        What is predicted for how many rows, and from how many numbers.
    steps
        Name and expected seconds of each.
    memory
        Bytes at the peak, beyond what Python itself takes.
    """

    columns: Sequence[Column]
    task: Task
    classes: tuple[str, ...] | None
    rows: int
    judged: int
    features: int
    steps: Sequence[tuple[str, float]]
    memory: int

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(seconds for _, seconds in self.steps)

    def __str__(self) -> str:
        """Columns, then costs."""
        width = min(max((len(column.name) for column in self.columns), default=4), 30)
        lines = [
            f"{column.name[:30]:<{width}}  {column.kind:<9} {column.note}"
            for column in self.columns
        ]
        classes = "" if self.classes is None else f" of {len(self.classes)} classes"
        lines += [
            "",
            f"{self.task}{classes}: {self.judged:,} of {self.rows:,} rows have a target, "
            f"{self.features} features",
            f"about {_time(self.seconds)} and {self.memory / 2**30:.1f} GiB: "
            + ", ".join(f"{name} {_time(seconds)}" for name, seconds in self.steps),
        ]
        return "\n".join(lines)


def plan_of(
    columns: Sequence[Column],
    target: Target,
    features: Features,
    settings: AuditSettings,
    rows: int,
) -> AuditPlan:
    """Expected costs of an audit of prepared columns."""
    n, d = features.x.shape
    outputs = 1 if target.classes is None else len(target.classes)
    networks = settings.networks if n <= 200_000 else 1
    sample = min(n, SAMPLED)
    width = min(n, BLOCK)
    products = 64 * (d + outputs)
    search = 3 * min(n, SEARCHED) * 40 * settings.folds * products * MULTIPLIED
    share = max(0.05, min(0.2, 20 / sample))
    repeats = min(settings.planted, 1) if share * sample >= 100 else settings.planted
    forest = _forest(n, settings.trees)
    steps = [
        ("neighbours", n * width * (d * DISTANCE + (SORTED if n <= SAMPLED else 0.3 * SORTED))),
        ("forest", forest),
        ("networks", search + _training(n, settings.folds * networks, products)),
        (
            "planted",
            repeats
            * (_forest(sample, settings.trees) + _training(sample, settings.folds, products)),
        ),
        ("cells", n * d * 2e-8 + d**3 * 1e-9),
    ]
    if settings.influence:
        asked = settings.folds if n <= BLOCK else min(settings.folds, 2)
        steps.append(("influence", 1 + asked * n * products * EFFECT))
        steps.append(("details", 1 + settings.folds * min(n, SAMPLED) * products * LOOKED))
    stored = n * (4 * d + 8 * len(features.numeric_columns) + 4 * outputs * (3 + networks) + 400)
    working = 2**29 + 8 * n * outputs
    memory = int(COPIES * stored + working)
    return AuditPlan(columns, target.task, target.classes, rows, n, d, steps, memory)


def _forest(n: int, trees: int) -> float:
    grown = min(n, DRAWN)
    trees = round(trees * np.exp(min(1.0, DRAWN / n) - 1))
    return trees * TREE * (grown * np.log2(max(grown, 2)) + 2 * n)


def _training(n: int, networks: int, products: int) -> float:
    batch = min(max(16, n // 20), 256 if n <= 100_000 else 2048)
    epochs = min(max(800 * batch / n, 4), 40)
    steps = epochs * n / batch
    return steps * 1.5e-3 + epochs * n * networks * 3 * products * MULTIPLIED


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min"
