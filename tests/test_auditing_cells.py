"""Cells that do not fit the rest of their row."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.metrics import roc_auc_score

from upweight.auditing.cells import judge_cells


def wine():
    x, y = load_wine(return_X_y=True)
    return x, np.eye(3)[y][:, 1:]


def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return x, np.eye(2)[y][:, 1:]


def test_surprise_is_the_residual_of_a_regression_on_the_others():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4))
    found = judge_cells(table, np.empty((500, 0)))
    for j in range(4):
        others = np.column_stack([np.delete(table, j, axis=1), np.ones(500)])
        fitted = others @ np.linalg.lstsq(others, table[:, j], rcond=None)[0]
        residual = np.abs(table[:, j] - fitted)
        # the ridge and the squashing of large numbers keep it from being the same
        assert np.corrcoef(found.surprise[:, j], residual)[0, 1] > 0.9


@pytest.mark.parametrize("factor", [10.0, 1000.0, 0.1, 0.001])
def test_another_unit_is_found_with_its_column(factor):
    x, y = wine()
    rng = np.random.default_rng(1)
    rows = rng.choice(len(x), 9, replace=False)
    x[rows, 12] *= factor
    found = judge_cells(x, y)
    wrong = np.isin(np.arange(len(x)), rows)
    assert roc_auc_score(wrong, found.suspicion) > 0.97
    assert (found.column[rows] == 12).mean() > 0.8


def test_a_number_that_is_usual_alone_but_not_beside_the_others():
    rng = np.random.default_rng(2)
    height = rng.normal(170, 10, 300)
    table = np.stack([height, height - 100 + rng.normal(0, 2, 300)], axis=1)
    rows = np.argsort(height)[:15]
    table[rows, 1] = np.sort(table[:, 1])[-15:]  # short and heavy
    found = judge_cells(table, np.empty((300, 0)))
    assert roc_auc_score(np.isin(np.arange(300), rows), found.row) == 1
    assert found.flags[rows].all()


def test_units_and_order_of_rows_do_not_matter():
    x, y = wine()
    plain = judge_cells(x, y)
    factors = 10.0 ** np.arange(-6, 7)
    np.testing.assert_allclose(plain.row, judge_cells(x * factors, y).row, rtol=1e-3)
    order = np.random.default_rng(3).permutation(len(x))
    np.testing.assert_allclose(plain.row[order], judge_cells(x[order], y[order]).row, rtol=1e-4)


def test_missing_cells_have_no_surprise_and_harm_no_other():
    x, y = wine()
    x[::7, 3] = np.nan
    x[:, 5] = np.nan
    found = judge_cells(x, y)
    assert (found.surprise[::7, 3] == 0).all()
    assert (found.surprise[:, 5] == 0).all()
    assert np.isfinite(found.surprise).all()
    assert (found.row > 0).all()


def test_clean_tables_are_hardly_flagged():
    for x, y in (wine(), cancer()):
        assert judge_cells(x, y).flags.mean() < 0.02


def test_no_numbers_at_all():
    found = judge_cells(np.empty((5, 0)), np.eye(5))
    assert not found.flags.any()
    assert (found.suspicion == 0).all()


def test_constant_and_repeated_columns():
    x, y = wine()
    x = np.column_stack([x, np.full(len(x), 3.0), x[:, 0]])
    found = judge_cells(x, y)
    assert np.isfinite(found.surprise).all()
    assert (found.surprise[:, 13] == 0).all()


def test_expected_numbers_are_in_the_unit_of_the_column():
    rng = np.random.default_rng(4)
    height = rng.normal(170, 10, 300)
    table = np.stack([height, height - 100 + rng.normal(0, 1, 300)], axis=1)
    table[3, 1] = 5
    expected = judge_cells(table, np.empty((300, 0))).expected[3, 1]
    assert expected == pytest.approx(table[3, 0] - 100, abs=10)
