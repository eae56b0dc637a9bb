"""`execute`: from a table to the values of its rows, and a run folder with a page."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from upweight.report import value_folder as folders
from upweight.report.value_settings import METHODS, MODELS, ValueSettings, default_p
from upweight.tables import (
    Column,
    Table,
    TableError,
    Task,
    plan_columns,
    prepare,
    read_table,
    read_target,
    row_names,
)
from upweight.valuation import (
    Evaluations,
    Minutes,
    RankStability,
    Stopping,
    Utility,
    UtilityCache,
    Values,
    ValueWarning,
    banzhaf,
    beta_shapley,
    data_oob,
    knn_shapley,
    leave_one_out,
    shapley,
)
from upweight.valuation.stopping import default_rule

__all__ = ["TREES", "Outcome", "Ready", "execute", "frame_of", "make_utility", "ready", "rule_of"]

TRUNCATION = 0.01  # of u(all) − u(none), where orders end in truncated Monte Carlo
TREES = 300


@dataclass(frozen=True, eq=False)
class Ready:
    """A table as numbers, and all that is needed to value its rows.

    Attributes
    ----------
    settings
        Completed.
    table, test
        As they were read.
    columns
        What was made of each column.
    task, classes
        Of the target.
    rows
        Positions of the rows that have a target; these are valued.
    names
        Of them, each once.
    x, y
        Their features, and their classes as positions, or numbers.
    x_test, y_test
        The same of the test rows, or None.
    p, scoring
        As settled by the table.
    shared
        Names that several rows had, of each of these rows: `names` has others for them.
    """

    settings: ValueSettings
    table: Table
    test: Table | None
    columns: list[Column]
    task: Task
    classes: tuple[str, ...] | None
    rows: NDArray[np.intp]
    names: list[str]
    x: NDArray[np.float32]
    y: NDArray[Any]
    x_test: NDArray[np.float32] | None
    y_test: NDArray[Any] | None
    p: float | None
    scoring: str | None
    shared: list[str]

    @property
    def given(self) -> pd.Series:
        """The target's cells of the valued rows."""
        cells: Any = self.table.frame[self.settings.target]
        return cells.iloc[self.rows].reset_index(drop=True)

    @property
    def described(self) -> str:
        """What is done, in words."""
        settings, method = self.settings, METHODS[self.settings.method]
        judges = "rows judge each other" if self.test is None else f"{self._judges} judge the rows"
        if settings.method == "knn-shapley":
            return f"{method}, K = {settings.k}: {judges}; exact"
        if settings.method == "oob":
            return f"{method}: {TREES} trees judge the rows that they have not seen"
        assert settings.model is not None
        how = f" with a share p = {self.p:.3g} of the rows" if self.p is not None else ""
        if self.test is None:
            judges = "rows judge each other in five folds"
        model = f"{self.scoring} of {MODELS[settings.model]}"
        return f"{method}: {model} on sets of rows{how}; {judges}"

    @property
    def _judges(self) -> str:
        assert self.test is not None
        assert self.y_test is not None
        return f"{len(self.y_test):,} rows of {self.test.source.name}"


def ready(source: Any, settings: ValueSettings) -> Ready:
    """Read and encode; all that is wrong with the input is refused here.

    Raises
    ------
    ValueError
        If an option does not belong to the method; a `TableError`, if a table cannot be used.
    """
    settings = settings.completed()
    table = read_table(source, delimiter=settings.delimiter, encoding=settings.encoding)
    columns = plan_columns(
        table.frame,
        target=settings.target,
        id=settings.id,
        kinds=settings.kinds,
        ignore=settings.ignore,
    )
    column: Any = table.frame[settings.target]
    target = read_target(column, settings.task)
    test = _read_test(settings, columns)
    frame, y = table.frame, target.y
    if test is not None:
        frame = _together(table, test, columns, settings.target)
        y = _targets(frame, settings.target, target.task, len(table), test.source.name)
    features = prepare(frame, columns, seed=settings.seed)
    n = len(table)
    rows = np.flatnonzero(target.judged)
    given = row_names(table.frame, columns).iloc[rows].tolist()
    names = _one_each(given, rows)
    x_test = y_test = None
    if test is not None:
        there = n + np.flatnonzero(~np.isnan(y[n:]) if target.classes is None else y[n:] >= 0)
        x_test, y_test = features.x[there], y[there]
    classes = len(target.classes or ())
    found = Ready(
        settings, table, test, columns, target.task, target.classes, rows, names,
        features.x[rows], y[rows], x_test, y_test,
        (settings.p or default_p(len(rows), classes)) if settings.method == "banzhaf" else None,
        _scoring(settings, target.task),
        [name for name, own in zip(given, names, strict=True) if name != own],
    )  # fmt: skip
    _check(found)
    return found


def _one_each(names: list[str], rows: NDArray[np.intp]) -> list[str]:
    """Names, with the number of the row behind those that occur more than once."""
    times = Counter(names)
    found: list[str] = []
    for name, row in zip(names, rows.tolist(), strict=True):
        own = name
        if times[name] > 1:
            while own in times:  # again where another row is called that
                own = f"{own} (row {row})"
        found.append(own)
    return found


def _read_test(settings: ValueSettings, columns: Sequence[Column]) -> Table | None:
    if settings.test is None:
        return None
    test = read_table(settings.test, delimiter=settings.delimiter, encoding=settings.encoding)
    used = [c.name for c in columns if c.kind not in ("id", "constant", "empty", "ignored")]
    lost = [name for name in used if name not in test.frame]
    if lost:
        raise TableError(
            f"expected the columns of the table in {test.source.name}; it has no {lost[0]!r:.60}"
            + (f" ({len(lost)} are missing)" if len(lost) > 1 else "")
        )
    return test


def _together(table: Table, test: Table, columns: Sequence[Column], target: str) -> pd.DataFrame:
    """Both tables, one under the other, with one type for each column: encoded alike."""
    from upweight.tables.frames import from_frame

    parts = table.frame, test.frame.reindex(columns=table.frame.columns)
    joined: dict[str, Any] = {}
    for column in columns:
        some: list[Any] = [part[column.name] for part in parts]
        if not _alike(*some):
            some = [part.map(str, na_action="ignore").astype(object) for part in some]
        joined[column.name] = pd.concat(some, ignore_index=True)
    return from_frame(pd.DataFrame(joined))


def _alike(a: pd.Series, b: pd.Series) -> bool:
    numbers = all(part.dtype.kind in "iuf" for part in (a, b))
    return a.dtype == b.dtype or numbers or bool(b.isna().all())


def _targets(frame: pd.DataFrame, name: str, task: Task, n: int, test: str) -> NDArray[Any]:
    """Targets of both tables, by the classes of both; test rows with other classes are refused."""
    from upweight.tables.cells import encode

    column: Any = frame[name]
    if column.iloc[n:].notna().sum() == 0:
        raise TableError(f"expected rows with a target {name!r:.60} in {test}; it has none")
    if task == "classification":
        encoded = encode(column)
        new = np.flatnonzero(~np.isin(encoded.codes[n:], [*encoded.codes[:n], -1]))
        if len(new):
            label = encoded.levels[encoded.codes[n + new[0]]]
            raise TableError(
                f"row {new[0]} of {test} is of the class {label!r:.60}, which no row of the table "
                f"has ({len(new)} such rows): leave them out"
            )
    return read_target(column, task).y


def _scoring(settings: ValueSettings, task: Task) -> str | None:
    if settings.model is None:
        return None
    default = "log_likelihood" if task == "classification" else "neg_mean_squared_error"
    return settings.scoring or default


def _check(found: Ready) -> None:
    settings = found.settings
    if settings.k is not None and settings.k >= len(found.rows):
        raise ValueError(
            f"expected --k below the number of rows with a target, {len(found.rows)}; got "
            f"{settings.k}"
        )
    if settings.model == "logistic" and found.task == "regression":
        raise ValueError(
            "--model logistic is for classes, and the target is a number: choose ridge, forest, "
            "boosting or knn, or pass --task classification"
        )
    if settings.model is not None:
        make_utility(found)  # refuses a scoring that does not fit


# ---- values --------------------------------------------------------------------------------------


def make_utility(found: Ready, cache: UtilityCache | None = None) -> Utility:
    """The utility of sets of rows that the settings ask for."""
    settings = found.settings
    train = found.x, found.y
    test = None if found.x_test is None else (found.x_test, found.y_test)
    options: Any = {"names": found.names, "seed": settings.seed, "cache": cache}
    if settings.model == "ridge":
        from upweight.valuation.ridge_utility import RidgeUtility

        others: Any = test
        return RidgeUtility(train, others, found.scoring, task=found.task, **options)
    from upweight.valuation.model_utility import ModelUtility

    least = 5 if settings.model == "knn" else 1
    model = _estimator(settings.model, found.task)
    return ModelUtility(model, train, test, found.scoring, min_rows=least, **options)


def _estimator(model: str | None, task: Task) -> Any:
    from sklearn import ensemble, linear_model, neighbors

    classes = task == "classification"
    if model == "logistic":
        return linear_model.LogisticRegression(max_iter=1_000)
    if model == "forest":
        trees: Any = ensemble.ExtraTreesClassifier if classes else ensemble.ExtraTreesRegressor
        return trees(n_estimators=50)
    if model == "boosting":
        boosted: Any = (
            ensemble.HistGradientBoostingClassifier
            if classes
            else ensemble.HistGradientBoostingRegressor
        )
        return boosted(max_iter=50, early_stopping=False)
    near: Any = neighbors.KNeighborsClassifier if classes else neighbors.KNeighborsRegressor
    return near(5)


def rule_of(settings: ValueSettings, n: int) -> Stopping:
    """Stable ranks, or what may be spent."""
    assert settings.until_stable is not None
    rule: Stopping = RankStability(settings.until_stable)
    most = settings.evaluations
    if most is None and settings.minutes is None:
        most = int(default_rule(n).room(None))
    if most is not None:
        rule = rule | Evaluations(most)
    return rule if settings.minutes is None else rule | Minutes(settings.minutes)


def values_of(found: Ready, cache: Path | None, *, jobs: int = 1, progress: bool = True) -> Values:
    """The values of the rows.

    Parameters
    ----------
    found
        As `ready` gives it.
    cache
        File for utilities that are computed; None: memory.
    jobs, progress
        Workers, and whether to show a bar.
    """
    settings = found.settings
    method, x, y = settings.method, found.x, found.y
    shared: Any = {"task": found.task, "seed": settings.seed, "n_jobs": jobs, "names": found.names}
    if method == "knn-shapley":
        k: Any = settings.k
        return knn_shapley(x, y, found.x_test, found.y_test, k=k, **shared)
    if method == "oob":
        return data_oob(None, x, y, trees=TREES, **shared)
    kept = UtilityCache(cache)
    utility = make_utility(found, kept)
    with warnings.catch_warnings(), kept:
        warnings.simplefilter("ignore", ValueWarning)  # the command says it in its own words
        if method == "loo":
            return leave_one_out(utility, n_jobs=jobs, progress=progress)
        options: Any = {
            "until": rule_of(settings, len(y)),
            "seed": settings.seed,
            "n_jobs": jobs,
            "progress": progress,
        }
        if method == "banzhaf":
            assert found.p is not None
            return banzhaf(utility, p=found.p, **options)
        if method == "beta":
            return beta_shapley(utility, **options)
        truncation = TRUNCATION if method == "tmc" else None
        return shapley(utility, truncation=truncation, **options)


def frame_of(found: Ready, values: Values) -> pd.DataFrame:
    """A line for each row: ``row`` (its position), ``name``, ``given``, ``value``, … ``rank``.

    Rank 1 is the highest value; rows without a value have none.
    """
    interval = values.interval()
    rank: Any = pd.Series(-values.values).rank(method="first")
    return pd.DataFrame(
        {
            "row": found.rows,
            "name": found.names,
            "given": found.given,
            "value": values.values,
            "error": values.errors,
            "low": interval[:, 0],
            "high": interval[:, 1],
            "rank": rank.astype("Int64"),
        }
    )


# ---- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """Values, what they are of, and whether they were in the folder already."""

    ready: Ready
    values: Values
    folder: Path
    found: bool = False


def execute(
    source: Any,
    settings: ValueSettings,
    folder: Path,
    *,
    jobs: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> Outcome:
    """Read, value and write; an unfinished run goes on, and a finished one like it is read.

    Raises
    ------
    ValueError
        As `ready`.
    FileExistsError
        If the folder holds another run, or no run at all.
    """
    if jobs == 0:
        raise ValueError("expected --jobs of at least 1, or -1 for all cores; got 0")
    folders.check_folder(folder)
    found = ready(source, settings)
    test = None if found.test is None else found.test.source
    config = folders.config_of(found.settings, found.table.source, test)
    if not overwrite:
        there = folders.finished(folder, config)
        if there is not None:
            return Outcome(found, there, folder, found=True)
    made = folders.begin(folder, config, overwrite=overwrite)
    try:
        values = values_of(found, folder / folders.CACHE, jobs=jobs, progress=progress)
        outcome = Outcome(found, values, folder)
        from upweight.report import value_page

        folders.save(
            folder, config, values, frame_of(found, values),
            lambda stage: value_page.write(outcome, stage / folders.REPORT),
        )  # fmt: skip
    except BaseException:
        folders.give_up(folder, made)
        raise
    return outcome
