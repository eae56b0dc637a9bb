"""Tables for `audit.py`, and what can be wrong in them: labels, cells, rows that are there twice.

Every table is a frame with a column ``target`` of strings, as a user would have it. Wine, iris,
breast cancer and digits come with scikit-learn; penguins (CC0), cars and weather are read from
packages in the peers' environment, and left out where these are not installed. ``mixed`` is
generated: see `mixed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine

TARGET = "target"
PENGUINS = "lib/python*/site-packages/palmerpenguins/data/penguins.csv"
CARS = "lib/python*/site-packages/vega_datasets/_data/cars.json"
WEATHER = "lib/python*/site-packages/vega_datasets/_data/seattle-weather.csv"
PEERS = Path(__file__).resolve().parent.parent / ".venv-peers"
DISTINCT = 10  # a numeric column has more values than this

Floats = np.ndarray[Any, np.dtype[np.float64]]


# ---- a generated table of mixed types ------------------------------------------------------------

ROWS = 1_500
CLASSES = ("loyal", "occasional", "lost")
# Two groups of customers per class. Given its group, the cells of a row are independent:
# age and its spread, log of the money spent, mean number of visits, score out of 100, days since
# the first of January 2024 of the account's opening, shares of four plans and of the newsletter.
GROUPS: tuple[tuple[float, float, float, float, float, tuple[float, ...], float], ...] = (
    (34, 5.9, 34, 78, 160, (0.04, 0.16, 0.55, 0.25), 0.85),
    (61, 6.4, 14, 84, 330, (0.05, 0.10, 0.25, 0.60), 0.70),
    (29, 3.9, 9, 55, 420, (0.70, 0.22, 0.06, 0.02), 0.35),
    (58, 4.6, 4, 66, 210, (0.25, 0.60, 0.10, 0.05), 0.55),
    (40, 2.6, 1, 28, 80, (0.60, 0.25, 0.10, 0.05), 0.10),
    (52, 3.3, 2, 18, 520, (0.35, 0.40, 0.20, 0.05), 0.20),
)
AGE_SD, SPENT_SD, SCORE_SD, OPENED_SD = 8.0, 0.75, 10.0, 90.0
PLANS = ("basic", "standard", "family", "premium")
# How a plan is spelt, the first most often.
SPELT = {
    "basic": ("basic", "Basic", "basic ", "bsaic"),
    "standard": ("standard", "Standard", "standart", "stanard"),
    "family": ("family", "Family", "familly", "famliy"),
    "premium": ("premium", "Premium", "premum", "PREMIUM"),
}
SPELLING = (0.88, 0.06, 0.04, 0.02)
CITIES = tuple(
    f"{a}{b}" for a in ("Nor", "Sud", "Wes", "Ost", "Alt") for b in ("heim", "berg", "au")
)
MISSING = {"age": 0.06, "spent": 0.04, "score": 0.08, "opened": 0.03, "plan": 0.03, "news": 0.05}


def mixed(seed: int, rows: int = ROWS) -> pd.DataFrame:
    """Customers of a shop of three classes, which the other columns tell in 99 % of the rows.

    A row has one of six groups (two per class) at random; given the group its cells are
    independent: age normal and rounded, spent log-normal, visits Poisson, score normal, opening
    date normal in days, plan and newsletter by shares. The city says nothing, the account number
    names the rows, plans are misspelt in 12 % of them, and up to 8 % of the cells of a column
    are missing.
    """
    rng = np.random.default_rng([seed, 7])
    drawn = _draw(rng, rows)
    plans = [
        None if np.isnan(plan) else SPELT[PLANS[int(plan)]][rng.choice(4, p=SPELLING)]
        for plan in drawn["plan"]
    ]
    news = np.where(drawn["news"] == 1, "yes", "no").astype(object)
    news[np.isnan(drawn["news"])] = None
    days = pd.to_timedelta(pd.Series(drawn["opened"]), unit="D")
    opened = (pd.Timestamp("2024-01-01") + days).dt.strftime("%Y-%m-%d")
    return pd.DataFrame(
        {
            "account": [f"A{number:06d}" for number in rng.permutation(10 * rows)[:rows]],
            "age": drawn["age"],
            "spent": drawn["spent"].round(2),
            "visits": drawn["visits"].astype(np.int64),
            "score": drawn["score"].round(1),
            "opened": opened,
            "plan": plans,
            "news": news,
            "city": rng.choice(CITIES, rows),
            TARGET: np.array(CLASSES, dtype=object)[drawn["group"].astype(int) // 2],
        }
    )


def _draw(rng: np.random.Generator, rows: int) -> dict[str, Floats]:
    """Cells as numbers, NaN where missing, and the group that they come from."""
    group = rng.integers(len(GROUPS), size=rows)
    age, spent, visits, score, opened, plans, news = (
        np.array(values)[group] for values in zip(*GROUPS, strict=True)
    )
    cells = {
        "age": rng.normal(age, AGE_SD).round(),
        "spent": np.exp(rng.normal(spent, SPENT_SD)),
        "visits": rng.poisson(visits).astype(np.float64),
        "score": rng.normal(score, SCORE_SD),
        "opened": rng.normal(opened, OPENED_SD).round(),
        "plan": (rng.random(rows)[:, None] > plans.cumsum(axis=1)).sum(axis=1).astype(np.float64),
        "news": (rng.random(rows) < news).astype(np.float64),
    }
    for name, share in MISSING.items():
        cells[name][rng.random(rows) < share] = np.nan
    return {**cells, "group": group.astype(np.float64)}


def mixed_bayes(rows: int = 100_000, seed: int = 0) -> float:
    """Accuracy of the best possible classifier of `mixed`, by the densities that made it."""
    cells = _draw(np.random.default_rng(seed), rows)
    logs = np.zeros((rows, len(GROUPS)))
    for at, (age, spent, visits, score, opened, plans, news) in enumerate(GROUPS):
        terms = [
            -0.5 * ((cells["age"] - age) / AGE_SD) ** 2,
            -0.5 * ((np.log(cells["spent"]) - spent) / SPENT_SD) ** 2,
            cells["visits"] * np.log(visits) - visits,
            -0.5 * ((cells["score"] - score) / SCORE_SD) ** 2,
            -0.5 * ((cells["opened"] - opened) / OPENED_SD) ** 2,
            np.log(np.append(plans, 1.0))[np.nan_to_num(cells["plan"], nan=4).astype(int)],
            np.where(cells["news"] == 1, np.log(news), np.log(1 - news))
            * np.where(np.isnan(cells["news"]), np.nan, 1),
        ]
        logs[:, at] = np.nansum(terms, axis=0)
    classes = np.exp(logs - logs.max(axis=1, keepdims=True)).reshape(rows, -1, 2).sum(axis=2)
    return float((classes.argmax(axis=1) == cells["group"] // 2).mean())


# ---- tables that exist ---------------------------------------------------------------------------


def _bundled(load: Callable[..., Any]) -> pd.DataFrame:
    bunch = load(as_frame=True)
    frame = bunch.data.copy()
    frame[TARGET] = [f"class {label}" for label in bunch.target]
    return frame


def _carried(pattern: str) -> Path | None:
    """A file in a package of the peers' environment."""
    return next(iter(sorted(PEERS.glob(pattern))), None)


def penguins() -> pd.DataFrame | None:
    """344 penguins of three species; island and sex are strings, 19 cells are missing."""
    path = _carried(PENGUINS)
    return None if path is None else pd.read_csv(path).rename(columns={"species": TARGET})


def cars() -> pd.DataFrame | None:
    """406 cars by where they were made, which a column of names tells in most rows."""
    path = _carried(CARS)
    if path is None:
        return None
    frame = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    return frame.rename(columns={"Origin": TARGET})


def weather() -> pd.DataFrame | None:
    """1,461 days by weather of five kinds, which rain, wind and temperatures tell only in part."""
    path = _carried(WEATHER)
    return None if path is None else pd.read_csv(path).rename(columns={"weather": TARGET})


# The last two are no part of the bounds for separable tables.
DATA: dict[str, Callable[[int], pd.DataFrame | None]] = {
    "wine": lambda seed: _bundled(load_wine),
    "iris": lambda seed: _bundled(load_iris),
    "breast_cancer": lambda seed: _bundled(load_breast_cancer),
    "digits": lambda seed: _bundled(load_digits),
    "penguins": lambda seed: penguins(),
    "mixed": mixed,
    "cars": lambda seed: cars(),
    "weather": lambda seed: weather(),
}
HARD = ("cars", "weather")


# ---- faults --------------------------------------------------------------------------------------

Rows = np.ndarray[Any, np.dtype[np.bool_]]


def flip(frame: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, Rows]:
    """Another class, at random, in so many rows; and which."""
    rng = np.random.default_rng([seed, 1])
    codes, classes = pd.factorize(frame[TARGET], sort=True)
    rows = rng.choice(len(frame), round(share * len(frame)), replace=False)
    spoiled = codes.copy()
    spoiled[rows] = (codes[rows] + rng.integers(1, len(classes), len(rows))) % len(classes)
    return frame.assign(**{TARGET: np.asarray(classes)[spoiled]}), spoiled != codes


def _shuffled(values: Floats, rows: Floats, rng: np.random.Generator) -> Floats:
    return rng.permutation(values[rows])


def _normal(values: Floats, rows: Floats, rng: np.random.Generator) -> Floats:
    return rng.normal(np.nanmean(values), np.nanstd(values), len(rows))


def _noisy(values: Floats, rows: Floats, rng: np.random.Generator) -> Floats:
    return values[rows] + 3 * np.nanstd(values) * rng.standard_normal(len(rows))


def _times(factor: float) -> Callable[[Floats, Floats, np.random.Generator], Floats]:
    return lambda values, rows, rng: factor * values[rows]


# what is done to some cells of a column
CORRUPTIONS: dict[str, Callable[[Any, Any, np.random.Generator], Any]] = {
    "shuffled": _shuffled,
    "Gaussian": _normal,
    "Gaussian, 3 sd added": _noisy,
    "× 10": _times(10),
    "× 1000": _times(1000),
}
UNITS = ("× 10", "× 1000")


def corrupt(
    frame: pd.DataFrame, kind: str, share: float, seed: int
) -> tuple[pd.DataFrame, Rows, str]:
    """Spoil one numeric column in so many rows: which cells have really changed, and the column."""
    rng = np.random.default_rng([seed, 2])
    numeric = [
        name
        for name in frame.select_dtypes("number")
        if name != TARGET and frame[name].nunique() > DISTINCT
    ]
    column = str(rng.choice(numeric))
    values = frame[column].to_numpy(dtype=np.float64).copy()
    present = np.flatnonzero(~np.isnan(values))
    rows = rng.choice(present, min(round(share * len(frame)), len(present)), replace=False)
    before = values.copy()
    values[rows] = CORRUPTIONS[kind](values, rows, rng)
    changed = ~np.isnan(before) & (values != before)
    return frame.assign(**{column: values}), changed, column


def add_twins(frame: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Append copies of rows: exact ones, ones with a little noise, ones with another class.

    Returns the table and, for every kind, the positions of the copies and of their originals. A
    copy gets an account number of its own. ``near`` has noise of a thousandth of a standard
    deviation in every number with decimals, ``nearer`` of a ten-thousandth.
    """
    rng = np.random.default_rng([seed, 3])
    kinds = ("exact", "conflict", "near", "nearer")
    each = max(3, round(share * len(frame)))
    chosen = rng.choice(len(frame), len(kinds) * each, replace=False).reshape(len(kinds), each)
    parts, found = [frame], {}
    for at, (kind, rows) in enumerate(zip(kinds, chosen, strict=True)):
        copy = frame.iloc[rows].copy()
        if kind == "conflict":
            codes, classes = pd.factorize(frame[TARGET], sort=True)
            other = (codes[rows] + rng.integers(1, len(classes), each)) % len(classes)
            copy[TARGET] = np.asarray(classes)[other]
        for name in frame.select_dtypes("float") if kind.startswith("near") else ():
            size = (1e-4 if kind == "nearer" else 1e-3) * np.nanstd(frame[name])
            copy[name] += rng.normal(0, size, each)
        if "account" in frame:
            copy["account"] = [f"B{at}{number:05d}" for number in range(each)]
        parts.append(copy)
        found[kind] = (len(frame) + at * each + np.arange(each), rows)
    return pd.concat(parts, ignore_index=True), found
