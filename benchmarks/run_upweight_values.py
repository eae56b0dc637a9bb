"""Our side of `values.py`, through the public face alone (see `values_data` for the two files).

    .venv/bin/python benchmarks/run_upweight_values.py JOBS.npz OUT.npz
    .venv/bin/python benchmarks/run_upweight_values.py --rows 1000000 OUT.json

The second values many rows by their neighbours and writes the seconds of it; `measured.py` tells
the memory of the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from values_data import Data, Values, cpu_seconds, main, regression, twice, weights

from upweight import valuation as v

Found = tuple[Values | None, dict[str, Any]]

COLUMNS, CLASSES, TESTS = 32, 5, 1_000


def utility_of(data: Data, model: str, scoring: str, itself: bool = False) -> Any:
    """What a set of rows is worth: a model trained on it, judged by the rows that judge.

    `itself`: these are the training rows, in folds, and nothing else is looked at.
    """
    train, test = (data.x, data.y), None if itself else (data.x_test, data.y_test)
    if model == "ridge":
        return v.RidgeUtility(train, test, scoring)
    return v.ModelUtility(regression(), train, test, scoring)


def told(values: Any) -> Found:
    """The values and how many utilities they took."""
    return values.values, {"evaluations": values.provenance["evaluations"]}


def knn(data: Data, k: int, itself: bool = False) -> Found:
    """`itself`: the training rows judge each other, and nothing else is looked at."""
    tests = () if itself else (data.x_test, data.y_test)
    return np.asarray(v.knn_shapley(data.x, data.y, *tests, k=k)), {}


def oob(data: Data, trees: int, seed: int) -> Found:
    """The trees that we grow."""
    return v.data_oob(None, data.x, data.y, trees=trees, seed=seed).values, {}


def oob_forest(data: Data, trees: int, seed: int) -> Found:
    """The forest and the vote that pyDVL has."""
    before = cpu_seconds()
    forest = RandomForestClassifier(trees, random_state=seed).fit(data.x, data.y)
    fitted = cpu_seconds() - before
    values = v.data_oob(forest, data.x, data.y, soft=False).values
    return values, {"forest_cpu_s": fitted}


def free(_: Data, n: int, subsets: int, seed: int) -> Found:
    """Banzhaf values of a utility that costs nothing."""
    of = weights(n)
    utility = v.FunctionUtility(lambda rows: float(of[rows].sum()), n)
    until = v.Evaluations(subsets)
    values = v.banzhaf(utility, readout="msr", until=until, seed=seed, progress=False)
    return told(values)


def shapley(
    data: Data,
    *,
    evaluations: int,
    seed: int,
    model: str = "logistic",
    scoring: str = "accuracy",
    truncation: float | None = None,
    n_jobs: int = 1,
    again: bool = False,
) -> Found:
    """By permutations; `again`: a second call in the same process, with others, is told apart."""

    def once(seed: int) -> Values:
        values = v.shapley(
            utility_of(data, model, scoring),
            truncation=truncation,
            until=v.Evaluations(evaluations),
            seed=seed,
            n_jobs=n_jobs,
            progress=False,
        )
        asked.append(values.provenance["evaluations"])
        return values.values

    asked: list[int] = []
    values, found = twice(once, seed, again)
    return values, found | {"evaluations": asked[0]}


def banzhaf(
    data: Data,
    *,
    evaluations: int,
    seed: int,
    p: float = 0.5,
    model: str = "logistic",
    scoring: str = "accuracy",
    readout: str = "msr",
    itself: bool = False,
) -> Found:
    """By subsets of a share p of the rows."""
    values = v.banzhaf(
        utility_of(data, model, scoring, itself),
        p=p,
        readout=readout,
        until=v.Evaluations(evaluations),
        seed=seed,
        progress=False,
    )
    return told(values)


def loo(data: Data, model: str = "logistic", scoring: str = "accuracy") -> Found:
    """Each row left out once."""
    return told(v.leave_one_out(utility_of(data, model, scoring), progress=False))


def cache(data: Data, subsets: int, permutations: int, seed: int) -> Found:
    """Processor seconds of calls that share the cache of a utility, or the samples of a result."""
    utility = utility_of(data, "logistic", "accuracy")
    steps: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        before = cpu_seconds()
        found = work()
        steps[name] = cpu_seconds() - before
        return found

    some: dict[str, Any] = {"until": v.Evaluations(subsets), "seed": seed, "progress": False}
    step("subsets", lambda: v.banzhaf(utility, readout="msr", **some))
    found = step("subsets again", lambda: v.banzhaf(utility, readout="msr", **some))
    step("subsets, another method", lambda: v.banzhaf(utility, readout="regression", **some))
    step("subsets, read out", lambda: v.banzhaf(found, readout="regression"))
    some["until"] = v.Evaluations(permutations * len(data.x))
    found = step("permutations", lambda: v.shapley(utility, **some))
    step("permutations, another method", lambda: v.beta_shapley(utility, **some))
    step("permutations, read out", lambda: v.beta_shapley(found))
    return None, {"steps": steps}


def many(rows: int, out: Path, seed: int = 0) -> None:
    """The values of so many rows by 1,000 test rows, five classes and 32 columns."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 0.5, (CLASSES, COLUMNS)).astype(np.float32)

    def draw(n: int) -> tuple[Any, Any]:
        y = rng.integers(CLASSES, size=n)
        return rng.standard_normal((n, COLUMNS), dtype=np.float32) + centres[y], y

    x, y = draw(rows)
    x_test, y_test = draw(TESTS)
    cpu, start = cpu_seconds(), time.perf_counter()
    values = np.asarray(v.knn_shapley(x, y, x_test, y_test, k=5))
    found = {
        "knn_cpu_s": cpu_seconds() - cpu,
        "knn_s": time.perf_counter() - start,
        "sum": float(values.sum()),
    }
    out.write_text(json.dumps(found), encoding="utf-8")


TASKS = {f.__name__: f for f in (knn, oob, oob_forest, free, shapley, banzhaf, loo, cache)}

if __name__ == "__main__":
    if sys.argv[1] == "--rows":
        many(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main("upweight", TASKS)
