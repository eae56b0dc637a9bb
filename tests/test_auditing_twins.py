"""Duplicates, near duplicates, conflicts, and columns that leak the target."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upweight.auditing.leakage import find_leaks
from upweight.auditing.twins import find_twins
from upweight.tables import plan_columns, prepare
from upweight.valuation import neighbours


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=25),
    labels=st.lists(st.integers(-1, 2), min_size=25, max_size=25),
)
def test_twins_by_comparing_all_pairs(cells, labels):
    frame = pd.DataFrame(cells, columns=["a", "b"])
    y = np.array(labels[: len(cells)])
    judged = y >= 0
    found = find_twins(frame, ["a", "b"], y, judged)
    for i in range(len(cells)):
        same = [j for j in range(len(cells)) if j != i and cells[j] == cells[i]]
        alike = [j for j in same if judged[i] == judged[j] and (y[j] == y[i] or not judged[i])]
        earlier = [j for j in alike if j < i]
        assert found.duplicate_of[i] == (min(earlier) if earlier else -1)
        other = [j for j in same if judged[i] and judged[j] and y[j] != y[i]]
        assert (found.conflict_with[i] >= 0) == bool(other)
        if other:
            assert found.conflict_with[i] == min(other)


def test_missing_cells_are_equal():
    frame = pd.DataFrame({"a": [np.nan, np.nan, 1.0], "b": [None, None, "x"]})
    found = find_twins(frame, ["a", "b"], np.zeros(3), np.ones(3, bool))
    assert found.duplicate_of.tolist() == [-1, 0, -1]
    assert found.share == pytest.approx(2 / 3)


def test_numbers_that_nearly_agree_are_no_conflict():
    frame = pd.DataFrame({"a": [1, 1, 1]})
    y = np.array([5.0, 5.05, 9.0])
    found = find_twins(frame, ["a"], y, np.ones(3, bool), tolerance=0.1)
    assert found.duplicate_of.tolist() == [-1, 0, -1]
    assert found.conflict_with.tolist() == [2, 2, 0]


def test_near_duplicates_are_near_and_no_duplicates():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    x[10] = x[3] + 1e-4
    x[20] = x[5]
    frame = pd.DataFrame(x)
    near = neighbours(x.astype(np.float32), 5)
    found = find_twins(frame, list(frame), np.zeros(60), np.ones(60, bool), near)
    assert found.near_duplicate_of[10] == 3
    assert found.near_duplicate_of[3] == 10
    assert found.duplicate_of[20] == 5
    assert (found.near_duplicate_of >= 0).sum() == 2


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_column_made_from_the_target_leaks(task):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 300) if task == "classification" else rng.normal(size=300)
    frame = pd.DataFrame(
        {
            "weak": y + 2 * rng.normal(size=300),
            "leak": y * 2.0 + 0.001 * rng.normal(size=300),
            "none": rng.choice(["a", "b"], 300),
            "y": y,
        }
    )
    features = prepare(frame, plan_columns(frame, target="y"))
    found = find_leaks(features, y, task)
    assert [leak.column for leak in found] == ["leak"]
    assert found[0].score > 0.99


def test_a_category_that_names_the_class_leaks():
    y = np.tile([0, 1, 2, 3], 50)
    frame = pd.DataFrame({"code": np.array(list("wxyz"))[y], "n": np.arange(200) % 7, "y": y})
    found = find_leaks(prepare(frame, plan_columns(frame, target="y")), y, "classification")
    assert [leak.column for leak in found] == ["code"]
