"""Run pyDVL's data values on the jobs of `values.py` (see `values_data` for the two files).

    .venv-peers/bin/python benchmarks/peers/run_pydvl_values.py JOBS.npz OUT.npz

Everything has pyDVL's defaults, but for what a job says. Sampling ends after a fixed number of
subsets or permutations (``MaxChecks``), because its other rules would end it elsewhere than ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from joblib import parallel_config
from pydvl.utils.caching import CachedFuncConfig, InMemoryCacheBackend
from pydvl.valuation import (
    BetaShapleyValuation,
    DataOOBValuation,
    Dataset,
    KNNShapleyValuation,
    LOOValuation,
    MaxChecks,
    ModelUtility,
    MSRBanzhafValuation,
    NoTruncation,
    PermutationSampler,
    ShapleyValuation,
    SupervisedScorer,
    TMCShapleyValuation,
)
from pydvl.valuation.utility.base import UtilityBase
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from values_data import Data, Values, cpu_seconds, main, regression, twice, weights

Found = tuple[Values | None, dict[str, Any]]


class Sum(UtilityBase):
    """A utility that costs nothing: the sum of the weights of the rows."""

    def __init__(self, of: Values) -> None:
        self.of = of

    def __call__(self, sample: Any) -> float:
        return 0.0 if sample is None else float(self.of[sample.subset].sum())


def train(data: Data) -> Dataset:
    return Dataset(data.x, data.y)


def model_utility(data: Data, **options: Any) -> ModelUtility:
    """Accuracy of a logistic regression on the rows that judge."""
    scorer = SupervisedScorer("accuracy", Dataset(data.x_test, data.y_test), default=0.0)
    return ModelUtility(regression(), scorer, show_warnings=False, **options)


def values_of(fitted: Any, n: int) -> Values:
    """(n,) in the order of the rows, zero where there is no value."""
    result = fitted.result
    found = np.zeros(n)
    found[result.indices] = result.values
    return np.nan_to_num(found)


def knn(data: Data, k: int) -> Found:
    method = KNNShapleyValuation(
        KNeighborsClassifier(k), Dataset(data.x_test, data.y_test), progress=False
    )
    return values_of(method.fit(train(data)), len(data.x)), {}


def oob(data: Data, trees: int, seed: int) -> Found:
    """The fit of the forest counts, and is told apart."""
    before = cpu_seconds()
    forest = RandomForestClassifier(trees, random_state=seed).fit(data.x, data.y)
    fitted = cpu_seconds() - before
    found = values_of(DataOOBValuation(forest).fit(train(data)), len(data.x))
    return found, {"forest_cpu_s": fitted}


def free(data: Data, n: int, subsets: int, seed: int) -> Found:
    method = MSRBanzhafValuation(Sum(weights(n)), MaxChecks(subsets), seed=seed)
    empty = Dataset(np.zeros((n, 1)), np.zeros(n))
    return values_of(method.fit(empty), n), {"evaluations": subsets}


def tmc(data: Data, permutations: int, seed: int, n_jobs: int = 1, again: bool = False) -> Found:
    """`again`: a second call in the same process, with other permutations, is told apart."""

    def once(seed: int) -> Values:
        done = MaxChecks(permutations)
        method = TMCShapleyValuation(model_utility(data), is_done=done, seed=seed)
        return values_of(method.fit(train(data)), len(data.x))

    with parallel_config(n_jobs=n_jobs):
        return twice(once, seed, again)


def msr(data: Data, subsets: int, seed: int) -> Found:
    method = MSRBanzhafValuation(model_utility(data), MaxChecks(subsets), seed=seed)
    return values_of(method.fit(train(data)), len(data.x)), {"evaluations": subsets}


def loo(data: Data) -> Found:
    return values_of(LOOValuation(model_utility(data)).fit(train(data)), len(data.x)), {}


def cache(data: Data, subsets: int, permutations: int, seed: int) -> Found:
    """Processor seconds of four calls that share a cache: two of them ask for the same sets again.

    The cache keeps everything, which by default it does not: utilities that took less than 0.3 s
    are thrown away.
    """
    keep = {"cache_backend": InMemoryCacheBackend()}
    utility = model_utility(data, **keep, cached_func_options=CachedFuncConfig(time_threshold=0.0))
    steps: dict[str, float] = {}

    def step(name: str, method: Any) -> None:
        before = cpu_seconds()
        method.fit(train(data))
        steps[name] = cpu_seconds() - before

    for name in ("subsets", "subsets again"):
        step(name, MSRBanzhafValuation(utility, MaxChecks(subsets), seed=seed))
    for name, kind, more in (
        ("permutations", ShapleyValuation, {}),
        ("permutations, another method", BetaShapleyValuation, {"alpha": 16.0, "beta": 1.0}),
    ):
        sampler = PermutationSampler(NoTruncation(), seed=seed)
        done = MaxChecks(permutations)
        step(name, kind(utility, sampler=sampler, is_done=done, **more))
    stats = utility.cache_stats
    return None, {"steps": steps, "hits": stats.hits, "misses": stats.misses}


TASKS = {f.__name__: f for f in (knn, oob, free, tmc, msr, loo, cache)}

if __name__ == "__main__":
    main("pydvl", TASKS)
