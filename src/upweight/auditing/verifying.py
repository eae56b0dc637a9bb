"""Whether models get better when the flagged rows are left out of their training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.auditing.audit import Audit, Verification
from upweight.auditing.flagging import quick_suspicion
from upweight.auditing.refitting import Model, maker, predict, score_of
from upweight.tables import Task, prepare, read_target

__all__ = ["SHARES", "Rows", "corrected_interval", "verify", "verify_arrays"]

SHARES = (0.25, 0.5, 1.0, 2.0)
HELD_OUT = 0.25
MOST_ROWS = 20_000
ALL, FLAGGED, CURVE, RANDOM, BY_ALL = (
    "all rows",
    "without flagged",
    "without most suspicious",
    "without random",
    "without flagged by all rows",
)
EVERY, UNFLAGGED = "all", "without a flag"
ORDER = (EVERY, UNFLAGGED, ALL, FLAGGED, BY_ALL, CURVE, RANDOM)

Suspect: TypeAlias = Callable[[NDArray[Any], NDArray[Any], Task, int], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Rows:
    """What `verify_arrays` needs of every row.

    Attributes
    ----------
    x
        (n, d) features.
    y
        (n,) codes of classes, or numbers.
    flagged
        (n,) bool: by the audit.
    task
        Classification or regression.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    flagged: NDArray[np.bool_]
    task: Task


def verify(
    audit: Audit,
    *,
    repeats: int = 10,
    seed: int = 0,
    n_jobs: int = 1,
    shares: Sequence[float] | None = None,
    model: Model = "boosting",
    progress: bool = True,
) -> Verification:
    """Train with the flagged rows, without them, and without as many random ones.

    In every repeat a quarter of the rows is held out, stratified by class. On the others models are
    trained: with all of them; without the most suspicious ones, as large a share of them as the
    audit has flagged; and without as many random ones, of each class as many. The same with smaller
    and larger shares gives a curve.

    Parameters
    ----------
    audit
        With its table.
    repeats
        Random splits.
    seed
        Of the splits, the random removals and the models.
    n_jobs
        Processes, -1 for all cores.
    shares
        Points of the curve, as multiples of the share of flagged rows; default 0.25, 0.5, 1, 2.
        At most half of the training rows are removed.
    model
        ``"boosting"``: gradient boosted trees; ``"linear"``: logistic or ridge regression with
        features in standard units; or a function of a seed that gives an unfitted estimator of
        scikit-learn. None of the two is among the judges of the rows (a network, bagged random
        trees, neighbours), which would think again what they thought before.
    progress
        Show a bar, where stderr is a terminal.

    Returns
    -------
    Verification
        The score is the balanced accuracy; in regression D², the share of the mean absolute error
        of the median that the model avoids. Its table has a line for each removal and number of
        removed rows (a mean over the repeats), scored on all held-out rows (``held_out == "all"``)
        and on those that the audit has not flagged. `gain` and `gain_over_random` are of the
        former.

    Raises
    ------
    ValueError
        If no row is flagged, the rows are too few to hold some out, or an option makes no sense.

    Notes
    -----
    *Flags made again.* The audit has judged every row with the help of all others, the held-out
    ones included: it flags rows that disagree with, among others, the very rows that they would be
    tested on. Removing these raises the held-out score even where labels are random and nothing can
    be learned (by 0.10 in balanced accuracy, of a nearest neighbour on 400 rows). So the suspicion
    is computed again in every repeat from the training rows alone, by the forest and the neighbours
    (`quick_suspicion`). The flags of the audit itself are the line ``"without flagged by all
    rows"``, an optimistic one.

    *All held-out rows.* Some of them have a wrong label. Scored only on those without a flag every
    removal looks better, as rows that contradict it are not asked; on all rows wrong labels count
    as truth, which makes gains smaller but favours nobody. So the gains are of the latter. All
    trainings of a repeat are scored on the same rows.

    *Interval.* Training sets of different repeats overlap, so the variance of the mean is taken as
    (1/R + m/n) s² with s² the variance over the R repeats and m/n the ratio of held-out to training
    rows; differences are taken within a repeat. 95 %, by Student's t with R − 1 degrees.

    More than 20,000 training or held-out rows are thinned to that at random.

    References
    ----------
    Nadeau & Bengio, Inference for the generalization error, Machine Learning 2003.
    """
    return verify_arrays(
        _rows_of(audit), repeats=repeats, seed=seed, n_jobs=n_jobs, shares=shares, model=model,
        progress=progress,
    )  # fmt: skip


def _rows_of(audit: Audit) -> Rows:
    frame = audit.table.frame
    column: Any = frame[audit.settings.target]
    target = read_target(column, audit.summary.task)
    features = prepare(frame, audit.columns, seed=audit.settings.seed)
    judged = target.judged
    rows: Any = audit.rows
    return Rows(
        x=features.x[judged],
        y=target.y[judged],
        flagged=rows["label_flag"].fillna(value=False).to_numpy(dtype=np.bool_)[judged],
        task=target.task,
    )


def verify_arrays(
    rows: Rows,
    *,
    repeats: int = 10,
    seed: int = 0,
    n_jobs: int = 1,
    shares: Sequence[float] | None = None,
    model: Model = "boosting",
    suspect: Suspect = quick_suspicion,
    progress: bool = False,
) -> Verification:
    """`verify` on arrays.

    Parameters
    ----------
    rows
        What is trained on and tested.
    suspect
        A function of features, target, task and a seed that gives the suspicion of each row.
    repeats, seed, n_jobs, shares, model, progress
        As in `verify`.

    Examples
    --------
    >>> truth = np.arange(80) % 2
    >>> wrong = np.arange(80) % 9 == 0
    >>> x = np.random.default_rng(0).normal(size=(80, 2)) + 4 * truth[:, None]
    >>> rows = Rows(x, np.where(wrong, 1 - truth, truth), wrong, "classification")
    >>> found = verify_arrays(rows, repeats=3, model="linear", shares=[1])
    >>> found.table[["what", "removed"]].head(3)
                              what  removed
    0                     all rows        0
    1              without flagged        7
    2  without flagged by all rows        8
    """
    shares = SHARES if shares is None else tuple(shares)
    if any(not 0 < share < np.inf for share in shares):
        raise ValueError(f"expected shares above 0; got {shares}")
    if repeats < 2:
        raise ValueError(f"expected at least 2 repeats, which an interval needs; got {repeats}")
    if not rows.flagged.any():
        raise ValueError("no row has a label flag, so there is nothing to verify")
    if rows.flagged.all():
        raise ValueError("every row has a label flag, so nothing would be left to train on")
    make = maker(model, rows.task)
    seeds = np.random.SeedSequence(seed).generate_state(repeats)
    work = [(rows, int(one), make, shares, suspect) for one in seeds]
    done = pd.DataFrame([line for lines in _results(work, n_jobs, progress) for line in lines])
    return _summed(done, rows, repeats)


# ---- one split ----------------------------------------------------------------------------------


def _results(work: Sequence[Any], n_jobs: int, progress: bool) -> Iterator[list[dict[str, Any]]]:
    from joblib import Parallel, delayed
    from tqdm import tqdm

    with tqdm(total=len(work), desc="verify", disable=None if progress else True) as bar:
        # Without processes where one is enough: an interruption is then immediate.
        done: Any = (
            (_repeat(*one) for one in work)
            if n_jobs == 1
            else Parallel(n_jobs, return_as="generator")(delayed(_repeat)(*one) for one in work)
        )
        for result in done:
            bar.update()
            yield result


def _repeat(
    rows: Rows, seed: int, make: Callable[[int], Any], shares: Sequence[float], suspect: Suspect
) -> list[dict[str, Any]]:
    """The scores of one split, two lines for each training."""
    rng = np.random.default_rng(seed)
    test, train = _split(rows, rng)
    lines: list[dict[str, Any]] = []

    def score(share: float, gone: NDArray[np.bool_], *names: str) -> None:
        left = train[~gone]
        predicted = predict(make(seed % 2**31), rows.x[left], rows.y[left], rows.x[test])
        for held_out, some in ((EVERY, test >= 0), (UNFLAGGED, ~rows.flagged[test])):
            value = score_of(rows.task, rows.y[test][some], predicted[some])
            line = {"share": share, "removed": int(gone.sum()), "held_out": held_out}
            lines.extend({"what": what, "score": value, **line} for what in names)

    score(0.0, np.zeros(len(train), dtype=np.bool_), ALL)
    suspicion = suspect(rows.x[train], rows.y[train], rows.task, seed % 2**31)
    order = np.argsort(-suspicion, kind="stable")
    # Of several shares that are as many rows one is enough: that of the flagged, or the last.
    counts = {_count(rows, len(train), share): share for share in (*shares, 1.0)}
    for count, share in sorted(counts.items()):
        first = np.zeros(len(train), dtype=np.bool_)
        first[order[:count]] = True
        score(share, first, *([FLAGGED, CURVE] if share == 1 else [CURVE]))
        score(share, _as_many(rows, train, first, rng), RANDOM)
    score(1.0, rows.flagged[train], BY_ALL)
    return lines


def _count(rows: Rows, train: int, share: float) -> int:
    """Of training rows to remove: as large a share as the audit has flagged, times `share`."""
    return min(max(round(share * float(rows.flagged.mean()) * train), 1), train // 2)


def _split(rows: Rows, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to test on, of each class as large a share, and rows to train on."""
    order = rng.permutation(len(rows.y))
    groups = [order[rows.y[order] == label] for label in _strata(rows)] or [order]
    held = np.concatenate([group[: round(HELD_OUT * len(group))] for group in groups])
    mask = np.zeros(len(rows.y), dtype=np.bool_)
    mask[held] = True
    if not len(held) or not rows.flagged[~mask].sum() < (~mask).sum():
        raise ValueError(
            f"expected more rows, to hold a quarter of each class out; got {len(rows.y)}"
        )
    parts = (np.flatnonzero(mask), np.flatnonzero(~mask))
    test, train = (
        part if len(part) <= MOST_ROWS else np.sort(rng.choice(part, MOST_ROWS, replace=False))
        for part in parts
    )
    return test, train


def _strata(rows: Rows) -> NDArray[Any]:
    return np.unique(rows.y) if rows.task == "classification" else np.empty(0)


def _as_many(
    rows: Rows, train: NDArray[np.intp], gone: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """As many rows at random, of each class as many."""
    mask = np.zeros(len(train), dtype=np.bool_)
    labels = rows.y[train]
    groups = [np.flatnonzero(labels == label) for label in _strata(rows)]
    for group in groups or [np.arange(len(train))]:
        mask[rng.choice(group, int(gone[group].sum()), replace=False)] = True
    return mask


# ---- over the splits ----------------------------------------------------------------------------


def _summed(done: pd.DataFrame, rows: Rows, repeats: int) -> Verification:
    train = min(MOST_ROWS, (1 - HELD_OUT) * len(rows.y))
    ratio = min(MOST_ROWS, HELD_OUT * len(rows.y)) / train
    table: list[dict[str, Any]] = []
    grouped: Any = done.groupby(["held_out", "what", "share"], sort=False)
    for (held_out, what, _), part in grouped:
        score, low, high = corrected_interval(part["score"].to_numpy(), ratio)
        least = 0.0 if rows.task == "classification" else -np.inf
        table.append(
            {
                "what": what,
                "removed": round(part["removed"].mean()),
                "score": score,
                "low": max(low, least),
                "high": min(high, 1.0),
                "held_out": held_out,
            }
        )
    table.sort(key=lambda line: (ORDER.index(line["held_out"]), ORDER.index(line["what"]),
                                 line["removed"]))  # fmt: skip

    def column(what: str) -> NDArray[np.float64]:
        some: Any = done[
            (done["what"] == what)
            & (done["held_out"] == EVERY)
            & (done["share"] == (0 if what == ALL else 1))
        ]
        return some["score"].to_numpy()

    flagged, base = column(FLAGGED), column(ALL)
    optimistic = float(np.nanmean(column(BY_ALL) - base))
    return Verification(
        metric="balanced accuracy" if rows.task == "classification" else "D²",
        table=pd.DataFrame(table),
        gain=corrected_interval(flagged - base, ratio),
        gain_over_random=corrected_interval(flagged - column(RANDOM), ratio),
        repeats=repeats,
        held_out=(
            "on a quarter of the rows, flagged ones included; as many rows as the audit flags were "
            "flagged again from the rows trained on, as its own flags know the held-out rows and "
            f"would promise {optimistic:+.3f}"
        ),
    )


def corrected_interval(values: NDArray[np.float64], ratio: float) -> tuple[float, float, float]:
    """Mean over repeated splits, and its 95 % interval for training sets that overlap.

    With s² the variance over R splits and ρ the ratio of held-out to training rows,

        mean ± t(0.975, R − 1) √((1/R + ρ) s²)

    Parameters
    ----------
    values
        (R,) one for each split; NaN are left out.
    ratio
        ρ.

    References
    ----------
    Nadeau & Bengio, Inference for the generalization error, Machine Learning 2003, §3.

    Examples
    --------
    >>> corrected_interval(np.array([0.0, 0.2]), 1 / 3)
    (0.1, -1.54, 1.74)
    """
    from scipy.stats import t

    known = values[~np.isnan(values)]
    if not known.size:
        return (np.nan, np.nan, np.nan)
    mean = float(known.mean())
    if known.size == 1:
        return (mean, -np.inf, np.inf)
    width = t.ppf(0.975, known.size - 1) * np.sqrt((1 / known.size + ratio) * known.var(ddof=1))
    return (mean, mean - float(width), mean + float(width))
