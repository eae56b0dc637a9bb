"""Every row judged by models that have not seen it, as arrays.

Letters: n rows, d features, C classes, s networks per fold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from upweight.auditing.blending import Blend, blend
from upweight.auditing.planting import Calibration, calibrate, plant
from upweight.auditing.settings import AuditSettings
from upweight.auditing.steps import Steps
from upweight.tables import Task
from upweight.valuation import knn_judge, knn_proba, oob_judge

__all__ = ["SUSPICIOUS", "Judgement", "Other", "judge"]

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

SUSPICIOUS = 0.9  # where no planted faults tell a threshold
VOTES = 10  # neighbours whose labels count
KEPT = 20  # neighbours that are kept: to show, and to vote again
TRUNCATED = 100  # neighbours with a share in KNN-Shapley beyond 20,000 rows: error ≤ 1/100
FEW = 5_000  # rows for which influences are computed once more, to compare them
DRAWN = 50_000  # rows for one tree
MANY = 20_000  # rows of a table that is sampled where a repetition would take long
PLANTED_SHARE, PLANTED_ROWS, PLANTED_MOST = 0.05, 20, 0.2
PLANTED_ENOUGH = 100  # planted rows after which no further repetition is needed


@dataclass(frozen=True, eq=False)
class Other:
    """A judge from outside.

    Attributes
    ----------
    view
        (n, C) probabilities, or (n,) numbers: its predictions for rows that it has not seen.
    again
        From positions of r rows, other targets (r,) of these, and a seed, to what it says of these
        rows after learning those targets, likewise.
    """

    view: NDArray[np.floating]
    again: Callable[[NDArray[np.intp], NDArray[Any], int], NDArray[np.floating]]


@dataclass(frozen=True, eq=False)
class Judgement:
    """What models say of rows that they have not seen.

    Attributes
    ----------
    y, task
        As given.
    forest, neighbours
        (n, C) probabilities, or (n,) numbers: of the trees that have not drawn the row, and of its
        10 nearest rows.
    indices, distances
        (n, 20) nearest rows, or as many as there are.
    knn_shapley
        (n,) value for the neighbours' predictions; below 0 it misleads them.
    network
        Arrays of a `CrossFit`.
    planted
        (m,) suspicion of planted faults, 0 where the planted class was the most probable one.
    auc
        ROC AUC of the suspicion and of each judge alone in telling them from the other rows.
    seed
        Of the intervals.
    others
        Predictions of other judges, by name.
    """

    y: NDArray[Any]
    task: Task
    forest: NDArray[np.floating]
    neighbours: NDArray[np.floating]
    indices: NDArray[np.integer]
    distances: NDArray[np.float32]
    knn_shapley: Floats
    network: Arrays
    planted: Floats
    auc: Mapping[str, float]
    seed: int = 0
    others: Mapping[str, NDArray[np.floating]] = field(
        default_factory=dict[str, NDArray[np.floating]]
    )

    @property
    def views(self) -> dict[str, NDArray[np.floating]]:
        """Predictions by judge."""
        return {
            "forest": self.forest,
            "network": self.network["prediction"].mean(axis=0, dtype=np.float64),
            "neighbours": self.neighbours,
            **self.others,
        }

    @cached_property
    def blend(self) -> Blend:
        """All judges together."""
        return blend(list(self.views.values()), self.y, self.task)

    @property
    def suspicion(self) -> Floats:
        """(n,) in [0, 1]; see `Blend`."""
        return self.blend.suspicion

    @cached_property
    def disputed(self) -> NDArray[np.bool_]:
        """(n,) whether another class is more probable than the given one; in regression all."""
        return _disputed(self.blend, self.y, self.task)

    def flags(self, calibration: Calibration | None) -> NDArray[np.bool_]:
        """(n,) rows above the threshold, 0.9 without planted faults, that are disputed."""
        threshold = SUSPICIOUS if calibration is None else calibration.threshold
        return (self.suspicion > threshold) & self.disputed

    def calibration(self, first: tuple[int, ...] = ()) -> Calibration:
        """What the suspicion means, by the planted faults."""
        disputed = np.where(self.disputed, self.suspicion, 0.0)
        return calibrate(disputed, self.planted, first=first, seed=self.seed)


def judge(
    x: NDArray[np.float32],
    y: NDArray[Any],
    task: Task,
    settings: AuditSettings,
    steps: Steps,
    *,
    others: Mapping[str, Other] | None = None,
) -> Judgement:
    """Judge every row by trees, neighbours and networks that have not seen it.

    Parameters
    ----------
    x, y
        (n, d) features; (n,) positions of the classes, or numbers.
    task
        Classification or regression.
    settings
        Folds, trees, neighbours, networks, planted, seed.
    steps
        Keep what was computed: ``neighbours``, ``forest``, ``networks``, ``planted``.
    others
        More judges, by name.
    """
    others = others or {}
    near = steps.run("neighbours", lambda: _near(x, y, task, settings))
    trees = steps.run(
        "forest", lambda: {"view": _forest(x, y, task, settings.trees, settings.seed)}
    )
    nets = steps.run("networks", lambda: _networks(x, y, task, settings, steps.tell))
    votes = _votes(near["indices"], y, task)
    plain = Judgement(
        y,
        task,
        trees["view"],
        votes,
        near["indices"],
        near["distances"],
        near["values"],
        nets,
        np.empty(0),
        {},
        settings.seed,
        {name: other.view for name, other in others.items()},
    )
    found = steps.run("planted", lambda: _planted(x, plain, settings, steps.tell, others))
    names = [name.removeprefix("auc_") for name in found if name.startswith("auc_")]
    auc = {name: float(found[f"auc_{name}"]) for name in names}
    return replace(plain, planted=found["suspicion"], auc=auc)


def _near(x: NDArray[np.float32], y: NDArray[Any], task: Task, settings: AuditSettings) -> Arrays:
    n = len(x)
    judged = knn_judge(
        x,
        y,
        k=min(settings.neighbours, n - 1),
        keep=min(KEPT, n - 1),
        task=task,
        truncate=TRUNCATED if n > MANY else None,
        seed=settings.seed,
        n_jobs=_workers(n),
    )
    assert judged.values is not None
    return {"values": judged.values, "indices": judged.indices, "distances": judged.distances}


def _workers(n: int) -> int:
    """Threads do not change a result, but starting them costs more than a small table takes."""
    return -1 if n >= FEW else 1


def _votes(indices: NDArray[np.integer], y: NDArray[Any], task: Task) -> NDArray[np.floating]:
    k = min(VOTES, indices.shape[1])
    if task == "classification":
        return knn_proba(indices, y, k=k)[0].astype(np.float32)
    return y[indices[:, :k]].mean(axis=1)


def _forest(
    x: NDArray[np.float32], y: NDArray[Any], task: Task, trees: int, seed: int
) -> NDArray[np.floating]:
    # A tree draws 50,000 rows at most. In a larger table it has not seen most of the rows, so that
    # fewer trees judge each of them as often.
    unseen = np.exp(-min(1.0, DRAWN / len(x)))
    enough = max(1, round(trees * np.exp(-1) / unseen))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of bag for no tree")
        judged = oob_judge(
            None, x, y, trees=enough, task=task, max_rows=DRAWN, seed=seed, n_jobs=_workers(len(x))
        )
    if task == "regression":
        assert judged.prediction is not None
        return np.where(judged.counts > 0, judged.prediction, np.median(y))
    assert judged.proba is not None
    shares = np.bincount(y) / len(y)
    return np.where(judged.counts[:, None] > 0, judged.proba, shares).astype(np.float32)


def _networks(
    x: NDArray[np.float32],
    y: NDArray[Any],
    task: Task,
    settings: AuditSettings,
    tell: Callable[[float], None],
) -> Arrays:
    from upweight.auditing.networks import Problem, cross_fit

    fit = cross_fit(
        Problem.of(x, y, task),
        folds=settings.folds,
        networks=settings.networks if len(x) <= 10 * MANY else 1,
        seed=settings.seed,
        tell=tell,
    )
    return {
        "fold": fit.fold,
        "prediction": fit.prediction,
        "weights": fit.weights,
        "decay": np.array(fit.decay),
    }


def _planted(
    x: NDArray[np.float32],
    judged: Judgement,
    settings: AuditSettings,
    tell: Callable[[float], None],
    others: Mapping[str, Other],
) -> Arrays:
    """Plant wrong targets, judge again, and keep the suspicion of the planted rows."""
    from upweight.auditing.networks import Problem, cross_fit

    n = len(judged.y)
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, 1]))
    rows = np.arange(n) if n <= MANY else _sample(judged, rng)
    y, task, weights = judged.y[rows], judged.task, judged.blend.weights
    share = min(max(PLANTED_SHARE, PLANTED_ROWS / len(rows)), PLANTED_MOST)
    repeats = settings.planted if share * len(rows) < PLANTED_ENOUGH else min(settings.planted, 1)
    near = judged.indices
    if len(rows) < n:
        near = knn_judge(x[rows], k=VOTES, keep=VOTES, seed=settings.seed).indices
    suspicion: list[Floats] = []
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        spoiled, planted = plant(y, task, share, rng)
        seed = settings.seed + 1 + repeat
        problem = Problem.of(x[rows], spoiled, task)
        fit = cross_fit(
            problem,
            folds=settings.folds,
            networks=1,
            seed=seed,
            decay=float(judged.network["decay"]),
            tell=lambda part, done=repeat: tell((done + part) / repeats),  # pyright: ignore[reportUnknownLambdaType]
        )
        views = [
            _forest(x[rows], spoiled, task, settings.trees, seed),
            fit.mean,
            _votes(near, spoiled, task),
            *(other.again(rows, spoiled, seed) for other in others.values()),
        ]
        again = blend(views, spoiled, task, weights=weights)
        disputed = _disputed(again, spoiled, task)
        suspicion.append(np.where(disputed, again.suspicion, 0.0)[planted])
        asked = planted | ~judged.disputed[rows]
        if not 0 < planted.sum() < asked.sum():
            continue
        told = {"suspicion": again.suspicion}
        for name, view in zip(judged.views, views, strict=True):
            told[name] = blend([view], spoiled, task).suspicion
        if settings.influence and repeat == 0 and len(rows) <= FEW:
            told |= _by_influence(problem, fit)
        for name, scores in told.items():
            auc = float(roc_auc_score(planted[asked], scores[asked]))
            found.setdefault(name, []).append(auc)
    kept = np.concatenate(suspicion) if suspicion else np.empty(0)
    return {"suspicion": kept, **{f"auc_{k}": np.array(np.mean(v)) for k, v in found.items()}}


def _by_influence(problem: Any, fit: Any) -> dict[str, Floats]:
    """Scores that are high where influence says that a target is wrong."""
    from upweight.auditing.effects import row_effects

    effects = row_effects(problem, fit)
    return {"influence": -effects.influence, "self_influence": effects.self_influence}


def _disputed(found: Blend, y: NDArray[Any], task: Task) -> NDArray[np.bool_]:
    if task == "regression":
        return np.ones(len(y), dtype=np.bool_)
    return found.prediction.argmax(axis=1) != y


def _sample(judged: Judgement, rng: np.random.Generator) -> NDArray[np.intp]:
    """Rows at random, with two of every class at least."""
    n = len(judged.y)
    chosen = rng.permutation(n)[:MANY]
    if judged.task == "classification":
        shuffled = rng.permutation(n)
        _, first = np.unique(judged.y[shuffled], return_index=True)
        _, last = np.unique(judged.y[shuffled[::-1]], return_index=True)
        chosen = np.concatenate([chosen, shuffled[first], shuffled[::-1][last]])
    return np.unique(chosen)
