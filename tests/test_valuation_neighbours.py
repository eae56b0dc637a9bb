"""The nearest rows, against all distances sorted, where arithmetic or ties could go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from upweight.valuation import neighbours
from upweight.valuation.grid import make_grid
from upweight.valuation.order import nearest_places


def naive(x, k, query=None, rows=slice(None)):
    """All distances in float64, each from a difference."""
    x = np.asarray(x, dtype=np.float64)
    asked = (x if query is None else query)[rows]
    distances = np.sqrt([((x - row) ** 2).sum(axis=1) for row in asked])
    if query is None:
        distances[np.arange(len(asked)), np.arange(len(x))[rows]] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1), distances


def same(found, expected, tolerance=0.0):
    """The r-th nearest is as near as it should be: of equally near ones, any may come first."""
    true = np.take_along_axis(expected[2], found[0].astype(np.intp), axis=1)
    np.testing.assert_allclose(true, expected[1], rtol=tolerance)
    np.testing.assert_allclose(found[1], expected[1], rtol=max(1e-6, tolerance), atol=1e-6)
    assert all(len(set(row)) == len(row) for row in found[0].tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 6), st.data())
def test_equals_all_distances_sorted(seed, n, d, data):
    x = np.random.default_rng(seed).integers(-2, 3, (n, d)) / 4 + data.draw(st.integers(-9, 9))
    k = data.draw(st.integers(1, n - 1))
    same(neighbours(x, k, batch_size=data.draw(st.integers(1, n))), naive(x, k))
    query = x[::2] + 0.125
    same(neighbours(x, k, query), naive(x, k, query))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 10, 150, 2199])
def test_many_rows(dtype, k):  # enough for a threshold on the distances
    x = np.random.default_rng(0).normal(size=(2200, 5)).astype(dtype)
    found, some = neighbours(x, k), np.arange(0, 2200, 11)
    same([of[some] for of in found], naive(x, k, rows=some), 1e-5)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 30, 120])
def test_many_rows_with_few_different_ones(levels, k):
    x = np.random.default_rng(0).integers(0, levels, (2200, 4)).astype(float)
    x[7] += 0.5
    found, some = neighbours(x, k), np.arange(0, 2200, 7)
    same([of[some] for of in found], naive(x, k, rows=some))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 140), st.sampled_from([2, 5, 300, 10**9]))
def test_smallest_numbers_of_a_row(seed, wanted, levels):
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, levels, (6, 2300)).astype(float)
    squares[1] = np.sort(squares[1])
    squares[2] = -np.sort(-squares[2])
    squares[3, ::16] = levels  # what is looked at first misleads
    squares[4] = 5
    squares[5] += 1000
    squares[5, ::16] = np.arange(144)  # … or lets too few pass
    first = rng.integers(0, 2300, 6)
    found, places = nearest_places(squares, wanted, 12, first)
    for row in range(6):
        ring = (np.arange(2300) - first[row]) % 2300
        expected = np.lexsort((ring, squares[row]))[:wanted]
        np.testing.assert_array_equal(places[row], expected)
        np.testing.assert_array_equal(found[row], squares[row][expected])


def test_equals_scikit_learn():
    x = np.random.default_rng(1).normal(size=(400, 20))
    indices, distances = neighbours(x, 8, x[:50] + 0.1)
    expected = NearestNeighbors(n_neighbors=8, algorithm="brute").fit(x).kneighbors(x[:50] + 0.1)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-6)
    assert (indices.dtype, distances.dtype) == (np.int32, np.float32)


def test_equal_rows_are_at_distance_zero_and_equally_far_from_others():
    x = np.random.default_rng(2).normal(size=(300, 30)).astype(np.float32)
    x[200:] = x[:100]
    indices, distances = neighbours(x, 299)
    np.testing.assert_array_equal(indices[:100, 0], np.arange(200, 300))
    assert (distances[:100, 0] == 0).all()
    apart = np.zeros((300, 300))
    np.put_along_axis(apart, indices.astype(np.intp), distances, axis=1)
    np.testing.assert_array_equal(apart[:, :100], apart[:, 200:])
    np.testing.assert_array_equal(apart, apart.T)


@pytest.mark.parametrize("n", [200, 2600])
def test_equal_rows_are_neighbours_by_turns_whatever_the_order_of_the_table(n):
    x = np.zeros((n, 2))
    indices, _ = neighbours(x, 8)
    assert (np.bincount(indices.ravel()) == 8).all()
    label = np.arange(n) < n // 2  # sorted: the next in the table say the same
    votes = label[indices].mean(axis=1)
    assert 0.1 < votes.std() < 0.25  # of eight fair coins: 0.18
    assert abs(votes[label].mean() - 0.5) < 0.1
    asked, _ = neighbours(x, 8, np.zeros((n, 2)))
    assert np.bincount(asked.ravel(), minlength=n).min() > 0
    assert (neighbours(x, 8, seed=1)[0] != indices).any()


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1.0, 1e6, 1e100])
def test_any_scale(scale):
    x = np.random.default_rng(3).normal(size=(50, 3))
    found = neighbours(x * scale, 5)
    np.testing.assert_array_equal(found[0], neighbours(x, 5)[0])
    if 1e-30 < scale < 1e30:  # float32
        np.testing.assert_allclose(found[1], naive(x, 5)[1] * scale, rtol=1e-5)


def test_a_large_offset():
    x = np.random.default_rng(4).integers(0, 1000, (200, 3)).astype(float)
    same(neighbours(x + 1.7e9, 9), naive(x, 9))


def test_one_absurd_value_does_not_blind_the_others():
    x = np.random.default_rng(5).normal(size=(400, 4))
    x[13, 2] = 3e9
    found, others = neighbours(x, 6), np.arange(400) != 13
    same([of[others] for of in found], [of[others] for of in naive(x, 6)], 2e-3)
    np.testing.assert_allclose(found[1][13], 3e9, rtol=1e-6)
    query = np.array([[0, 0, 1e7, 0.0], [0, 0, 2.9e9, 0], [0, 0, 1, 0]])
    found, expected = neighbours(x, 400, query), naive(x, 400, query)
    same([of[:2] for of in found], [of[:2] for of in expected])
    same(found, expected, 2e-3)


def test_a_table_without_differences():
    indices, distances = neighbours(np.full((5, 2), 7.5), 2)
    assert (distances == 0).all()
    assert (np.bincount(indices.ravel()) == 2).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 40))
def test_products_on_the_grid_are_exact(seed, n, d):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (n, d)) * 10.0 ** rng.integers(-3, 4)
    grid = make_grid(x)
    squares = grid.queries @ grid.players
    whole = [[int(v) for v in row] for row in grid.queries[:3, :d] / -2]
    every = [[int(v) for v in row] for row in grid.players[:d].T]
    for i, row in enumerate(whole):
        for j in rng.integers(0, n, 20):
            exact = sum((a - b) ** 2 for a, b in zip(row, every[j], strict=True))
            assert squares[i, j] == exact < 2**grid.bits - 1
    assert grid.bits + grid.shift <= 63
    assert 2**grid.shift >= n
    radius = np.linalg.norm(x - np.median(x, axis=0), axis=1).max()
    assert grid.step <= max(radius, 1e-300) * 2.0 ** (3 - grid.bits / 2) or radius == 0


def test_blocks():
    x = np.random.default_rng(6).normal(size=(90, 2))
    indices, distances = neighbours(x, 4, block=40, seed=1)
    assert indices.shape == (90, 4)
    assert (indices != np.arange(90)[:, None]).all()
    assert (distances >= naive(x, 4)[1] - 1e-6).all()
    parts = {frozenset(np.append(row, i)) for i, row in enumerate(indices.tolist())}
    assert len(parts) > 1
    other = neighbours(x, 4, block=40, seed=1, n_jobs=2, batch_size=3)
    np.testing.assert_array_equal(other[0], indices)
    np.testing.assert_array_equal(other[1], distances)
    assert (neighbours(x, 4, block=40, seed=2)[0] != indices).any()
    same(neighbours(x, 4, x, block=40), naive(x, 4, x), 1e-6)  # queries see all rows


@pytest.mark.parametrize(
    ("x", "k", "options", "says"),
    [
        ([[0.0], [np.nan]], 1, {}, "finite x; got nan in row 1"),
        ([[0.0], [1.0]], 2, {}, "k from 1 to 1"),
        ([[0.0], [1.0]], 0, {}, "got 0"),
        ([[0.0], [1.0]], 3, {"x_query": [[0.0]]}, "k from 1 to 2"),
        ([[0.0], [1.0]], 1, {"x_query": [[0.0, 1.0]]}, r"x_query of shape \(rows, 1\)"),
        ([[0.0], [1.0]], 1, {"x_query": [[np.inf]]}, "finite x_query"),
        ([["a"], ["b"]], 1, {}, "real numbers; got <U1: encode"),
        ([[0.0], [1.0]], 1, {"block": 1}, "block at least 2"),
    ],
)
def test_bad_input_is_refused(x, k, options, says):
    with pytest.raises(ValueError, match=says):
        neighbours(x, k, **options)
