"""Which column should be predicted, and how."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.tables import TableError, read_target

N = 60


def repeated(*values):
    return [values[i % len(values)] for i in range(N)]


CASES = {
    "texts": (repeated("no", "yes"), ("no", "yes")),
    "blanks around": (repeated("no", " no", "yes "), ("no", "yes")),
    "case": (repeated("No", "no"), ("No", "no")),
    "truth": (repeated(True, False), ("False", "True")),
    "truth with gaps": (repeated(True, False, None), ("False", "True")),
    "0 and 1": (repeated(0, 1), ("0", "1")),
    "0 and 1 with gaps": (repeated(0.0, 1.0, None), ("0", "1")),
    "levels": (repeated(10, 9, 8, 100), ("8", "9", "10", "100")),
    "20 integers": ([i % 20 * 7 for i in range(N)], tuple(str(7 * i) for i in range(20))),
    "numbers in texts": (repeated("class 10", "class 9", "class 100"), None),
    "categories": (pd.Categorical(repeated(3, 1, 2)), ("1", "2", "3")),
    "None is a class": (repeated("None", "Drug"), ("Drug", "None")),
    "letters": ([chr(97 + i % 26) for i in range(N)], tuple("abcdefghijklmnopqrstuvwxyz")),
    "codes": ([i % 30 for i in range(1000)], tuple(str(i) for i in range(30))),
    "text digits": (repeated("1", "2"), ("1", "2")),
    "a few bad among texts": (repeated("1", "x"), ("1", "x")),
}


@pytest.mark.parametrize("name", CASES)
def test_classes(name):
    values, classes = CASES[name]
    classes = classes or ("class 9", "class 10", "class 100")
    series = pd.Series(values, name="y")
    target = read_target(series)
    assert target.task == "classification"
    assert target.classes == classes
    assert target.y.dtype == np.int64
    assert target.judged.tolist() == series.notna().tolist()
    assert (target.y[~target.judged] == -1).all()
    given_ = [str(v).strip().removesuffix(".0") for v in series[target.judged]]
    assert [classes[code] for code in target.y[target.judged]] == given_


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, N), np.linspace(0, 1, N)),
        (repeated(0.5, 1.0), repeated(0.5, 1.0)),
        (repeated(0.5, 1.5, None), repeated(0.5, 1.5, np.nan)),
        (range(N), np.arange(N)),
        ([i % 30 for i in range(N)], [i % 30 for i in range(N)]),  # 30 > √60: no codes
        ([f"{i},5" for i in range(N)], np.arange(N) + 0.5),
        ([f"${i}.5" for i in range(N)], np.arange(N) + 0.5),
        ([*(str(i) for i in range(N - 1)), "None"], [*range(N - 1), np.nan]),
    ],
)
def test_numbers(values, expected):
    target = read_target(pd.Series(values))
    assert target.task == "regression"
    assert target.classes is None
    assert target.y.dtype == np.float64
    np.testing.assert_array_equal(target.y, np.asarray(expected, dtype=float))
    np.testing.assert_array_equal(target.judged, ~np.isnan(np.asarray(expected, dtype=float)))


def test_counts_with_rare_values_are_numbers():
    counts = np.repeat(np.arange(41), np.r_[np.full(40, 50), 1])
    assert read_target(pd.Series(counts)).task == "regression"
    assert read_target(pd.Series(counts[:-1])).task == "classification"


def test_a_task_that_is_given():
    series = pd.Series(repeated(0.5, 1.0, 1.5))
    target = read_target(series, "classification")
    assert target.classes == ("0.5", "1.0", "1.5")
    target = read_target(pd.Series(repeated(0, 1, None)), "regression")
    np.testing.assert_array_equal(target.y, repeated(0.0, 1.0, np.nan))
    assert read_target(pd.Series(repeated(True, False)), "regression").y.tolist() == repeated(
        1.0, 0
    )
    assert read_target(pd.Series(repeated("1", "2")), "regression").y.tolist() == repeated(1.0, 2.0)


REFUSED = {
    "one class": (repeated("a"), None, "the target 'y' is 'a' in every row; there is nothing to"),
    "one number": (repeated(1.5), "regression", "is '1.5' in every row"),
    "all missing": (repeated(None), None, "the target 'y' is missing in all 60 rows"),
    "blank texts": (repeated("", "NA"), None, "is missing in all 60 rows"),
    "few": (["a", "b"] * 4 + [None], None, "has a value in 8 of 9 rows only; at least 10 are"),
    "a rare class": ([*repeated("a", "b"), "c"], None, "1 class with a single row: 'c' (row 60);"),
    "rare classes": (
        [*repeated("a", "b"), *"fedc"],
        None,
        "4 classes with a single row: 'c', 'd', 'e' … (row 63)",
    ),
    "too many classes": (
        [f"n{i}" for i in range(N)],
        None,
        "has 60 classes in 60 rows, more than one for two rows; if it is a number",
    ),
    "floats as classes": (np.linspace(0, 1, N), "classification", "has 60 classes in 60 rows"),
    "no number": (
        repeated("1.5", "two"),
        "regression",
        "is 'two' in row 1, which is no number (30 s",
    ),
    "a typo": (
        [*(f"{i}.5" for i in range(N)), "1o.5"],
        None,
        "is '1o.5' in row 60, which is no number: correct or empty it",
    ),
    "infinite": ([*np.linspace(0, 1, N), -np.inf], None, "is infinite in row 60: correct or empty"),
    "infinite text": ([*(f"{i}.5" for i in range(N)), "Inf"], None, "is infinite in row 60"),
    "dates": (pd.date_range("2024-01-01", periods=N), None, "holds dates; turn them into numbers"),
    "task": (repeated(0, 1), "ranking", "expected the task classification or regression; got 'ran"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    values, task, message = REFUSED[name]
    with pytest.raises(TableError) as error:
        read_target(pd.Series(values, name="y"), task)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_hostile_classes_stay_as_they_are():
    hostile = ["</script><img src=x onerror=alert(1)>", "=1+1", "\u202etxt", "x" * 10_000]
    assert set(read_target(pd.Series(repeated(*hostile))).classes) == set(hostile)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(N)), st.sampled_from(sorted(set(CASES) - {"codes"})))
def test_permuted_rows_are_permuted_codes(order, name):
    series = pd.Series(CASES[name][0])
    target = read_target(series)
    permuted = read_target(series.iloc[order])
    assert permuted.classes == target.classes
    np.testing.assert_array_equal(permuted.y, target.y[order])
