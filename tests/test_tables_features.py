"""Tables as numbers for networks and distances."""

import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.tables import Column, TableError, plan_columns, prepare, read_table

N = 400
WORDS = ("red", "dog", "cat", "house", "runs", "sleeps", "old", "very", "loud", "river", "hill")


def mixed(n=N, seed=0):
    """A table with a column of every kind."""
    rng = np.random.default_rng(seed)
    cities = [f"{a}{b}ville" for a in ("north", "south", "bad", "new") for b in "abcdefghijklmnop"]
    frame = pd.DataFrame(
        {
            "key": [f"r{i}" for i in range(n)],
            "normal": rng.normal(5, 2, n),
            "skewed": rng.lognormal(3, 1.5, n),
            "count": rng.integers(0, 50, n),
            "holes": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
            "price": [f"{v:.2f} €" for v in rng.normal(100, 20, n)],
            "flag": rng.choice(["yes", "no"], n, p=[0.2, 0.8]),
            "maybe": rng.choice([True, False, None], n),
            "colour": rng.choice(["red", "green", "blue", None], n),
            "city": rng.choice(cities, n),
            "when": pd.Timestamp("2023-01-01") + pd.to_timedelta(rng.integers(0, 900, n), "D"),
            "day": [f"{d:02}.03.2024" for d in rng.integers(1, 29, n)],
            "words": [" ".join(rng.choice(WORDS, 8)) for _ in range(n)],
            "same": "x",
            "nothing": None,
            "y": rng.integers(0, 2, n),
        }
    )
    return read_table(frame).frame


def features(frame, target="y", seed=0, **options):
    return prepare(frame, plan_columns(frame, target=target, **options), seed=seed)


def test_shapes_and_names():
    frame = mixed()
    found = features(frame)
    n, d = found.x.shape
    assert n == N == len(found)
    assert found.x.dtype == np.float32
    assert np.isfinite(found.x).all()
    assert (found.x != found.x[0]).any(0).all()
    assert len(found.names) == d == len(found.column) == len(set(found.names))
    assert found.columns == (
        *("normal", "skewed", "count", "holes", "price", "flag", "maybe", "colour", "city"),
        *("when", "day", "words"),
    )
    assert (np.diff(found.column) >= 0).all()
    assert sorted(set(found.column.tolist())) == list(range(len(found.columns)))
    for name, at in zip(found.names, found.column, strict=True):
        column = found.columns[at]
        assert name.startswith((column, f"log({column})"))
    assert "log(skewed)" in found.names
    assert {"colour=red", "colour=(missing)", "holes missing", "maybe missing"} <= set(found.names)
    assert {"when month sin", "when weekday cos", "day weekday sin"} <= set(found.names)
    assert "day month sin" not in found.names  # all in March
    assert found.numeric_columns == ("normal", "skewed", "count", "holes", "price", "when", "day")
    assert found.numeric.dtype == np.float64
    np.testing.assert_array_equal(found.numeric[:, 0], frame["normal"])
    np.testing.assert_array_equal(np.isnan(found.numeric[:, 3]), frame["holes"].isna())
    np.testing.assert_allclose(found.numeric[:, 4], [float(p[:-2]) for p in frame["price"]])
    assert found.numeric[0, 5] == (frame["when"][0] - pd.Timestamp("1970-01-01")).days


def test_all_columns_weigh_about_the_same():
    """The mean squared distance of two rows is about 2, for uniform numbers 1.1."""
    found = features(mixed(2000))
    for at, column in enumerate(found.columns):
        x = found.x[:, found.column == at].astype(np.float64)
        distance = 2 * x.var(0).sum()
        extra = {"holes": 2, "maybe": 2, "when": 2, "day": 1}.get(column, 0)
        assert 1.0 < distance - extra < 2.3, column


def reference(values):
    """The formula of numbers, written out."""
    low, median, high = np.nanpercentile(values, [25, 50, 75])
    scale = (high - low) / 1.349 or np.nanstd(values)
    v = np.nan_to_num((values - median) / scale)
    return v / np.sqrt(1 + (v / 4) ** 2)


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(5, 2, N),
        np.r_[np.random.default_rng(0).normal(5, 2, N - 1), np.nan],
        np.r_[np.zeros(N - 60), np.arange(60.0)],  # no range between the quartiles
        np.r_[np.full(N - 5, 3.0), -1, 2, 4, 8, 100],
        np.random.default_rng(0).normal(5, 2, N) * 1e200,
        -np.random.default_rng(0).lognormal(0, 1.5, N),  # skewed to the left, below 0
        np.random.default_rng(0).integers(-3, 9, N).astype(float),
    ],
)
def test_the_formula_of_numbers(values):
    found = features(pd.DataFrame({"a": values, "y": 1}))
    assert found.names == ("a",)
    np.testing.assert_allclose(found.x[:, 0], reference(values), atol=1e-5)


@pytest.mark.parametrize("unit", [1.0, 1000.0, 1e-6])
def test_skewed_numbers_take_the_logarithm(unit):
    values = np.random.default_rng(0).lognormal(3, 1.5, N)
    values[:20] = 0
    found = features(pd.DataFrame({"a": values * unit, "y": 1}))
    assert found.names == ("log(a)",)
    expected = reference(np.log1p(values / np.percentile(values[values > 0], 25)))
    np.testing.assert_allclose(found.x[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("factor", [10, 1000, 1e9])
def test_errors_of_units_do_not_outweigh_the_table(share, factor):
    rng = np.random.default_rng(0)
    values = rng.normal(13, 1, N)
    clean = features(pd.DataFrame({"a": values, "y": 1}))
    wrong = rng.random(N) < share
    spoilt = features(pd.DataFrame({"a": np.where(wrong, values * factor, values), "y": 1}))
    assert spoilt.names == ("a",)
    assert np.abs(spoilt.x).max() <= 4.0
    assert spoilt.x[wrong].min() > clean.x.max()  # but they stand out
    assert np.abs(spoilt.x - clean.x)[~wrong].max() < 0.5


def test_missing_indicators_begin_at_one_percent():
    values = np.random.default_rng(0).normal(size=1000)
    values[:9] = np.nan
    assert features(pd.DataFrame({"a": values, "y": 1})).names == ("a",)
    values[:10] = np.nan
    found = features(pd.DataFrame({"a": values, "y": 1}))
    assert found.names == ("a", "a missing")
    assert len(set(found.x[:10, 1])) == 1 == len(set(found.x[10:, 1]))
    assert found.x[0, 1] > found.x[10, 1]
    assert (found.x[:10, 0] == 0).all()


def test_a_number_or_nothing_is_an_indicator():
    frame = pd.DataFrame({"a": [3.0, None] * 50, "b": ["x", None] * 50, "y": 1})
    found = features(frame)
    assert found.names == ("a missing", "b=x", "b=(missing)")
    assert found.numeric_columns == ("a",)


def test_booleans():
    yes = np.r_[np.ones(30), np.zeros(70)]
    found = features(pd.DataFrame({"a": np.where(yes, "Yes", "no"), "y": 1}))
    np.testing.assert_allclose(found.x[:, 0], (yes - 0.3) / np.sqrt(0.21), rtol=1e-6)
    rare = np.r_[np.ones(1), np.zeros(999)]
    assert features(pd.DataFrame({"a": rare, "y": 1})).x.max() < 5


def test_categories():
    levels = ["a"] * 50 + ["b"] * 30 + [" b"] * 10 + [None] * 10
    found = features(pd.DataFrame({"c": levels, "y": 1}))
    assert found.names == ("c=a", "c=b", "c=(missing)")
    scale = 1 / np.sqrt(1 - 0.5**2 - 0.4**2 - 0.1**2)
    expected = np.zeros((100, 3))
    expected[range(100), [0] * 50 + [1] * 40 + [2] * 10] = scale
    np.testing.assert_allclose(found.x, expected, rtol=1e-6)


def test_rare_levels_share_a_feature():
    levels = [f"l{i}" for i in range(30) for _ in range(30)]
    levels += [f"m{i}" for i in range(50) for _ in range(2)]
    found = features(pd.DataFrame({"c": levels, "y": 1}))
    assert found.names == (*(f"c=l{i}" for i in range(30)), "c=(other)")
    assert (found.x[900:, -1] > 0).all()
    assert (found.x[:900, -1] == 0).all()


def test_numbers_as_categories():
    frame = pd.DataFrame({"c": [1, 2, 10, 2] * 20, "y": 1})
    found = features(frame, kinds={"c": "category"})
    assert found.names == ("c=1", "c=2", "c=10")
    assert found.numeric.shape == (80, 0)


def messy(n=1000):
    rng = np.random.default_rng(0)
    stems = ["engineer", "teacher", "driver", "nurse"]
    kinds = rng.integers(0, 4, n)
    return kinds, [f"{stems[k]}-{rng.integers(0, 300)}" for k in kinds]


def test_messy_categories_are_near_where_spelt_alike():
    pytest.importorskip("skrub")
    kinds, jobs = messy()
    found = features(pd.DataFrame({"job": jobs, "y": 1}))
    assert 5 <= found.x.shape[1] <= 20
    x = found.x
    square = ((x[:, None] - x[None]) ** 2).sum(-1)
    same = kinds[:, None] == kinds[None]
    np.fill_diagonal(square, np.inf)
    nearest = square.argmin(1)
    assert (same[np.arange(len(x)), nearest]).mean() > 0.95
    assert 1.8 < 2 * x.var(0).sum() < 2.2
    np.testing.assert_array_equal(x, features(pd.DataFrame({"job": jobs, "y": 1})).x)


def test_messy_categories_without_skrub(monkeypatch):
    monkeypatch.setitem(sys.modules, "skrub", None)
    _, jobs = messy()
    found = features(pd.DataFrame({"job": jobs, "y": 1}))
    assert len(found.names) == 31
    assert found.names[-1] == "job=(other)"


def test_dates():
    days = pd.date_range("2024-01-01", periods=140)  # a Monday
    found = features(pd.DataFrame({"d": days.strftime("%Y-%m-%d"), "y": 1}))
    angle = 2 * np.pi * (np.arange(140) % 7) / 7
    names = list(found.names)
    assert names == [
        *("d", "d month sin", "d month cos", "d weekday sin", "d weekday cos"),
    ]
    np.testing.assert_allclose(found.x[:, 3], np.sin(angle) * np.sqrt(0.5), atol=1e-6)
    month = 2 * np.pi * (days.month.to_numpy() - 1) / 12
    np.testing.assert_allclose(found.x[:, 2], np.cos(month) * np.sqrt(0.5), atol=1e-6)
    np.testing.assert_allclose(found.x[:, 0], reference(np.arange(140.0)), atol=1e-5)
    assert found.numeric[:, 0].tolist() == list(range(19723, 19863))
    zoned = pd.DataFrame({"d": days.tz_localize("Asia/Tokyo"), "y": 1})
    np.testing.assert_allclose(features(zoned).numeric[:, 0], np.arange(19723, 19863) - 9 / 24)


def test_times_before_1970_and_missing_ones():
    frame = pd.DataFrame({"d": ["1969-12-31 12:00", None, "1960-02-03", "1970-01-02"] * 10, "y": 1})
    found = features(frame)
    np.testing.assert_allclose(found.numeric[:4, 0], [-0.5, np.nan, -3620, 1])
    assert (found.x[1, :5] == 0).all()
    assert found.names[-1] == "d missing"


def test_texts():
    frame = mixed()
    found = features(frame)
    x = found.x[:, found.column == found.columns.index("words")]
    assert 5 < x.shape[1] <= 20
    assert 0.9 < x.var(0).sum() < 1.1
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    twice = pd.concat([frame, frame[:1]], ignore_index=True)
    again = features(twice, id="key")
    np.testing.assert_array_equal(again.x[0], again.x[-1])


@pytest.mark.parametrize("cells", ["punctuation", "a word", "hostile"])
def test_odd_texts(cells):
    texts = {
        "punctuation": ["! " * (i + 1) for i in range(80)],
        "a word": [f"{'! ' * i}word ?" for i in range(80)],
        "hostile": [f"<script>alert({i})</script> =1+1 \u202e {'x' * 10_000}" for i in range(80)],
    }[cells]
    frame = pd.DataFrame({"t": texts, "a": np.arange(80) % 7, "y": 1})
    found = features(frame, kinds={"t": "text"})
    assert np.isfinite(found.x).all()
    assert ("t" in found.columns) == (cells == "hostile")


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
@pytest.mark.slow
def test_permuted_rows_are_permuted_features(random):
    frame = mixed(150)
    order = list(range(len(frame)))
    random.shuffle(order)
    columns = plan_columns(frame, target="y")
    plain = prepare(frame, columns)
    permuted = prepare(frame.iloc[order].reset_index(drop=True), columns)
    assert permuted.names == plain.names
    np.testing.assert_allclose(permuted.x, plain.x[order], atol=1e-6)
    np.testing.assert_array_equal(permuted.numeric, plain.numeric[order])


def test_the_seed_decides():
    frame = mixed()
    one, two = features(frame, seed=3), features(frame, seed=3)
    np.testing.assert_array_equal(one.x, two.x)
    assert one.names == two.names


@pytest.mark.slow
def test_files_and_frames_give_the_same_features(tmp_path):
    frame = mixed()
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    expected = features(frame)
    for name in ("a.csv", "a.parquet"):
        found = features(read_table(tmp_path / name).frame)
        assert found.names == expected.names
        np.testing.assert_allclose(found.x, expected.x, atol=1e-6)


def test_take():
    found = features(mixed())
    rows = np.array([5, 2, 2])
    part = found.take(rows)
    np.testing.assert_array_equal(part.x, found.x[rows])
    np.testing.assert_array_equal(part.numeric, found.numeric[rows])
    assert part.names == found.names
    assert len(found.take(np.arange(N) < 10)) == 10


def test_the_frame_is_not_changed():
    frame = mixed()
    before = frame.copy(deep=True)
    features(frame)
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    "cells", [[1.5, np.inf, 2.5, -np.inf] * 5, ["1.5", "inf", "2.5", "-inf"] * 5]
)
def test_infinite_values_are_refused(cells):
    frame = pd.DataFrame({"ok": np.arange(20) % 6, "bad": cells, "y": 1})
    with pytest.raises(
        TableError, match=r"column 'bad' has 10 infinite values, the first in row 1:"
    ):
        features(frame)
    assert features(frame, ignore=["bad"]).columns == ("ok",)


def test_nothing_left_is_refused():
    frame = pd.DataFrame({"k": range(20), "c": "x", "e": None, "y": [0, 1] * 10})
    with pytest.raises(TableError) as error:
        features(frame)
    assert "'k' (id), 'c' (constant), 'e' (empty), 'y' (target)" in str(error.value)
    assert "--kind NAME=numeric" in str(error.value)
    assert "\n" not in str(error.value)
    assert features(frame, kinds={"k": "numeric"}).columns == ("k",)


def test_a_plan_of_another_table_is_refused():
    frame = pd.DataFrame({"a": ["u", "v", "w"] * 10})
    with pytest.raises(TableError, match="column 'a' is planned as boolean, but is none"):
        prepare(frame, [Column("a", "boolean", 0, 2, "")])


def test_very_many_rows_get_fewer_levels(monkeypatch):
    frame = pd.DataFrame({"c": [f"l{i % 28}" for i in range(1000)], "y": 1})
    assert features(frame).x.shape[1] == 28
    monkeypatch.setattr("upweight.tables.features.ONE_HOT_CELLS", 10_000)
    assert features(frame).x.shape[1] == 11
